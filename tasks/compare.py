"""Stage `compare`: every student against its teacher at the same number of steps, on the same prompts and noise.

A student passes when it is right more often than the guided teacher at the same number of steps (or equally often at a
smaller kernel distance); at the number of steps it was made for that is its gate. The best at each number of steps is
named in best.json, with whether it passed, and the export gives it away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import GateFailed
from infra.stages import StageContext
from models.distillation.grid import sub_grids
from models.engine.distribute import one_thread
from models.evaluation.gates import paired_difference
from models.evaluation.judge import SIDE, Judge
from models.networks.checkpoint import read_card
from models.sampling.generate import load_generator
from tasks.compare_scores import Measured, Yardstick, measure, time_row
from tasks.config import CompareConfig
from tasks.evaluate_prompts import Prompts, prompt_set, several_seeds

TEACHER = "teacher"


@dataclass(frozen=True)
class Row:
    """One checkpoint at one number of steps."""

    stage: str
    steps: int
    folder: Path
    guidance: float
    own: bool  # the number of steps the student was made for, at which its gate stands

    @property
    def label(self) -> str:
        """Name in the table."""
        return f"{self.stage}@{self.steps}"

    @property
    def calls(self) -> int:
        """Network calls a picture takes; guidance doubles them."""
        return self.steps * (2 if self.guidance > 1 else 1)


@dataclass(frozen=True)
class Drawing:
    """One row and one list of prompts."""

    row: Row
    name: str
    prompts: Prompts
    batch_size: int


def draw(job: Drawing) -> np.ndarray:
    """Pictures uint8 [N, 32, 32, 3], on one thread so that they do not depend on the machine's cores."""
    with one_thread():
        generator = load_generator(job.row.folder)
        return generator.sample(
            job.prompts.texts, job.prompts.seeds, width=SIDE, height=SIDE, steps=job.row.steps,
            guidance=job.row.guidance, batch_size=job.batch_size,
        )  # fmt: skip


def rows_of(config: CompareConfig, ctx: StageContext) -> list[Row]:
    """The teacher at its step counts, each student at those it was trained for."""
    rows = [Row(TEACHER, n, ctx.inputs[TEACHER], config.guidance, False) for n in config.teacher_steps]
    for stage, folder in ctx.inputs.items():
        if stage in ("judge", TEACHER):
            continue
        card = read_card(folder)
        trained = card.trained_steps or sub_grids(card.steps)
        rows += [Row(stage, n, folder, 1.0, n == card.steps) for n in config.student_steps if n in trained]
    return rows


