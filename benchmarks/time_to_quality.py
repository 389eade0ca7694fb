"""Pre-training from scratch: strict accuracy on held-out compositions, as the mean of three seeds, and what it took.

bar: mean at least 0.92, none below 0.85, within 480 seconds.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lifecycle_runs import PRETRAINING, SEEDS, made_in, mean, pretraining, score
from benchmarks.record import record

BAR, FLOOR, SECONDS = 0.92, 0.85, 480


def main() -> dict[str, Any]:
    """Pre-train three times and judge the last checkpoint."""
    runs = [pretraining(seed) for seed in SEEDS]
    basic = [score(run, PRETRAINING[-1], "prompt_accuracy") for run in runs]
    full = [score(run, PRETRAINING[-1], "prompt_accuracy_full") for run in runs]
    seconds = [made_in(run, *PRETRAINING) for run in runs]
    met = mean(basic) >= BAR and min(basic) >= FLOOR and max(seconds) <= SECONDS
    counted = runs[0]["scores"][PRETRAINING[-1]]["prompt_accuracy"]["n"]
    return record("time_to_quality", list(SEEDS), mean(basic), BAR, BAR, met,
                  {"prompt_accuracy": basic, "prompt_accuracy_full": full, "seconds": seconds, "n": counted})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
