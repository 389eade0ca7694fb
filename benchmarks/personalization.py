"""DreamBooth-LoRA: the new subject under a judge that knows it, and what the rest of the vocabulary lost.

bar: subject accuracy at least 0.6 (mean of three seeds) in at most 90 seconds, class accuracy lost below 10 %.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lifecycle_runs import SEEDS, lifecycle, made_in, mean, score
from benchmarks.record import record

STAGE, PARENT = "dreambooth-robot", "dpo"
BAR, LOSS, SECONDS = 0.6, 0.1, 90


def main() -> dict[str, Any]:
    """Read three lifecycles."""
    runs = [lifecycle(seed) for seed in SEEDS]
    subject = [score(run, STAGE, "subject_accuracy") for run in runs]
    before = [score(run, PARENT, "subject_accuracy") for run in runs]
    drift = [score(run, STAGE, "class_drift") for run in runs]
    seconds = [made_in(run, STAGE) for run in runs]
    met = mean(subject) >= BAR and max(drift) < LOSS and max(seconds) <= SECONDS
    return record("personalization", list(SEEDS), mean(subject), BAR, BAR, met,
                  {"subject_accuracy": subject, "before": before, "class_drift": drift, "seconds": seconds})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
