"""Pre-training from scratch: strict accuracy on held-out compositions, as the mean of three seeds, and what it took.

bar: mean at least 0.92, none below 0.85, within 480 seconds.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lifecycle_runs import SEEDS, lifecycle, made_in, mean, score
from benchmarks.record import record

STAGES = ("pretrain-32", "pretrain-40")
BAR, FLOOR, SECONDS = 0.92, 0.85, 480


def main() -> dict[str, Any]:
    """Read three lifecycles."""
    basic = [score(seed, STAGES[-1], "prompt_accuracy") for seed in SEEDS]
    full = [score(seed, STAGES[-1], "prompt_accuracy_full") for seed in SEEDS]
    seconds = [made_in(seed, *STAGES) for seed in SEEDS]
    met = mean(basic) >= BAR and min(basic) >= FLOOR and max(seconds) <= SECONDS
    counted = lifecycle(SEEDS[0])["scores"][STAGES[-1]]["prompt_accuracy"]["n"]
    return record("time_to_quality", list(SEEDS), mean(basic), BAR, BAR, met,
                  {"prompt_accuracy": basic, "prompt_accuracy_full": full, "seconds": seconds, "n": counted})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
