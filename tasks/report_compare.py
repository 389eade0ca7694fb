"""Two runs on one page: what was set differently, and what became of it. As inert and self-contained as the report.

The interval of a difference is made from both intervals (MOVER: Zou & Donner 2008, Statist. Med. 27:1693), as if the two
were measured on different prompts; on the same prompts, as here, the true interval is narrower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.artifacts import Artifact
from infra.errors import ConfigError
from infra.storage import Store
from tasks.report import template
from tasks.report_parts import curve, data_uri
from tasks.report_tables import COLUMNS, LESS_IS_BETTER, funnel_rows

MAX_MEGABYTES = 10.0
NOT_COMPARED = "run"  # where and how wide it ran changes no result


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    name: str
    record: Mapping[str, Any]
    artifacts: Mapping[str, Artifact]  # by stage
    store: Store

    @classmethod
    def of(cls, store: Store, run: str) -> Side:
        """A recorded run with what is still in the store of it."""
        record = store.read_run(run)
        found = {e["name"]: store.find(e["name"], e["key"]) for e in record["stages"] if e.get("digest")}
        return cls(record["run"], record, {name: each for name, each in found.items() if each is not None}, store)

    @property
    def commit(self) -> str:
        """The commit of the code that made its last stage."""
        code = [a.facts.get("provenance", {}).get("code", {}).get("commit") for a in self.artifacts.values()]
        return str(next((commit for commit in reversed(code) if commit), "not recorded"))[:12]

    def scores(self) -> dict[str, dict[str, Any]]:
        """Stage -> metric -> value with interval, real pictures among them."""
        folder = self.evaluation()
        if folder is None:
            return {}
        found = json.loads((folder / "scores.json").read_text())
        ordered = [stage for stage in self.artifacts if stage in found["scores"]]
        return {"real pictures": found.get("real", {}), **{stage: found["scores"][stage] for stage in ordered}}

    def evaluation(self) -> Path | None:
        """Folder of the scores and the grid."""
        return self.store.local(self.artifacts["evaluate"]) if "evaluate" in self.artifacts else None

    def metrics(self, stage: str) -> list[dict[str, float]]:
        """What a training stage logged."""
        artifact = self.artifacts.get(stage)
        if artifact is None or all(entry.path != "metrics.jsonl" for entry in self.store.listing(artifact)):
            return []
        return [json.loads(line) for line in self.store.read(artifact, "metrics.jsonl").splitlines() if line]


def compare_page(a: Side, b: Side) -> str:
    """The page as text; every value goes through autoescape."""
    stages, grid, missing = grid_pairs(a, b)
    columns, table = score_pairs(a.scores(), b.scores())
    page: str = template("compare.html").render(
        a=a, b=b, changes=config_changes(a.record.get("config", {}), b.record.get("config", {})), results=results(a, b),
        grid_stages=stages, grid=grid, missing=missing, columns=columns, table=table, curves=curve_pairs(a, b),
        funnel=funnel_pairs(a, b),
    )  # fmt: skip
    size = len(page.encode()) / 1e6
    if size > MAX_MEGABYTES:
        raise ConfigError(f"the page has {size:.1f} MB, the limit is {MAX_MEGABYTES:g}; lower evaluate.grid_prompts")
    return page


def config_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every value that differs, by its path; what stands in one run only is empty in the other."""
    flat_a, flat_b = ({k: v for k, v in _flat(c) if k.split(".")[0] != NOT_COMPARED} for c in (a, b))
    paths = [*flat_a, *(path for path in flat_b if path not in flat_a)]
    changed = [path for path in paths if flat_a.get(path) != flat_b.get(path)]
    return [{"path": path, "a": flat_a.get(path, ""), "b": flat_b.get(path, "")} for path in changed]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Leaves by path; entries of a list go by their name where they have one, so that an added stage moves none."""
    match value:
        case dict() if value:
            return [leaf for name, each in value.items() for leaf in _flat(each, f"{path}.{name}" if path else name)]
        case list() if value and all(isinstance(each, dict) for each in value):
            named = [(str(each.get("name", number)), each) for number, each in enumerate(value)]
            return [leaf for name, each in named for leaf in _flat(each, f"{path}[{name}]")]
        case _:
            return [(path, json.dumps(value))]


def results(a: Side, b: Side) -> list[dict[str, Any]]:
    """Stage by stage: whether both runs have the same bytes, and the seconds each took to make."""
    names = [*a.artifacts, *(name for name in b.artifacts if name not in a.artifacts)]
    pairs = [(name, a.artifacts.get(name), b.artifacts.get(name)) for name in names]
    return [
        {
            "stage": name, "same": None if x is None or y is None else x.digest == y.digest,
            "only": b.name if x is None else a.name if y is None else "",
            "seconds": [None if each is None else each.facts.get("seconds") for each in (x, y)],
        }
        for name, x, y in pairs
    ]  # fmt: skip


def score_pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Columns (metric, label) that both runs have, and one row per common stage with both values and their difference."""
    stages = [stage for stage in a if stage in b]
    present = {metric for stage in stages for metric in a[stage] if metric in b[stage]}
    columns = [(metric, label) for metric, label in COLUMNS.items() if metric in present]
    rows = [
        {"stage": stage, "cells": {m: difference(m, a[stage][m], b[stage][m]) for m, _ in columns if m in a[stage] and m in b[stage]}}
        for stage in stages
    ]  # fmt: skip
    return columns, rows


