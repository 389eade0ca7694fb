"""Run by test_lora_files.py in a new process: stock diffusers, nothing of ours, loads each file and draws with it."""

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
nothing = dict.fromkeys(
    ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
)
drawn = {}
for folder in sorted(p for p in root.iterdir() if p.name.startswith("variant-")):
    transformer = SD3Transformer2DModel.from_pretrained(root / "base", low_cpu_mem_usage=False)
    with torch.no_grad():
        drawn[f"plain-{folder.name}"] = transformer(**inputs).sample
    pipeline = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), **nothing)
    pipeline.load_lora_weights(folder, adapter_name="one")
    with torch.no_grad():
        drawn[folder.name] = transformer(**inputs).sample
        pipeline.set_adapters(["one"], [0.0])
        drawn[f"zero-{folder.name}"] = transformer(**inputs).sample
save_file({name: value.contiguous() for name, value in drawn.items()}, root / "drawn.safetensors")
