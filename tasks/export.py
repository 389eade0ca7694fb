"""Stage function that writes complete stock pipelines: what a user loads with DiffusionPipeline.from_pretrained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from infra.stages import StageContext
from models.networks import prx
from models.networks.export import export_pipeline
from models.personalization import lora_files, lora_import
from tasks.config import ExportConfig


def export(config: ExportConfig, ctx: StageContext) -> dict[str, Any]:
    """One folder per input checkpoint; adapters ride along as peft, diffusers and kohya files."""
    exports = {}
    for role, folder in sorted(ctx.inputs.items()):
        target = ctx.out / role
        parent = ctx.parents[role]
        export_pipeline(folder, target)
        (target / "lineage.json").write_text(
            json.dumps({"stage": parent.stage, "digest": parent.digest, "parents": list(parent.parents)}, indent=2)
        )
        if (folder / "adapter").exists():
            export_adapter(folder, target / "adapter", role)
        exports[role] = role
    return {"exports": exports}


def export_adapter(checkpoint: Path, target: Path, role: str) -> None:
    """The peft folder as it is, and its diffusers and kohya forms."""
    shutil.copytree(checkpoint / "adapter", target)
    adapter = lora_import.read(target, prx.load(checkpoint / "transformer").transformer)
    lora_files.save_diffusers(adapter, target)
    lora_files.save_kohya(adapter, target / f"{role}-kohya.safetensors", architecture="prx", prefix="lora_unet_")
