"""A checkpoint as a complete stock PRXPixelPipeline folder, so that diffusers alone reproduces our pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.networks import prx, text_encoder
from models.networks.checkpoint import SamplingCard, check_steps, read_card, transformer_folder
from models.pretraining.densities import shift_of
from models.sampling.euler import grid

USAGE = """---
library_name: diffusers
pipeline_tag: text-to-image
---

# {title}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this folder")
{seeding}image = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}, use_resolution_binning=False).images[0]
```

Pictures are {side}x{side} px. {note}
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
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    settings = scheduler_settings(steps, k)
    match card.sampler:
        case "euler":
            return FlowMatchEulerDiscreteScheduler(**settings)
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
    from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline

    card = read_card(checkpoint)
    steps = card.steps if steps is None else steps
    check_steps(card, steps, card.guidance)
    encoder, tokenizer = text_encoder.load()
    transformer = prx.load(transformer_folder(checkpoint, card, steps)).transformer
    k = shift_of((card.side // transformer.config.patch_size) ** 2, card.shift_rule)  # other sizes need another folder
    pipeline = PRXPixelPipeline(
        transformer=transformer,
        scheduler=scheduler_of(card, steps, k),
        text_encoder=encoder,
        tokenizer=tokenizer,
        default_sample_size=card.side,
        prompt_max_tokens=card.prompt_max_tokens,
        noise_scale=1.0,
    )
    pipeline.save_pretrained(folder)
    prx.forget_paths(folder)
    (folder / "sampling.json").write_text(card.model_copy(update={"steps": steps}).model_dump_json(indent=2))
    if card.distilled:
        (folder / "distill.json").write_text(json.dumps(distill_record(card, steps), indent=2))
    (folder / "README.md").write_text(model_card(checkpoint.name, card, steps))


def model_card(title: str, card: SamplingCard, steps: int) -> str:
    """README.md of an exported folder."""
    note = "Guidance and steps may be changed."
    if card.distilled:
        times = ", ".join(f"{t:g}" for t in grid(steps)[:-1])
        note = (
            f"Distilled by {card.method or 'distillation'} for {steps} step(s) at t = {times}: use exactly these and no "
            f"guidance; the teacher's ({card.distilled_guidance}) is inside the weights."
        )
    seeding = ""
    if card.sampler == "renoise" and steps > 1:
        seeding = "torch.manual_seed(0)  # diffusers 0.42.1 hands `generator` to the first noise only\n"
        note += " Fresh noise enters between steps: seed with `torch.manual_seed`, not with `generator`."
    if card.trigger:
        note += f" The subject's token is `{card.trigger}`."
    return USAGE.format(
        title=title, prompt="a big apple on a blue background", steps=steps, guidance=card.guidance, side=card.side,
        note=note, seeding=seeding,
    )  # fmt: skip
