"""Run in a process that cannot import this repository: stock diffusers draws folders, one job a line of jobs.json."""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

torch.set_num_threads(1)
root = Path(sys.argv[1])
drawn = {}
for name, job in json.loads((root / "jobs.json").read_text()).items():
    index = json.loads((Path(job["folder"]) / "model_index.json").read_text())
    missing = {part: None for part, kind in index.items() if kind == [None, None]}  # diffusers wants to be told
    pipe = DiffusionPipeline.from_pretrained(job["folder"], local_files_only=True, **missing)
    pipe.set_progress_bar_config(disable=True)
    if job.get("lora"):
        pipe.load_lora_weights(job["lora"])
    pictures = [
        pipe(prompt, output_type="np", generator=torch.Generator().manual_seed(seed), **job["call"]).images[0]
        for seed, prompt in enumerate(job["prompts"])
    ]
    drawn[name] = torch.stack([torch.from_numpy(picture) for picture in pictures]).contiguous()
assert not {name.split(".")[0] for name in sys.modules} & {"flows", "tasks", "models", "data_curation", "infra"}
save_file(drawn, root / "drawn.safetensors")
