"""Run by test_text_tuning.py in a new process: stock diffusers, nothing of ours, loads LoRA and learnt rows and draws."""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
root, prompt = Path(sys.argv[1]), sys.argv[2]
inputs = load_file(root / "inputs.safetensors")
ABSENT = {"text_encoder_3": None, "tokenizer_3": None}


class Inverted(StableDiffusion3Pipeline, TextualInversionLoaderMixin):
    """SD3's stock class lacks the loader of learnt words; both parts are diffusers' own."""


def drawn(pipeline) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        noise = pipeline.transformer(inputs["latents"], tokens, pooled, torch.tensor([500.0])).sample
    return {"tokens": tokens, "pooled": pooled, "noise": noise}


def loaded(folder: Path) -> Inverted:
    pipeline = Inverted.from_pretrained(root / "base", **ABSENT)
    for end in ("", "_2"):
        file = folder / f"learned_embeds{end}.safetensors"
        if file.exists():
            parts = {"text_encoder": getattr(pipeline, f"text_encoder{end}")}
            pipeline.load_textual_inversion(str(file), tokenizer=getattr(pipeline, f"tokenizer{end}"), **parts)
    pipeline.load_lora_weights(folder)
    return pipeline


found = {}
for folder in (root / "rows", root / "lora", root / "both"):
    found |= {f"{folder.name}.{name}": value.contiguous() for name, value in drawn(loaded(folder)).items()}
whole = StableDiffusion3Pipeline.from_pretrained(root / "exported", **ABSENT)
found |= {f"exported.{name}": value.contiguous() for name, value in drawn(whole).items()}
plain = StableDiffusion3Pipeline.from_pretrained(root / "base", **ABSENT)
found |= {f"plain.{name}": value.contiguous() for name, value in drawn(plain).items()}
save_file(found, root / "drawn.safetensors")
