"""The files of a published LoRA adapter, and the code that puts it on its base with stock libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import assert_never

from models.networks.checkpoint import SamplingCard, read_card
from models.networks.export import call_arguments
from tasks.export import export_adapter

PEFT = """from diffusers import DiffusionPipeline
from peft import PeftModel

pipe = DiffusionPipeline.from_pretrained({base})
pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {source}).merge_and_unload()
"""

LOADER = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base})
pipe.load_lora_weights({source})
"""

MODULE = """from diffusers import UNet2DConditionModel
from peft import PeftModel

unet = UNet2DConditionModel.from_pretrained({base}, subfolder="unet")
unet = PeftModel.from_pretrained(unet, {source})  # then as the base model's card says
"""

CALL = "image = pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance}{arguments}).images[0]\n"


def write_adapter(checkpoint: Path, folder: Path, prompt: str, source: str, base: str) -> tuple[str, str]:
    """Write the adapter in its three forms with its sampling card; returns the code that uses it, and a note."""
    card = read_card(checkpoint)
    export_adapter(checkpoint, folder, folder.name)
    (folder / "sampling.json").write_text(card.model_dump_json(indent=2))
    note = (
        f"The folder holds the adapter in three forms: peft's, diffusers' `pytorch_lora_weights.safetensors`, and "
        f"`{folder.name}-kohya.safetensors` for kohya's tools and ComfyUI."
    )
    return adapter_code(card, prompt, source, base), note


def adapter_code(card: SamplingCard, prompt: str, source: str, base: str) -> str:
    """PRX has no LoRA loader in diffusers, so peft puts the adapter on and merges it."""
    names = {"base": json.dumps(base), "source": json.dumps(source)}
    call = CALL.format(
        prompt=json.dumps(prompt), steps=card.steps, guidance=card.guidance, arguments=call_arguments(card)
    )
    match card.family:
        case "prx-pixel" | "prx-latent":
            return PEFT.format(**names) + call
        case "sd3":
            return LOADER.format(**names) + call
        case "unet":
            return MODULE.format(**names)
        case _:
            assert_never(card.family)
