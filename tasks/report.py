"""Stage `report`: one self-contained, inert HTML page about a whole run, its numbers as summary.json, headline.png, curves.svg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from infra.errors import ConfigError
from infra.stages import StageContext
from tasks.config import ReportConfig
from tasks.headline import headline
from tasks.report_data import data_part
from tasks.report_parts import HEIGHT, WIDTH, Curve, curve, data_uri, load_metrics, times_rows
from tasks.report_tables import (
    comparison_rows,
    distribution_table,
    funnel_rows,
    funnel_summary,
    grid_rows,
    guard_rows,
    layout_rows,
    lineage_rows,
    prompt_rows,
    score_rows,
    versions,
)

TEMPLATES = Path(__file__).parent / "templates"
COLUMNS = 3  # of curves.svg
LARGEST_GRID = 400_000  # bytes of a training grid that is still shown


def report(config: ReportConfig, ctx: StageContext) -> dict[str, Any]:
    """Write report.html, summary.json, headline.png and curves.svg from the scores and the artifacts of every stage."""
    scores = read_scores(ctx)
    trained = [role for role, folder in ctx.inputs.items() if (folder / "sampling.json").exists()]
    stages = [stage for stage in trained if stage in scores["scores"]]
    stages += [stage for stage in scores["scores"] if stage not in stages]
    funnel, truth = funnel_summary(ctx.parents), planted_truth(ctx)
    page = render(config, ctx, scores, stages, trained, truth)
    size = len(page.encode()) / 1e6
    if size > config.max_megabytes:
        raise ConfigError(
            f"the report has {size:.1f} MB, report.max_megabytes is {config.max_megabytes:g}; "
            "lower report.dropped_examples or evaluate.grid_prompts"
        )
    (ctx.out / "report.html").write_text(page, encoding="utf-8")
    summary = {
        "scores": scores["scores"], "real": scores.get("real", {}), "parents": scores.get("parents", {}),
        "gates": scores.get("gates", []), "funnel": funnel, "truth": truth,
    }  # fmt: skip
    if "distribution" in ctx.inputs:
        summary["distribution"] = json.loads((ctx.inputs["distribution"] / "distribution.json").read_text())["scores"]
    (ctx.out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    steps = {role: json.loads((ctx.inputs[role] / "sampling.json").read_text()).get("steps", 0) for role in trained}
    headline(grid_folder(ctx), scores["scores"], ctx.parents, steps, ctx.out / "headline.png")
    if lines := curves(ctx, trained):
        (ctx.out / "curves.svg").write_text(curves_picture(lines))
    return {"megabytes": round(size, 2), "checkpoints": len(trained), "truth": truth}


def read_scores(ctx: StageContext) -> dict[str, Any]:
    """What `evaluate` or `measure_prompts` wrote; no scores where neither was asked."""
    if "scores" not in ctx.inputs:
        return {"scores": {}}
    found: dict[str, Any] = json.loads((ctx.inputs["scores"] / "scores.json").read_text())
    return found


def grid_folder(ctx: StageContext) -> Path:
    """Where the pictures of fixed prompts are: with the judge's scores, else a stage of their own."""
    return ctx.inputs["pictures"] if "pictures" in ctx.inputs else ctx.inputs["scores"]


def render(
    config: ReportConfig, ctx: StageContext, scores: dict[str, Any], stages: list[str], trained: list[str], truth: Any
) -> str:
    """The page as text; every value goes through autoescape."""
    grid_stages, grid = grid_rows(grid_folder(ctx), config.grid_columns)
    columns, table = score_rows(scores, stages) if scores["scores"] else ([], [])
    layouts, by_layout = layout_rows(scores, stages)
    lineage = lineage_rows(ctx.parents)
    text: str = template("report.html").render(
        config=config, judged="judge" in ctx.inputs, grid_stages=grid_stages, grid=grid, columns=columns, table=table, layouts=layouts,
        by_layout=by_layout, comparison=comparison_rows(ctx), guards=guard_rows(ctx, trained), prompts=prompt_rows(ctx),
        distribution=distribution_table(ctx),
        gates=scores.get("gates", []), calibration=scores.get("calibration", {}),
        collapse={stage: detail["collapse"] for stage, detail in scores.get("detail", {}).items()},
        curves=curves(ctx, trained), times=times_rows(ctx.parents), growth=training_grids(ctx, trained), funnel=funnel_rows(ctx.parents),
        data=data_part(config, ctx), truth=truth, lineage=lineage, exports=exports_of(ctx),
        seconds=sum(row["seconds"] for row in lineage), versions=versions(), provenance=provenance(ctx),
    )  # fmt: skip
    return text


def template(name: str) -> jinja2.Template:
    """A template of ours; whatever it is given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)


def planted_truth(ctx: StageContext) -> dict[str, Any]:
    """What curation caught of the planted defects; empty for data of one's own."""
    if "buckets" not in ctx.parents:
        return {}
    found: dict[str, Any] = ctx.parents["buckets"].facts.get("truth", {})
    return found


def curves(ctx: StageContext, trained: list[str]) -> list[Curve]:
    """Loss of every training stage that logged one, the student's where several networks train."""
    drawn = []
    for role in trained:
        rows = load_metrics(ctx.inputs[role] / "metrics.jsonl")
        drawn.append(curve(role, rows) or curve(role, rows, "student/loss"))
    return [line for line in drawn if line is not None]


def curves_picture(lines: list[Curve]) -> str:
    """The same as one SVG, small multiples, for documents."""
    across, down = WIDTH + 30, HEIGHT + 68
    cells = [{"line": line, "x": 15 + place % COLUMNS * across, "y": 10 + place // COLUMNS * down}
             for place, line in enumerate(lines)]  # fmt: skip
    rows = -(-len(lines) // COLUMNS)
    text: str = template("curves.svg").render(
        cells=cells, plot_width=WIDTH, plot_height=HEIGHT, width=COLUMNS * across, height=10 + rows * down
    )
    return text


def training_grids(ctx: StageContext, trained: list[str]) -> list[dict[str, Any]]:
    """The grids each stage drew while it trained, first to last."""
    found = []
    for role in trained:
        paths = sorted((ctx.inputs[role] / "grids").glob("*.png"))
        shown = [(path.stem, data_uri(path.read_bytes())) for path in paths if path.stat().st_size <= LARGEST_GRID]
        if shown:
            found.append({"stage": role, "grids": shown})
    return found


def exports_of(ctx: StageContext) -> list[str]:
    """Folders of the export stage, where it is an input."""
    folder = ctx.inputs.get("export")
    return [] if folder is None else sorted(path.name for path in folder.iterdir() if path.is_dir())


def provenance(ctx: StageContext) -> dict[str, Any]:
    """Machine and Python of the scores, or of the pictures where there are none."""
    asked = next((ctx.parents[role] for role in ("scores", "pictures") if role in ctx.parents), None)
    found: dict[str, Any] = {} if asked is None else asked.facts.get("provenance", {})
    return found
