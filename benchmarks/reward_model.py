"""The reward model under planted noise: agreement with noisy held-out labels over what a reader of the true utility would reach.

Pairs: best and worst of four pictures of a finished demo's `sft` under its colour judge (`T2I_DEMO_RECORD`), every published scene asked
twice. The planted utility is the mean log-likelihood of three colour judges that differ in their seed, the demo's among them: what one
network sees alone is its own noise, which no other reader can know. Labels of the demo's judge alone are told beside, with one seed.
A label is drawn with sigmoid(strength / SCALE); the limit is the mean of max(p, 1 - p) over the reported pairs. Three seeds of split,
labels and training; prompts are split, so no prompt is on both sides.

value: mean share of the limit; peer: 1; bar .9, for every seed. Stages are kept under runs/preference-benchmark.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from benchmarks.lifecycle_runs import SEEDS, mean
from benchmarks.preference import OTHER_SEED, PRESETS, demo_stages, made, stage
from benchmarks.record import record
from data_curation import scenes as demo
from flows.dag import seeded
from infra.stages import StageContext
from models.engine.distribute import one_thread
from models.evaluation.judge import Judge
from models.posttraining.config import PairsConfig, RewardModelConfig
from models.posttraining.preference_pairs import PICTURES, TABLE, TRAIN, PreferencePairs, write_pairs
from models.posttraining.reward import judge_reward
from tasks.judge import train_judge
from tasks.preference import make_pairs
from tasks.reward_model import reward_model

log = logging.getLogger(__name__)
BAR, SCALE, PROMPTS, THIRD_SEED = 0.9, 0.07, 6628, 2
CONFIG = RewardModelConfig(label_scale=SCALE, near=16)


def agreed(config: PairsConfig, ctx: StageContext) -> dict[str, Any]:
    """The same pairs ordered by the mean reward of all judges among the inputs; ties dropped."""
    folder = ctx.inputs["pairs"]
    table, pictures = pq.read_table(folder / TABLE).to_pydict(), load_file(folder / PICTURES)
    known = {scene.id: scene for scene in demo.all_scenes("full")}
    scenes = [known[name] for name in table["scene"]]
    judges = [Judge.load(path) for role, path in ctx.inputs.items() if role != "pairs"]
    gaps = np.mean([judge_reward(judge, pictures["winner"], scenes) - judge_reward(judge, pictures["loser"], scenes)
                    for judge in judges], axis=0)  # fmt: skip
    kept, turned = np.flatnonzero(np.abs(gaps) > config.min_gap), (gaps < 0)[:, None, None, None]
    winner, loser = (np.where(turned, pictures[b], pictures[a])[kept] for a, b in (("winner", "loser"), ("loser", "winner")))  # fmt: skip
    prompts = tuple(table["prompt"][row] for row in kept)
    count = len(kept)
    write_pairs(PreferencePairs(prompts, winner, loser, ("judges",) * count, np.abs(gaps[kept]), (TRAIN,) * count), ctx.out)  # fmt: skip
    return {"pairs": count, "ties": len(gaps) - count, "turned": int((gaps[kept] < 0).sum())}


def main() -> dict[str, Any]:
    """Make the pairs once, train with every seed."""
    entries = demo_stages()
    data, judge = entries["encode"], entries["judge"]
    pairs = PRESETS.posttrain.pairs.model_copy(update={"prompts": PROMPTS})
    others = {"other": OTHER_SEED, "third": THIRD_SEED}
    with one_thread():
        for name, seed in others.items():
            stage(name, train_judge, PRESETS.judge.model_copy(update={"seed": seed}))
        asked = stage("reward-pairs", make_pairs, pairs, init=entries["sft"], data=data, judge=judge)["facts"]
        own, judges = made("reward-pairs"), {"judge": judge, **{name: made(name) for name in others}}
        told = stage("reward-agreed", agreed, pairs, pairs=own, **judges)["facts"]
        found = [trained(f"reward-{seed}", seed, data, made("reward-agreed")) for seed in SEEDS]
        alone = trained("reward-alone", SEEDS[0], data, own)
    shares = [each["share_of_limit"] for each in found]
    detail = {"asked": asked, "agreed": told, "seeds": found, "labels of one judge": alone}
    return record("reward_model", list(SEEDS), mean(shares), 1.0, BAR, min(shares) >= BAR, detail)


def trained(name: str, seed: int, data: Path, pairs: Path) -> dict[str, Any]:
    """What one reward model is worth, and its CPU seconds."""
    done = stage(name, reward_model, seeded(CONFIG, seed), data=data, pairs=pairs)
    facts: dict[str, Any] = {**done["facts"], "cpu": done["cpu"]}
    log.info("%s: %.3f of the limit %.3f", name, facts["share_of_limit"], facts["bayes_limit"])
    return facts


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(main()))