def compare(config: CompareConfig, ctx: StageContext) -> dict[str, Any]:
    """comparison.json with every row, its gate and the best student; best.json for the export."""
    judge, rows = Judge.load(ctx.inputs["judge"]), rows_of(config, ctx)
    lists = {
        "basic": prompt_set("held_out_basic", config.basic_prompts, config.seed),
        "full": prompt_set("held_out_full", config.full_prompts, config.seed),
        "several": several_seeds(config.diversity_prompts, config.diversity_seeds, config.seed),
    }
    jobs = [Drawing(row, name, prompts, config.batch_size) for row in rows for name, prompts in lists.items()]
    jobs.sort(key=lambda job: -len(job.prompts) * job.row.calls)
    pictures: dict[str, dict[str, np.ndarray]] = {row.label: {} for row in rows}
    for job, images in zip(jobs, ctx.fan_out(draw, jobs), strict=True):
        pictures[job.row.label][job.name] = images
    yardstick = Yardstick.of(judge, lists["basic"], config)
    measured = {label: measure(judge, yardstick, lists, drawn, config) for label, drawn in pictures.items()}
    verdicts = against_teacher(rows, measured, config.tolerance)
    gates = [verdict for verdict in verdicts if verdict["own"]]
    best = best_students(rows, measured, verdicts)
    top = f"{TEACHER}@{max(config.teacher_steps)}"
    ratios = {label: against(measured[label], measured[top]) for label in measured}
    record = {"rows": table(rows, measured), "verdicts": verdicts, "best": best, "reference": top, "ratios": ratios,
              "floor": yardstick.floor}  # fmt: skip
    (ctx.out / "comparison.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    (ctx.out / "best.json").write_text(json.dumps(best, indent=1, sort_keys=True) + "\n")
    missed = [f"{v['row']}: {v['reason']}" for v in gates if not v["passed"]]
    if config.strict_gate and missed:
        raise GateFailed(
            f"{len(missed)} student(s) do not beat their teacher: {'; '.join(missed)}; see comparison.json"
        )
    with one_thread():
        latency = {
            str(count): {
                row.label: time_row(row.folder, row.steps, row.guidance, lists["basic"], count, config.latency_rounds)
                for row in rows
            }
            for count in config.latency_batches
        }
    speed = {count: {label: share(found[top]["denoise"]["p50"], own["denoise"]["p50"]) for label, own in found.items()}
             for count, found in latency.items()}  # fmt: skip
    return {"best": best, "gates": gates, "ratios": ratios, "latency": latency, "speed_up": speed,
            "training": costs(rows, ctx), "rows": len(rows)}  # fmt: skip


def costs(rows: list[Row], ctx: StageContext) -> dict[str, dict[str, Any]]:
    """What each checkpoint's training took: a fact, like all that is timed, and no part of the result's digest."""
    facts = {row.stage: ctx.parents[row.stage].facts for row in rows}
    return {stage: {k: f[k] for k in ("seconds", "samples", "steps") if k in f} for stage, f in facts.items()}


def table(rows: list[Row], measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """One record a row."""
    return {
        row.label: {
            "stage": row.stage, "steps": row.steps, "guidance": row.guidance, "network_calls": row.calls,
            "method": read_card(row.folder).method, **measured[row.label].scores,
        }
        for row in rows
    }  # fmt: skip


def against_teacher(rows: list[Row], measured: Mapping[str, Measured], tolerance: float = 0.0) -> list[dict[str, Any]]:
    """Does each student beat the teacher at the same number of steps."""
    verdicts = []
    for row in rows:
        other = f"{TEACHER}@{row.steps}"
        if row.stage == TEACHER or other not in measured:
            continue
        own, its = measured[row.label], measured[other]
        difference = paired_difference(own.right, its.right)
        gain = own.accuracy - its.accuracy
        passed = gain > -tolerance or (gain == -tolerance and own.distance < its.distance)
        reason = f"{own.accuracy:.3f} against {its.accuracy:.3f} of the teacher at {row.steps} step(s)"
        verdicts.append({"row": row.label, "stage": row.stage, "metric": f"accuracy_at_{row.steps}", "steps": row.steps,
                         "own": row.own, "passed": bool(passed), "value": round(own.accuracy, 5), "reason": reason,
                         "difference": difference})  # fmt: skip
    return verdicts


def best_students(
    rows: list[Row], measured: Mapping[str, Measured], verdicts: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Step count -> the student that is right most often, of those that passed if any did."""
    passed = {verdict["row"] for verdict in verdicts if verdict["passed"]}
    best: dict[str, dict[str, Any]] = {}
    students = [row for row in rows if row.stage != TEACHER]
    for steps in sorted({row.steps for row in students}):
        at = [row for row in students if row.steps == steps]
        able = [row for row in at if row.label in passed] or at
        top = max(able, key=lambda row: (measured[row.label].accuracy, -measured[row.label].distance))
        accuracy = round(measured[top.label].accuracy, 5)
        best[str(steps)] = {"stage": top.stage, "accuracy": accuracy, "passed": top.label in passed}
    return best


def against(own: Measured, top: Measured) -> dict[str, float | None]:
    """Shares of the reference row's accuracies, and how the distances compare."""
    keys = {
        "basic": "prompt_accuracy",
        "full": "prompt_accuracy_full",
        "diversity": "diversity",
        "distance": "kernel_distance",
    }
    return {name: share(own.scores[key]["value"], top.scores[key]["value"]) for name, key in keys.items()}


def share(value: float, base: float) -> float | None:
    """value / base, or None where the base is not positive (an unbiased distance may be)."""
    return round(value / base, 4) if base > 0 else None
