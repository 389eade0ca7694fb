"""A checkpoint as a complete stock PRXPixelPipeline folder, so that diffusers alone reproduces our pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.networks import prx, text_encoder
from models.networks.checkpoint import SamplingCard, read_card

USAGE = """---
library_name: diffusers
pipeline_tag: text-to-image
---

# {title}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this folder")
image = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}, use_resolution_binning=False).images[0]
```

Pictures are {side}x{side} px. {note}
"""


def scheduler_settings(card: SamplingCard) -> dict[str, Any]:
    """FlowMatchEulerDiscreteScheduler arguments whose grid at card.steps is 1, (N-1)/N, ..., 1/N."""
    terminal = None if card.steps == 1 else 1.0 / card.steps
    return {"num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": terminal}


def export_pipeline(checkpoint: Path, folder: Path) -> None:
    """Write transformer, scheduler, text encoder, tokenizer, model_index.json, distill/sampling card and README."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline

    card = read_card(checkpoint)
    encoder, tokenizer = text_encoder.load()
    pipeline = PRXPixelPipeline(
        transformer=prx.load(checkpoint / "transformer").transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler_settings(card)),
        text_encoder=encoder,
        tokenizer=tokenizer,
        default_sample_size=card.side,
        prompt_max_tokens=card.prompt_max_tokens,
        noise_scale=1.0,
    )
    pipeline.save_pretrained(folder)
    prx.forget_paths(folder)
    (folder / "sampling.json").write_text(card.model_dump_json(indent=2))
    if card.distilled:
        usage = {"steps": card.steps, "guidance_scale": 1.0, "use_resolution_binning": False}
        (folder / "distill.json").write_text(json.dumps(usage, indent=2))
    note = (
        "Distilled: use exactly these steps and no guidance."
        if card.distilled
        else "Guidance and steps may be changed."
    )
    if card.trigger:
        note += f" The subject's token is `{card.trigger}`."
    example = "a big apple on a blue background"
    text = USAGE.format(
        title=checkpoint.name, prompt=example, steps=card.steps, guidance=card.guidance, side=card.side, note=note
    )
    (folder / "README.md").write_text(text)
