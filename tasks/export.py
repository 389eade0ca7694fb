"""Stage function that writes complete stock pipelines: what a user loads with DiffusionPipeline.from_pretrained."""

from __future__ import annotations

import json
import shutil
from typing import Any

from infra.stages import StageContext
from models.networks.export import export_pipeline
from tasks.config import ExportConfig


def export(config: ExportConfig, ctx: StageContext) -> dict[str, Any]:
    """One folder per input checkpoint; adapters ride along."""
    exports = {}
    for role, folder in sorted(ctx.inputs.items()):
        target = ctx.out / role
        parent = ctx.parents[role]
        export_pipeline(folder, target)
        (target / "lineage.json").write_text(
            json.dumps({"stage": parent.stage, "digest": parent.digest, "parents": list(parent.parents)}, indent=2)
        )
        if (folder / "adapter").exists():
            shutil.copytree(folder / "adapter", target / "adapter")
        exports[role] = role
    return {"exports": exports}
