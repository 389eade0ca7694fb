"""Stage `report`: one self-contained, inert HTML page about a whole run, and the same numbers as summary.json."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jinja2

from infra.stages import StageContext
from tasks.config import ReportConfig
from tasks.report_parts import curve, gallery, load_metrics

CURATION = ("download", "dedup", "quality", "buckets")
TEMPLATES = Path(__file__).parent / "templates"


def report(config: ReportConfig, ctx: StageContext) -> dict[str, Any]:
    """Write report.html and summary.json from the scores and the artifacts of every stage."""
    scores = json.loads((ctx.inputs["scores"] / "scores.json").read_text())
    checkpoints = [role for role in ctx.inputs if (ctx.inputs[role] / "sampling.json").exists()]
    metrics = sorted({metric for stage in scores.get("scores", {}).values() for metric in stage})
    funnel = {role: ctx.parents[role].facts.get("funnel", ctx.parents[role].facts) for role in CURATION}
    truth = ctx.parents["buckets"].facts.get("truth", {}) if "buckets" in ctx.parents else {}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    page = environment.get_template("report.html").render(
        title=config.title,
        openmoji=config.data_source == "demo",
        scores=scores.get("scores", {}),
        metrics=metrics,
        gates=scores.get("gates", []),
        grids=[(path.stem, data_uri(path)) for path in sorted(ctx.inputs["scores"].glob("**/grid*.png"))],
        curves=[(role, curve(load_metrics(ctx.inputs[role] / "metrics.jsonl"))) for role in sorted(checkpoints)],
        growth=[(role, data_uri(path)) for role in sorted(checkpoints) for path in last_grid(ctx.inputs[role])],
        funnel=funnel,
        reasons=[(reason, number, pictures) for reason, number, pictures in gallery(config, ctx)],
        truth=truth,
        stages=[
            {"name": role, "digest": artifact.digest, "parents": artifact.parents,
             "seconds": artifact.facts.get("seconds")}
            for role, artifact in sorted(ctx.parents.items())
        ],
    )  # fmt: skip
    size = len(page.encode()) / 1e6
    if size > config.max_megabytes:
        raise ValueError(f"report is {size:.1f} MB, above max_megabytes={config.max_megabytes}; show fewer examples")
    (ctx.out / "report.html").write_text(page)
    summary = {"scores": scores.get("scores", {}), "funnel": funnel, "truth": truth, "gates": scores.get("gates", [])}
    (ctx.out / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True))
    return {"megabytes": round(size, 2), "checkpoints": len(checkpoints)}


def data_uri(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def last_grid(checkpoint: Path) -> list[Path]:
    """The newest grid drawn while a stage trained, if it drew any."""
    return sorted((checkpoint / "grids").glob("*.png"))[-1:]
