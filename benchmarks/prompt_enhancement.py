"""Short prompts as typed and as the prompt enhancer rewrites them, with the same noise, judged by what was typed; three seeds.

The checkpoint that draws is a finished demo's `dpo`, or its `sft` where the record (`T2I_DEMO_RECORD`) has no other. Every seed
trains an enhancer of its own on the demo's captions; all are asked the same 240 short prompts, none of which has the form of a
training caption. Protected spans are counted in rewritten prompts only: a prompt that comes back as typed has lost nothing.
Stages are kept under runs/preference-benchmark. Intervals: 95 %, prompts resampled, the same in all seeds and both columns.

value: mean accuracy as rewritten; peer: as typed. bars: the interval of the paired difference lies above 0, for the mean and for
every seed; every protected span comes back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lifecycle_runs import SEEDS
from benchmarks.preference import demo_stages, figure, gain, interval, made, stage
from benchmarks.record import record
from flows.dag import seeded
from models.posttraining.config import PromptCheckConfig, PromptEnhancerConfig
from tasks.enhance import prompt_enhancer
from tasks.prompt_check import prompt_check

log = logging.getLogger(__name__)
CONFIG, CHECK = PromptEnhancerConfig(check=None), PromptCheckConfig(prompts=240)
DRAWS = ("dpo", "sft")  # the first of these that the demo has


def drawing(entries: Mapping[str, Path]) -> tuple[str, Path]:
    """Name and folder of the checkpoint that draws."""
    name = next((name for name in DRAWS if name in entries), None)
    if name is None:
        raise SystemExit(
            f"the demo's record has none of the stages {DRAWS}, only {sorted(entries)}; run it up to its sft"
        )
    return name, entries[name]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What a check wrote of every prompt."""
    rows: list[dict[str, Any]] = json.loads((folder / "prompts.json").read_text())["rows"]
    return rows


def table(checks: Sequence[Sequence[Mapping[str, Any]]], name: str) -> np.ndarray:
    """Right or not as `typed` or `rewritten` [seeds, prompts]; refused where seeds were asked different prompts."""
    asked = [[row["original"] for row in rows] for rows in checks]
    assert all(each == asked[0] for each in asked)
    return np.array([[row["right"][name] for row in rows] for rows in checks], dtype=np.float64)


def told_of(facts: Sequence[Mapping[str, Any]], checks: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Every seed's figures, and the mean of the seeds with its interval."""
    typed, rewritten = table(checks, "typed"), table(checks, "rewritten")
    seeds = [
        {"typed": float(before.mean()), "rewritten": float(after.mean()), "difference": interval(gain, after[None], before[None]),
         "rewritten_prompts": each["rewritten"], "protected": each["protected"], "protected_kept": each["protected_kept"],
         "by_kind": each["by_kind"]}
        for each, before, after in zip(facts, typed, rewritten, strict=True)
    ]  # fmt: skip
    return {"typed": float(typed.mean()), "rewritten": float(rewritten.mean()),
            "difference": interval(gain, rewritten, typed), "seeds": seeds}  # fmt: skip


def figures_of(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bars: a difference counts by the lower end of its interval."""
    spans, kept = (sum(each[name] for each in told["seeds"]) for name in ("protected", "protected_kept"))
    every = {"all_seeds": told, **{f"seed_{seed}": each for seed, each in zip(SEEDS, told["seeds"], strict=True)}}
    found = [
        figure(f"difference_{name}", each["difference"]["value"], 0.0, each["difference"]["low"] > 0)
        for name, each in every.items()
    ]
    return [*found, figure("protected_spans_kept", kept / spans if spans else 0.0, 1.0, kept == spans > 0)]


def main() -> dict[str, Any]:
    """Train an enhancer with every seed, draw and judge."""
    entries, facts, checks = demo_stages(), list[dict[str, Any]](), list[list[dict[str, Any]]]()
    name, checkpoint = drawing(entries)
    for seed in SEEDS:
        stage(f"enhancer-{seed}", prompt_enhancer, seeded(CONFIG, seed), data=entries["encode"])
        inputs = {"init": checkpoint, "enhancer": made(f"enhancer-{seed}"), "judge": entries["judge"]}
        facts.append(stage(f"enhancer-check-{seed}", prompt_check, CHECK, **inputs)["facts"])
        checks.append(rows_of(made(f"enhancer-check-{seed}")))
        log.info("seed %d: %s", seed, facts[-1]["difference"])
    told = told_of(facts, checks)
    figures = figures_of(told)
    detail = {"figures": figures, "prompts": CHECK.prompts, "drawn_by": name, **told}
    met = all(each["met"] for each in figures)
    return record("prompt_enhancement", list(SEEDS), told["rewritten"], told["typed"], told["typed"], met, detail)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(main()))
