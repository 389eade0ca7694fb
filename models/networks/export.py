"""A checkpoint as the complete stock pipeline folder of its family, so that diffusers alone reproduces our pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never

from models.networks import families, prx, text_encoder
from models.networks.checkpoint import SamplingCard, check_steps, read_card, transformer_folder
from models.networks.codec import factor_of, load_vae
from models.networks.denoiser import Denoiser
from models.networks.diffusers_folder import FROZEN, take
from models.networks.text_features import prx_text_modules, sd3_pipeline
from models.pretraining.densities import shift_of
from models.sampling.euler import grid
from models.sampling.times import times_of

USAGE = """---
library_name: diffusers
pipeline_tag: text-to-image
---

# {title}

```python
{imports}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this folder"{missing})
{seeding}image = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}{arguments}).images[0]
```

Pictures are {side}x{side} px. {note}
"""

UNET = """---
library_name: diffusers
---

# {title}

A `UNet2DConditionModel` trained by flow matching; no stock pipeline samples one, so this is the module, not a pipeline:

```python
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

unet, text = UNet2DConditionModel.from_pretrained("this folder", subfolder="unet"), load_file("unet/text_statistics.safetensors")
times = {times}
tokens = (tokens - text["mean"]) / text["std"]  # all-MiniLM-L6-v2, last hidden state [B, T, 384], mask [B, T]
for t, s in zip(times, times[1:]):
    x = x + (s - t) * unet(x, 1000 * t, tokens, encoder_attention_mask=mask).sample  # x: noise [B, C, H, W] at first
```

Pictures are {side}x{side} px; with a `vae` folder beside it, x is its scaled latent.
"""


def scheduler_settings(steps: int, k: float = 1.0, table: int = 1000) -> dict[str, Any]:
    """Arguments with which a stock flow-matching scheduler's grid at `steps` is 1, (N-1)/N, ..., 1/N shifted by k.

    diffusers 0.42.1 shifts its table when it is made and the grid, which ends at the table's last entry, once more, then
    stretches it to `shift_terminal`. Shift and stretch are both fractions of linear functions, so one `shift` near k
    makes the stretched grid ours; it is found by fixed-point iteration.
    """
    if steps == 1:
        return {"num_train_timesteps": table, "shift": 1.0, "shift_terminal": None}
    shift, end = 1.0, 1.0 / steps
    for _ in range(50 if k != 1.0 else 0):
        last = shift / table / (1 + (shift - 1) / table)
        shift = 1 / (1 - (1 - end) / (1 - last) * (k - 1) / k)
    return {"num_train_timesteps": table, "shift": shift, "shift_terminal": k * end / (1 + (k - 1) * end)}


def scheduler_of(card: SamplingCard, steps: int, k: float = 1.0) -> Any:
    """The stock scheduler that samples as the checkpoint was trained, its times shifted by k."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler

    settings = scheduler_settings(steps, k)
    match card.sampler:
        case "euler":
            return FlowMatchEulerDiscreteScheduler(**settings)
        case "heun":
            refuse_heun(card, k)  # its grid ends at its table's last entry, so a table of N entries ends at 1/N
            return FlowMatchHeunDiscreteScheduler(num_train_timesteps=steps)
        case "renoise":
            return FlowMatchLCMScheduler(**settings)


def distill_record(card: SamplingCard, steps: int) -> dict[str, Any]:
    """distill.json: what the student was trained for, and how the stock pipeline is to be called."""
    return {
        "method": card.method, "teacher": card.teacher, "grid": grid(steps)[:-1], "sampler": card.sampler,
        "guidance": card.distilled_guidance, "steps": steps, "guidance_scale": 1.0, "use_resolution_binning": False,
    }  # fmt: skip


def export_pipeline(checkpoint: Path, folder: Path, steps: int | None = None) -> None:
    """Write a complete pipeline for one step count (None: the checkpoint's own), with its cards and README."""
    card = read_card(checkpoint)
    steps = card.steps if steps is None else steps
    check_steps(card, steps, card.guidance)
    denoiser = families.load(transformer_folder(checkpoint, card, steps), card)
    if card.family == "unet":
        if card.sampler == "heun":
            refuse_heun(card)
        export_module(checkpoint, denoiser, folder)
    else:
        pipeline_of(checkpoint, denoiser, card, steps).save_pretrained(folder)
    prx.forget_paths(folder)
    (folder / "sampling.json").write_text(card.model_copy(update={"steps": steps}).model_dump_json(indent=2))
    if card.distilled:
        (folder / "distill.json").write_text(json.dumps(distill_record(card, steps), indent=2))
    side = card.side // factor_of(checkpoint) // denoiser.patch_size
    sampled = times_of(card.scheduler, card.shift_rule, steps, side**2)
    no_t5 = card.family == "sd3" and not (folder / "text_encoder_3").is_dir()
    missing = ", text_encoder_3=None, tokenizer_3=None" if no_t5 else ""  # diffusers wants to be told
    (folder / "README.md").write_text(model_card(checkpoint.name, card, steps, missing, sampled))


