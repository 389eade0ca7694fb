"""Stage function that writes complete stock pipelines: what a user loads with DiffusionPipeline.from_pretrained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from infra.stages import StageContext
from models.networks import families
from models.networks.checkpoint import read_card
from models.networks.export import export_pipeline
from models.personalization import lora_import
from models.personalization.lora import save_forms
from models.personalization.text_tuning import tunes_text
from tasks.adapted import architecture_of
from tasks.config import ExportConfig

COMPARE = "compare"


def export(config: ExportConfig, ctx: StageContext) -> dict[str, Any]:
    """One folder per checkpoint and per step count of the best students; adapters ride along in three forms."""
    exports = {}
    for role, (source, steps) in wanted(ctx).items():
        folder, target, parent = ctx.inputs[source], ctx.out / role, ctx.parents[source]
        export_pipeline(folder, target, steps)
        (target / "lineage.json").write_text(
            json.dumps({"stage": parent.stage, "digest": parent.digest, "parents": list(parent.parents)}, indent=2)
        )
        if (folder / "adapter").exists():
            export_adapter(folder, target / "adapter", role)
        exports[role] = role
    return {"exports": exports}


def wanted(ctx: StageContext) -> dict[str, tuple[str, int | None]]:
    """Folder -> (input, step count); without a comparison every input is a folder at its own step count."""
    if COMPARE not in ctx.inputs:
        return {role: (role, None) for role in sorted(ctx.inputs)}
    students = {f"student-{ctx.parents[role].stage}": role for role in ctx.inputs}
    folders: dict[str, tuple[str, int | None]] = {role: (role, None) for role in sorted(ctx.inputs) if role != COMPARE}
    best = json.loads((ctx.inputs[COMPARE] / "best.json").read_text())
    for steps, found in best.items():
        folders[f"student-{steps}"] = (students[f"student-{found['stage']}"], int(steps))
    return folders


def export_adapter(checkpoint: Path, target: Path, role: str) -> None:
    """The adapter in its three forms, named like the folder; as it is where text encoders belong to it."""
    if tunes_text(checkpoint / "adapter"):
        shutil.copytree(checkpoint / "adapter", target)
        return
    adapter = lora_import.read(
        checkpoint / "adapter", families.load(checkpoint / "transformer", read_card(checkpoint)).transformer
    )
    save_forms(adapter, target, role, architecture_of(read_card(checkpoint)))
