"""The one-step student without guidance against its teacher (8 steps, guided) on the same prompts and noise.

value: mean of three seeds of student / teacher accuracy; bar 0.92 after at most 180 seconds of distillation.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lifecycle_runs import SEEDS, made_in, mean, score
from benchmarks.record import record

BAR, SECONDS = 0.92, 180


def main() -> dict[str, Any]:
    """Read three lifecycles."""
    teacher = [score(seed, "dpo", "prompt_accuracy") for seed in SEEDS]
    students = {name: [score(seed, name, "prompt_accuracy") for seed in SEEDS] for name in ("distill-1", "distill-4")}
    kept = {name: [s / t for s, t in zip(values, teacher, strict=True)] for name, values in students.items()}
    seconds = [made_in(seed, "distill-1") for seed in SEEDS]
    met = mean(kept["distill-1"]) >= BAR and max(seconds) <= SECONDS
    return record("distillation", list(SEEDS), mean(students["distill-1"]), mean(teacher), BAR, met,
                  {"teacher": teacher, "students": students, "kept": kept, "seconds": seconds})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
