"""The reward model under planted noise: agreement with noisy held-out labels over what a reader of the true utility would reach.

Pairs: best and worst of four pictures of a finished demo's `sft` under its colour judge (`T2I_DEMO_RECORD`), every published scene asked
twice. A label is drawn with sigmoid(strength / SCALE), about what a second judge disagrees by; the limit is the mean of max(p, 1 - p)
over the reported pairs. Three seeds of split, labels and training; prompts are split, so no prompt is on both sides.

value: mean share of the limit; peer: 1; bar .9. Stages are kept under runs/preference-benchmark.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from benchmarks.lifecycle_runs import SEEDS, mean
from benchmarks.preference import PRESETS, demo_stages, made, stage
from benchmarks.record import record
from flows.dag import seeded
from models.engine.distribute import one_thread
from models.posttraining.config import RewardModelConfig
from tasks.preference import make_pairs
from tasks.reward_model import reward_model

log = logging.getLogger(__name__)
BAR, SCALE, PROMPTS = 0.9, 0.07, 6628
CONFIG = RewardModelConfig(label_scale=SCALE, near=16)


def main() -> dict[str, Any]:
    """Make the pairs once, train with every seed."""
    entries, found = demo_stages(), list[dict[str, Any]]()
    data, judge = entries["encode"], entries["judge"]
    pairs = PRESETS.posttrain.pairs.model_copy(update={"prompts": PROMPTS})
    with one_thread():
        made_pairs = stage("reward-pairs", make_pairs, pairs, init=entries["sft"], data=data, judge=judge)
        for seed in SEEDS:
            name, config = f"reward-{seed}", seeded(CONFIG, seed)
            found.append(stage(name, reward_model, config, data=data, pairs=made("reward-pairs")))
            facts = found[-1]["facts"]
            log.info("%s: %.3f of the limit %.3f", name, facts["share_of_limit"], facts["bayes_limit"])
    shares = [each["facts"]["share_of_limit"] for each in found]
    told = {"pairs": made_pairs, "seeds": [{**each["facts"], "cpu": each["cpu"]} for each in found]}
    return record("reward_model", list(SEEDS), mean(shares), 1.0, BAR, min(shares) >= BAR, told)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(main()))
