"""Diffusion-DPO against the checkpoint it started from, and SFT against its own, paired on prompts and noise.

value: gain in reward of DPO on the full vocabulary, mean of three seeds; bar: above 0 with accuracy not lower by more than 2 points, and SFT
raising the accuracy on long prompts.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lifecycle_runs import SEEDS, lifecycle, mean, score
from benchmarks.record import record

DROP = 0.02


def gains(stage: str, parent: str, metric: str) -> list[float]:
    """Stage minus parent, per seed."""
    return [score(run, stage, metric) - score(run, parent, metric) for run in map(lifecycle, SEEDS)]


def main() -> dict[str, Any]:
    """Read three lifecycles."""
    reward, accuracy = gains("dpo", "sft", "reward_full"), gains("dpo", "sft", "prompt_accuracy")
    long = gains("sft", "continue", "prompt_accuracy_long")
    met = mean(reward) > 0 and mean(accuracy) >= -DROP and mean(long) > 0
    return record("preference", list(SEEDS), mean(reward), 1.0, 0.0, met,
                  {"reward_gain": reward, "accuracy_gain": accuracy, "sft_long_gain": long})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
