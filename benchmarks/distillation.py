"""The one-step student without guidance against its teacher (8 steps, guided) on the same prompts and noise.

value: mean of three seeds of student / teacher accuracy; bar 0.92 after at most 180 seconds of distillation.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lifecycle_runs import SEEDS, lifecycle, made_in, mean, score
from benchmarks.record import record

BAR, SECONDS = 0.92, 180


def main() -> dict[str, Any]:
    """Read three lifecycles."""
    runs = [lifecycle(seed) for seed in SEEDS]
    teacher = [score(run, "dpo", "prompt_accuracy") for run in runs]
    students = {name: [score(run, name, "prompt_accuracy") for run in runs] for name in ("distill-1", "distill-4")}
    kept = {name: [s / t for s, t in zip(values, teacher, strict=True)] for name, values in students.items()}
    seconds = [made_in(run, "distill-1") for run in runs]
    met = mean(kept["distill-1"]) >= BAR and max(seconds) <= SECONDS
    return record("distillation", list(SEEDS), mean(students["distill-1"]), mean(teacher), BAR, met,
                  {"teacher": teacher, "students": students, "kept": kept, "seconds": seconds})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
