"""Pieces of the report that are numbers: scores with parents and floors, the funnel, lineage, time, versions."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_curation.config import CURATION
from infra.artifacts import Artifact
from infra.stages import StageContext
from tasks.report_parts import data_uri, shown

COLUMNS = {
    "prompt_accuracy": "prompt accuracy, strict",
    "prompt_accuracy_full": "full vocabulary",
    "prompt_accuracy_long": "long prompts",
    "object_accuracy": "objects",
    "shape_accuracy": "shapes",
    "layout_accuracy": "places",
    "colour_accuracy": "background",
    "reward": "reward",
    "kernel_distance": "kernel distance",
    "diversity": "diversity",
    "subject_accuracy": "subject",
    "subject_similarity": "subject similarity",
    "subject_kept": "subjects kept by the mix",
    "class_drift": "class drift",
}
BY_OTHERS = ("geneval", "hub_")  # scores by models of transformers, shown where they were asked
LESS_IS_BETTER = ("kernel_distance", "class_drift")
LARGEST_CELL = 160  # px; twice what the page shows of a picture
PACKAGES = ("torch", "diffusers", "transformers", "peft", "prefect", "ray", "numpy", "pyarrow", "pillow", "pydantic")


@dataclass(frozen=True)
class Cell:
    """One score as text: value, interval, change against the parent."""

    value: str
    interval: str
    n: int
    change: str = ""
    verdict: str = ""  # "better", "worse" or "" where the change is within noise
    floor: str = ""


def cell(
    metric: str, score: Mapping[str, Any], delta: Mapping[str, Any] | None, floor: Mapping[str, Any] | None
) -> Cell:
    """A score for the table; a change is called better or worse only when its interval leaves out zero."""
    change, verdict = "", ""
    if delta is not None:
        change = f"{delta['value'] + 0.0:+.3f}".replace("-0.000", "+0.000")
        if delta["low"] > 0 or delta["high"] < 0:
            rises = delta["low"] > 0
            verdict = "better" if rises != (metric in LESS_IS_BETTER) else "worse"
    return Cell(
        value=f"{score['value']:.3f}", interval=f"{score['low']:.3f} to {score['high']:.3f}", n=int(score["n"]),
        change=change, verdict=verdict, floor="" if floor is None else f"{floor['value']:.3f}",
    )  # fmt: skip


def score_rows(scores: Mapping[str, Any], stages: Sequence[str]) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Columns (metric, label) that any stage has, and one row per stage; the row of real pictures comes first."""
    per_stage: dict[str, Mapping[str, Any]] = {"real pictures": scores.get("real", {}), **scores.get("scores", {})}
    present = {metric for values in per_stage.values() for metric in values}
    columns = [(metric, label) for metric, label in COLUMNS.items() if metric in present]
    columns += [(metric, metric.replace("_", " ")) for metric in sorted(present) if metric.startswith(BY_OTHERS)]
    rows = []
    for stage in (*(("real pictures",) if "real" in scores else ()), *stages):
        values = per_stage.get(stage, {})
        deltas = scores.get("deltas", {}).get(stage, {})
        floor = values.get("kernel_distance_floor")
        cells = {
            metric: cell(metric, values[metric], deltas.get(metric), floor if metric == "kernel_distance" else None)
            for metric, _ in columns
            if metric in values
        }
        rows.append({"stage": stage, "parent": scores.get("parents", {}).get(stage), "cells": cells})
    return columns, rows