def difference(metric: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """b - a with its 95 % interval; better or worse only where that leaves out zero."""
    gap = b["value"] - a["value"]
    low = gap - math.hypot(b["value"] - b["low"], a["high"] - a["value"])
    high = gap + math.hypot(b["high"] - b["value"], a["value"] - a["low"])
    sure = low > 0 or high < 0
    verdict = "" if not sure else "better" if (low > 0) != (metric in LESS_IS_BETTER) else "worse"
    return {"a": a, "b": b, "value": gap, "low": low, "high": high, "verdict": verdict}


def grid_pairs(a: Side, b: Side) -> tuple[list[str], list[dict[str, Any]], int]:
    """Stages, one row per prompt and seed that both grids have, and how many of either have no counterpart."""
    drawn = [_grid(side) for side in (a, b)]
    if any(not pictures for _, pictures in drawn):
        return [], [], 0
    (stages_a, pictures_a), (stages_b, pictures_b) = drawn
    stages = [*(s for s in stages_a if s != "real"), *(s for s in stages_b if s not in stages_a)]
    asked_a, asked_b = ({(prompt, seed): None for _, prompt, seed in found} for _, found in drawn)
    rows = [
        {
            "prompt": prompt, "seed": seed,
            "cells": [[each.get((stage, prompt, seed)) for each in (pictures_a, pictures_b)] for stage in stages],
        }
        for prompt, seed in asked_a
        if (prompt, seed) in asked_b
    ]  # fmt: skip
    return stages, rows, len(asked_a) + len(asked_b) - 2 * len(rows)


def _grid(side: Side) -> tuple[list[str], dict[tuple[str, str, int], dict[str, Any]]]:
    """Stages and (stage, prompt, seed) -> picture and whether it is right."""
    folder = side.evaluation()
    if folder is None or not (folder / "grid.json").exists():
        return [], {}
    grid = json.loads((folder / "grid.json").read_text())
    pictures = {}
    for stage in grid["stages"]:
        for i, (prompt, seed) in enumerate(zip(grid["prompts"], grid["seeds"], strict=True)):
            uri = data_uri((folder / "samples" / stage / f"{i}-{seed}.png").read_bytes())
            pictures[stage, prompt, seed] = {"uri": uri, "right": grid["right"][stage][i]}
    return grid["stages"], pictures


def curve_pairs(a: Side, b: Side) -> list[dict[str, Any]]:
    """Loss of every training stage of both runs on the same axes."""
    names = [*a.artifacts, *(name for name in b.artifacts if name not in a.artifacts)]
    pairs = []
    for name in names:
        rows_a, rows_b = a.metrics(name), b.metrics(name)
        lines = [curve(name, rows_a, beside=rows_b), curve(name, rows_b, beside=rows_a)]
        axes = next((line for line in lines if line is not None), None)
        if axes is not None:
            pairs.append({"name": name, "axes": axes, "lines": lines})
    return pairs


def funnel_pairs(a: Side, b: Side) -> list[dict[str, Any]]:
    """What each curation stage kept in both runs, and the reasons whose counts differ."""
    found = [{row["stage"]: row for row in funnel_rows(side.artifacts)} for side in (a, b)]
    rows = []
    for stage in [*found[0], *(name for name in found[1] if name not in found[0])]:
        pair = [each.get(stage) for each in found]
        counts = [{} if row is None else row["new"] for row in pair]
        reasons = [*counts[0], *(reason for reason in counts[1] if reason not in counts[0])]
        changed = [(reason, *(each.get(reason, 0) for each in counts)) for reason in reasons]
        rows.append({"stage": stage, "pair": pair, "changed": [each for each in changed if each[1] != each[2]]})
    return rows