def refuse_heun(card: SamplingCard, k: float = 1.0) -> None:
    """Heun's method on our times needs a pipeline that divides them by its table's length, and no shift."""
    if card.family not in ("prx-pixel", "prx-latent"):
        raise ValueError(
            f"stock diffusers cannot sample {card.family} by Heun's method on our times; set sampling.sampler to euler"
        )
    if k != 1.0:
        raise ValueError(
            f"the times of {card.side} px are shifted by {k:g}, and FlowMatchHeunDiscreteScheduler would shift them twice; "
            "set sampling.sampler to euler, or timesteps.shift to none"
        )


def pipeline_of(checkpoint: Path, denoiser: Denoiser, card: SamplingCard, steps: int) -> Any:
    """The stock pipeline of a checkpoint's family around its network."""
    from diffusers.pipelines.prx.pipeline_prx import PRXPipeline
    from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline

    scheduler = stock_scheduler(checkpoint, denoiser, card, steps)
    match card.family:
        case "prx-pixel":
            packaged = not (checkpoint / "text_encoder").is_dir()
            encoder, tokenizer = text_encoder.load() if packaged else prx_text_modules(checkpoint)
            return PRXPixelPipeline(
                transformer=denoiser.transformer, scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer,
                default_sample_size=card.side, prompt_max_tokens=card.prompt_max_tokens, noise_scale=1.0,
            )  # fmt: skip
        case "prx-latent":
            encoder, tokenizer = prx_text_modules(checkpoint)
            tokenizer.model_max_length = card.prompt_max_tokens  # to which the pipeline pads
            return PRXPipeline(
                transformer=denoiser.transformer, scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer,
                vae=load_vae(checkpoint / "vae").network, default_sample_size=card.side,
            )  # fmt: skip
        case "sd3":
            vae = load_vae(checkpoint / "vae").network
            return sd3_pipeline(checkpoint, denoiser.transformer, vae, scheduler)
        case "unet":
            raise ValueError("no stock pipeline samples a flow-matching UNet; export_module writes the module")
        case _:
            assert_never(card.family)


def stock_scheduler(checkpoint: Path, denoiser: Denoiser, card: SamplingCard, steps: int) -> Any:
    """A foreign pipeline's own scheduler if it is kept and the model no student, else one for the trained grid."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if card.scheduler is not None and not card.distilled:
        return FlowMatchEulerDiscreteScheduler.from_config(card.scheduler)
    k = shift_of(
        (card.side // factor_of(checkpoint) // denoiser.patch_size) ** 2, card.shift_rule
    )  # other sizes need another folder
    return scheduler_of(card, steps, k)


def export_module(checkpoint: Path, denoiser: Denoiser, folder: Path) -> None:
    """The module alone as unet/, its text standardisation and, if there is one, the VAE; not a pipeline."""
    denoiser.save(folder / "unet")
    take(checkpoint, folder, FROZEN)


def model_card(title: str, card: SamplingCard, steps: int, missing: str = "", times: Sequence[float] = ()) -> str:
    """README.md of an exported folder."""
    note = "Guidance and steps may be changed."
    if card.distilled:
        asked = ", ".join(f"{t:g}" for t in grid(steps)[:-1])
        note = (
            f"Distilled by {card.method or 'distillation'} for {steps} step(s) at t = {asked}: use exactly these and no "
            f"guidance; the teacher's ({card.distilled_guidance}) is inside the weights."
        )
    if card.family == "unet":
        return UNET.format(title=title, times=list(times), side=card.side)
    seeding = imports = ""
    if card.sampler == "renoise" and steps > 1:
        imports = "import torch\n"
        seeding = "torch.manual_seed(0)  # diffusers 0.42.1 hands `generator` to the first noise only\n"
        note += " Fresh noise enters between steps: seed with `torch.manual_seed`, not with `generator`."
    if card.trigger:
        note += f" The subject's token is `{card.trigger}`."
    return USAGE.format(
        title=title, prompt="a big apple on a blue background", steps=steps, guidance=card.guidance, side=card.side,
        note=note, imports=imports, seeding=seeding, arguments=call_arguments(card), missing=missing,
    )  # fmt: skip


def call_arguments(card: SamplingCard) -> str:
    """What else the stock pipeline must be told when it is called."""
    match card.family:
        case "prx-pixel" | "prx-latent":
            return ", use_resolution_binning=False"
        case "sd3":
            length = "" if card.prompt_max_tokens == 256 else f", max_sequence_length={card.prompt_max_tokens}"
            return f", height={card.side}, width={card.side}{length}"
        case "unet":
            return ""
        case _:
            assert_never(card.family)