def layout_rows(scores: Mapping[str, Any], stages: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Strict accuracy by layout: shares to colour a table with."""
    merged = {
        stage: {
            name: score["value"]
            for part in scores["detail"][stage]["by_layout"].values()
            for name, score in part.items()
        }
        for stage in stages
        if stage in scores.get("detail", {})
    }
    layouts = sorted({name for values in merged.values() for name in values})
    return layouts, [{"stage": stage, "values": values} for stage, values in merged.items()]


def grid_rows(folder: Path, columns: tuple[str, ...] | None) -> tuple[list[str], list[dict[str, Any]]]:
    """The headline grid: stages as columns, prompts as rows; every cell a picture and, of a judge, whether it calls it right."""
    path = folder / "grid.json"
    if not path.exists():
        return [], []
    grid = json.loads(path.read_text())
    stages = [stage for stage in grid["stages"] if stage != "real" and (columns is None or stage in columns)]
    if columns is not None:
        stages.sort(key=columns.index)
    stages += [stage for stage in grid["stages"] if stage == "real"]
    held_out, rows = grid.get("held_out"), []
    for i, (prompt, seed) in enumerate(zip(grid["prompts"], grid["seeds"], strict=True)):
        cells = [
            {"stage": stage, "right": grid["right"][stage][i] if "right" in grid else None,
             "uri": shown((folder / "samples" / stage / f"{i}-{seed}.png").read_bytes(), LARGEST_CELL)}
            for stage in stages
        ]  # fmt: skip
        rows.append(
            {"prompt": prompt, "seed": seed, "cells": cells, "trained": held_out is not None and not held_out[i]}
        )
    return stages, rows


def funnel_rows(parents: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """What each curation stage received in the running and kept, with its own reasons."""
    rows: list[dict[str, Any]] = []
    before: dict[str, int] = {}
    for stage in CURATION:
        facts = parents[stage].facts if stage in parents else {}
        if "received" not in facts:
            continue
        reasons = {**facts.get("errors", {}), **facts.get("dropped", {})}
        if not facts.get("errors") and facts.get("errored"):
            reasons["error"] = facts["errored"]
        new = {name: count - before.get(name, 0) for name, count in reasons.items() if count != before.get(name, 0)}
        share = facts["kept"] / facts["received"] if facts["received"] else 0.0
        rows.append({"stage": stage, "received": facts["received"], "kept": facts["kept"], "share": share, "new": new})
        before = reasons
    return rows


def funnel_summary(parents: Mapping[str, Artifact]) -> dict[str, Any]:
    """Counts of the last curation stage; its manifest still has every row."""
    last = next((parents[name].facts for name in reversed(CURATION) if "received" in _facts(parents, name)), {})
    return {name: last[name] for name in ("received", "kept", "errored", "dropped") if name in last}


def _facts(parents: Mapping[str, Artifact], name: str) -> dict[str, Any]:
    return parents[name].facts if name in parents else {}


def lineage_rows(parents: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Every stage with its key, digest, the stages it was made from, time and memory."""
    names = {artifact.digest: role for role, artifact in parents.items()}
    seconds = {role: float(artifact.facts.get("seconds") or 0.0) for role, artifact in parents.items()}
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        {
            "name": artifact.stage, "key": artifact.uri.rstrip("/").rsplit("/", 1)[-1], "digest": artifact.digest,
            "made_from": [names.get(digest, digest[:12]) for digest in artifact.parents],
            "seconds": seconds[role], "share": seconds[role] / longest,
            "memory": (artifact.facts.get("peak_memory_bytes") or 0) / 2**20,
            "config": json.dumps(artifact.facts.get("config", {}), indent=1, sort_keys=True),
        }
        for role, artifact in sorted(parents.items(), key=lambda item: item[0] == "scores")  # scores come last
    ]  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the libraries that decide results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def comparison_rows(ctx: StageContext) -> list[dict[str, Any]]:
    """Teacher and students step by step, the most accurate first among equals in steps; empty without a comparison."""
    if "compare" not in ctx.inputs:
        return []
    found = json.loads((ctx.inputs["compare"] / "comparison.json").read_text())
    verdicts = {verdict["row"]: verdict["passed"] for verdict in found["verdicts"]}
    best = {f"{chosen['stage']}@{steps}" for steps, chosen in found["best"].items()}
    speed = ctx.parents["compare"].facts.get("speed_up", {})
    rows = []
    for label, row in found["rows"].items():
        rows.append({
            "stage": row["stage"], "method": row["method"], "steps": row["steps"], "calls": row["network_calls"],
            "basic": row["prompt_accuracy"]["value"], "full": row["prompt_accuracy_full"]["value"],
            "kept": found["ratios"][label], "distance": row["kernel_distance"]["value"],
            "diversity": row["diversity"]["value"], "high_frequencies": row["high_frequency_ratio"],
            "speed": {count: by_row.get(label) for count, by_row in speed.items()},
            "passed": verdicts.get(label), "best": label in best,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["stage"] != "teacher", row["steps"], -row["basic"] - row["full"]))


def guard_rows(ctx: StageContext, trained: Sequence[str]) -> list[dict[str, Any]]:
    """Every look of every guarded stage, and how its run went out."""
    rows = []
    for role in trained:
        path = ctx.inputs[role] / "guard.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        for look in found["looks"]:
            drift = None if None in look["drift"] else max(look["drift"])
            rows.append({**look, "stage": role, "drift": drift, "taken": look["step"] == found["taken"]})
        rows[-1]["reasons"] = found["reasons"]
    return rows


def prompt_rows(ctx: StageContext) -> dict[str, Any]:
    """What rewriting prompts did: scores as typed and as rewritten, and the prompts whose pictures were kept."""
    folder = ctx.inputs.get("prompts")
    if folder is None:
        return {}
    record = json.loads((folder / "prompts.json").read_text())
    rows = []
    for i, row in enumerate(record["rows"]):
        paths = {name: folder / name / f"{i}.png" for name in ("typed", "rewritten")}
        if all(path.exists() for path in paths.values()):
            rows.append(row | {"pictures": {name: data_uri(path.read_bytes()) for name, path in paths.items()}})
    return {"scores": record["scores"], "rows": rows}


def distribution_table(ctx: StageContext) -> dict[str, Any]:
    """Every checkpoint's distances to held-out pictures, real ones first, and the pictures nearest to training ones."""
    folder = ctx.inputs.get("distribution")
    if folder is None:
        return {}
    record: dict[str, Any] = json.loads((folder / "distribution.json").read_text())
    columns = list(dict.fromkeys(name for scores in record["scores"].values() for name in scores))
    stages = [stage for stage in ("real", *ctx.inputs) if stage in record["scores"]]
    nearest = {path.stem.removeprefix("nearest-"): data_uri(path.read_bytes()) for path in sorted(folder.glob("*.png"))}
    return record | {"columns": columns, "stages": stages, "nearest": nearest}
