"""Checkpoints of every latent family draw our pixels with stock diffusers in a new process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.networks import families, text_encoder
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.networks.config import LatentPrxConfig, LoraConfig, UNetConfig
from models.networks.export import export_pipeline
from models.networks.take_over import take_over
from models.personalization import lora_files
from models.personalization.lora import add_lora, merge, save_forms
from models.sampling.generate import load_generator

PROMPTS = ["a big apple", "Three cats & a dog"]


CALL = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 16, "width": 16, "max_sequence_length": 64}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.0.proj")


def ours(checkpoint: Path) -> np.ndarray:
    drawn = load_generator(checkpoint).draw(PROMPTS, [0, 1], batch_size=1)
    return (drawn / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)


def latent_prx(root: Path, vae) -> None:
    vae().save_pretrained(root / "frozen" / "vae")
    config = LatentPrxConfig(hidden_size=32, depth=2, num_heads=2, mlp_ratio=2.0, prompt_max_tokens=16)
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(384, generator=generator), 0.5 + torch.rand(384, generator=generator)
    denoiser = families.build(config, root / "frozen", mean, std, 16, 0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    card = SamplingCard(
        **families.family_of(config),
        side=16,
        steps=4,
        guidance=2.0,
        prompt_max_tokens=16,
        shift="static",
        static_shift=2.0,
    )
    write_checkpoint(root / "prx-latent", denoiser, card, root / "frozen")


def adapted_sd3(root: Path) -> None:
    """A trained adapter in its file form, and the checkpoint it is merged into."""
    card = read_card(root / "sd3")
    denoiser = families.load(root / "sd3" / "transformer", card)
    add_lora(denoiser, LoraConfig(rank=2, alpha=4, targets=TARGETS), 0)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    save_forms(lora_files.from_module(denoiser.transformer, {}), root / "lora", "tiny")
    write_checkpoint(root / "sd3-lora", merge(denoiser), card, root / "sd3")


@pytest.fixture(scope="module")
def drawn(sd3_folder, vae, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """What stock diffusers draws, in one new process, with the foreign folder, its adapter and our exports."""
    root = tmp_path_factory.mktemp("stock")
    take_over(str(sd3_folder), root / "sd3", {"side": 16, "steps": 5, "guidance": 3.0, "prompt_max_tokens": 64})
    latent_prx(root, vae)
    adapted_sd3(root)
    for name in ("sd3", "prx-latent", "sd3-lora"):
        export_pipeline(root / name, root / f"{name}-export")
    prx_call = {"num_inference_steps": 4, "guidance_scale": 2.0, "use_resolution_binning": False}
    jobs = {
        "foreign": {"folder": str(sd3_folder), "call": CALL},
        "foreign-lora": {"folder": str(sd3_folder), "call": CALL, "lora": str(root / "lora")},
        "sd3": {"folder": str(root / "sd3-export"), "call": CALL},
        "sd3-lora": {"folder": str(root / "sd3-lora-export"), "call": CALL},
        "prx-latent": {"folder": str(root / "prx-latent-export"), "call": prx_call},
    }
    (root / "jobs.json").write_text(json.dumps({name: job | {"prompts": PROMPTS} for name, job in jobs.items()}))
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("stranger.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(root)], env=clean, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root, {name: value.numpy() for name, value in load_file(root / "drawn.safetensors").items()}


@pytest.mark.parametrize(
    ("checkpoint", "stock"),
    [
        ("sd3", "foreign"),
        ("sd3", "sd3"),
        ("sd3-lora", "sd3-lora"),
        ("sd3-lora", "foreign-lora"),
        ("prx-latent", "prx-latent"),
    ],
)
def test_stock_diffusers_draws_our_pixels(drawn, checkpoint, stock) -> None:
    root, theirs = drawn
    own = ours(root / checkpoint)
    assert np.abs(own - theirs[stock]).max() <= 1e-5
    assert own.std() > 0.01


def test_the_adapter_changes_the_picture(drawn) -> None:
    assert np.abs(drawn[1]["foreign-lora"] - drawn[1]["foreign"]).max() > 1e-2


def test_a_foreign_folder_keeps_its_grid_shift_and_origin(drawn, sd3_folder) -> None:
    root, _ = drawn
    card = read_card(root / "sd3")
    assert (card.family, card.shift, card.static_shift) == ("sd3", "static", 3.0)
    assert card.origin["pipeline"] == "StableDiffusion3Pipeline"
    assert card.origin["revision"] is None
    assert len(card.origin["sha256"]) == 64
    readme = (root / "sd3-export" / "README.md").read_text()
    assert "max_sequence_length=64" in readme
    assert "text_encoder_3=None" in readme


def test_the_readme_of_a_unet_samples_our_pixels(tmp_path) -> None:
    config = UNetConfig(channels=(8, 16), head_dim=4)
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(384, generator=generator), 0.5 + torch.rand(384, generator=generator)
    denoiser = families.build(config, None, mean, std, 16, 0)
    torch.nn.init.normal_(denoiser.transformer.conv_out.weight, std=0.1, generator=generator)
    card = SamplingCard(**families.family_of(config), side=16, steps=3, guidance=1.0, shift="static", static_shift=2.0)
    write_checkpoint(tmp_path / "checkpoint", denoiser, card)
    export_pipeline(tmp_path / "checkpoint", tmp_path / "export")
    readme = (tmp_path / "export" / "README.md").read_text()
    folder = str(tmp_path / "export")
    code = (
        readme.split("```python")[1]
        .split("```")[0]
        .replace("this folder", folder)
        .replace("unet/text", f"{folder}/unet/text")
    )
    noise = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    tokens, mask = text_encoder.encode(PROMPTS, card.prompt_max_tokens)
    known = {"x": torch.stack(noise), "tokens": tokens, "mask": mask}
    with torch.no_grad():
        exec(code, known)
    theirs = (known["x"] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours(tmp_path / "checkpoint") - theirs).max() <= 1e-5


@pytest.mark.parametrize("times", [[0.1, 0.9]])
def test_our_sd3_forward_is_the_stock_forward(sd3_folder, times) -> None:
    from models.networks.sd3 import load, packed, unpacked

    denoiser = load(sd3_folder / "transformer")
    generator = torch.Generator().manual_seed(1)
    x, embeds = torch.randn(2, 4, 8, 6, generator=generator), torch.randn(2, 5, 32, generator=generator)
    pooled, t = torch.randn(2, 32, generator=generator), torch.tensor(times)
    tokens = packed(embeds, pooled)
    assert all(torch.equal(a, b) for a, b in zip(unpacked(tokens, 32), (embeds, pooled), strict=True))
    stock_v = denoiser.transformer(x, embeds, pooled, t * 1000).sample
    v, hidden = denoiser.predict(x, t, tokens, torch.ones(2, 6, dtype=torch.bool), 0)
    assert torch.equal(v, stock_v)
    assert hidden.shape == (2, 12, 16)
    assert torch.equal(denoiser(x, t, tokens, torch.ones(2, 6, dtype=torch.bool))[0], x - t.view(-1, 1, 1, 1) * v)
