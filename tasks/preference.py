"""Stage functions of preference tuning: make pairs from the model's own pictures, tune on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_curation import scenes as demo
from data_curation.dataset import Batch as Rows
from data_curation.preference_table import read_comparisons
from infra.arrays import save_arrays
from infra.errors import ConfigError, DataRefused
from infra.stages import StageContext
from models.engine.config import TrainConfig
from models.engine.distribute import one_thread, world
from models.engine.loop import Trainer
from models.engine.objective import Batch
from models.engine.randomness import derive_seed, shuffled
from models.evaluation.judge import Judge
from models.networks import families
from models.networks.checkpoint import read_card
from models.networks.denoiser import Denoiser
from models.networks.text_features import warn_of_cut
from models.posttraining.clip_reward import hub_scores
from models.posttraining.config import DpoConfig, ImportPairsConfig, PairsConfig
from models.posttraining.diffusion_dpo import FELL_ROWS, DiffusionDpo, winners_fell
from models.posttraining.guard_config import GuardConfig
from models.posttraining.guards import Guard
from models.posttraining.preference_pairs import TRAIN, PreferencePairs, read_pairs, split_of, write_pairs
from models.posttraining.reward import JudgeReward, Reward, Sharpness, judge_reward
from models.sampling.generate import load_generator
from tasks.adapted import Finished, adapt
from tasks.guarding import guard_of, num_outside, outside_prompts, written
from tasks.online import sampling_of
from tasks.online_prompts import Prompts, published
from tasks.training import averaged, fixed_prompts, refuse_distilled, run_training
from tasks.training_data import TrainingData, local_slots, to_model

CHUNK = 64  # pictures drawn by one call

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Groups:
    """One caption for each group, and the scene that it shows where that is known."""

    captions: list[str]
    scenes: list[demo.Scene] | None

    @classmethod
    def of(cls, config: PairsConfig, ctx: StageContext) -> Groups:
        """Published scenes, or captions of the training set where there is no judge to know scenes."""
        rng = np.random.default_rng([config.seed, 77])
        if "judge" in ctx.inputs:
            published = [scene for scene in demo.all_scenes("full") if not scene.held_out]
            chosen = [published[i] for i in drawn(rng, len(published), config.prompts)]
            return cls([demo.short_caption(scene) for scene in chosen], chosen)
        captions = TrainingData(ctx.inputs["data"]).set.captions[1:]
        if len(captions) < config.prompts:
            raise DataRefused(
                f"pairs: {config.prompts} prompts are asked of {len(captions)} captions; lower pairs.prompts"
            )
        return cls([captions[i] for i in rng.choice(len(captions), config.prompts, replace=False)], None)

    def rewards(self, config: PairsConfig, ctx: StageContext, images: np.ndarray) -> np.ndarray:
        """[groups, group] of pictures uint8 [groups x group, H, W, 3]."""
        if config.hub is not None:
            asked = [caption for caption in self.captions for _ in range(config.group)]
            values = hub_scores(config.hub, images, asked)
        elif self.scenes is not None:
            scenes = [scene for scene in self.scenes for _ in range(config.group)]
            values = judge_reward(Judge.load(ctx.inputs["judge"]), images, scenes)
        else:
            raise ConfigError("pairs: nothing ranks the pictures; set pairs.hub to a reward, or pairs.source to data")
        return values.reshape(len(self.captions), config.group)


def drawn(rng: np.random.Generator, there: int, wanted: int) -> np.ndarray:
    """`wanted` places of `there` in random order; none comes a second time before all came once."""
    if wanted <= there:
        return rng.choice(there, wanted, replace=False)
    return np.concatenate([rng.permutation(there) for _ in range(-(-wanted // there))])[:wanted]


def make_pairs(config: PairsConfig, ctx: StageContext) -> dict[str, Any]:
    """Best and worst picture of each group under the reward; ties dropped."""
    refuse_distilled(ctx.inputs["init"], config.name)
    if config.source == "data":
        return pairs_with_data(config, ctx)
    groups = Groups.of(config, ctx)
    prompts = [caption for caption in groups.captions for _ in range(config.group)]
    seeds = [derive_seed(config.seed, "pairs", i) for i in range(len(prompts))]
    slices = [slice(start, start + CHUNK) for start in range(0, len(prompts), CHUNK)]
    parts = ctx.fan_out(_rollout, [(config, ctx.inputs["init"], prompts[part], seeds[part]) for part in slices])
    images = np.concatenate(parts)
    rewards = groups.rewards(config, ctx, images)
    best, worst = rewards.argmax(1), rewards.argmin(1)
    rows = np.arange(config.prompts)
    gaps = rewards[rows, best] - rewards[rows, worst]
    kept = np.flatnonzero(gaps > config.min_gap)
    if not len(kept):
        raise DataRefused(
            f"all {config.prompts} groups are ties (largest reward gap {gaps.max():.4f}, min_gap={config.min_gap}); "
            "ask more prompts, larger groups or a smaller gap"
        )
    winners, losers = kept * config.group + best[kept], kept * config.group + worst[kept]
    save_arrays(ctx.out / "pairs.safetensors", {"winner": images[winners], "loser": images[losers]})
    table = pa.table(
        {
            "prompt": [prompts[i] for i in winners],
            "scene": ["" if groups.scenes is None else groups.scenes[i].id for i in kept],
            "seed_winner": [seeds[i] for i in winners], "seed_loser": [seeds[i] for i in losers],
            "reward_winner": rewards[kept, best[kept]], "reward_loser": rewards[kept, worst[kept]],
            "source": ["rollout"] * len(kept), "strength": gaps[kept],
        }
    )  # fmt: skip
    pq.write_table(table, ctx.out / "pairs.parquet")
    return {"prompts": config.prompts, "pairs": len(kept), "ties": config.prompts - len(kept),
            "mean_reward": float(rewards.mean()), "mean_gap": float(gaps[kept].mean())}  # fmt: skip


def import_pairs(config: ImportPairsConfig, ctx: StageContext) -> dict[str, Any]:
    """Pairs of a published table in our form; what is dropped is counted by reason."""
    found, dropped = read_comparisons(Path(config.table).expanduser(), config.side)
    if not found:
        raise DataRefused(f"{config.table} has no usable pair ({dropped}); give a table with labels and pictures")
    pairs = PreferencePairs(
        tuple(row.prompt for row in found), np.stack([row.winner for row in found]),
        np.stack([row.loser for row in found]), (config.source,) * len(found),
        np.array([row.strength for row in found]),
        tuple(split_of(row.prompt, config.held_out, config.seed) for row in found),
    )  # fmt: skip
    write_pairs(pairs, ctx.out)
    return {"received": len(found) + sum(dropped.values()), "pairs": len(found), "dropped": dropped,
            "held_out": sum(side != TRAIN for side in pairs.split)}  # fmt: skip


def _rollout(item: tuple[PairsConfig, Path, list[str], list[int]]) -> np.ndarray:
    config, checkpoint, prompts, seeds = item
    with one_thread():
        return load_generator(checkpoint).sample(prompts, seeds, steps=config.steps, guidance=config.guidance)


def pairs_with_data(config: PairsConfig, ctx: StageContext) -> dict[str, Any]:
    """A curated picture is preferred to the model's for its caption (SPIN-Diffusion, arXiv:2402.10210); needs no judge."""
    data, card = TrainingData(ctx.inputs["data"]), read_card(ctx.inputs["init"])
    selection = data.set.select((card.side,))
    bucket = (card.side, card.side)
    if bucket not in selection.buckets:
        raise DataRefused(f"pairs: no {card.side}x{card.side} bucket in the training set; the model draws that size")
    rows = selection.buckets[bucket]
    chosen = rows[np.random.default_rng([config.seed, 77]).permutation(len(rows))[: config.prompts]]
    found = data.set.gather(Rows(bucket, selection.positions[chosen], chosen))
    prompts = [data.set.captions[i] for i in found.short]
    seeds = [derive_seed(config.seed, "pairs", i) for i in range(len(prompts))]
    slices = [slice(start, start + CHUNK) for start in range(0, len(prompts), CHUNK)]
    parts = ctx.fan_out(_rollout, [(config, ctx.inputs["init"], prompts[part], seeds[part]) for part in slices])
    save_arrays(ctx.out / "pairs.safetensors", {"winner": found.images, "loser": np.concatenate(parts)})
    count = len(prompts)
    table = pa.table(
        {
            "prompt": prompts, "scene": [""] * count, "seed_winner": [-1] * count, "seed_loser": seeds,
            "reward_winner": [1.0] * count, "reward_loser": [0.0] * count, "source": ["data"] * count,
            "strength": [1.0] * count,
        }
    )  # fmt: skip
    pq.write_table(table, ctx.out / "pairs.parquet")
    return {"prompts": count, "pairs": count, "ties": 0}


def dpo(config: DpoConfig, ctx: StageContext) -> dict[str, Any]:
    """Diffusion-DPO of `init` on `pairs`."""
    refuse_distilled(ctx.inputs["init"], config.name)
    data = TrainingData(ctx.inputs["data"])
    init, card = ctx.inputs["init"], read_card(ctx.inputs["init"])
    denoiser, reference = (families.load(init / "transformer", card, data.text_mean, data.text_std) for _ in range(2))
    adapt(denoiser, config.lora, config.train.seed, init)
    objective = DiffusionDpo(denoiser, reference, config)

    def trained(trainer: Trainer) -> Denoiser:
        return averaged(trainer, "denoiser", denoiser)

    model_of = Finished(trained, config.lora, init)
    guard = None if config.guard is None else guard_of_pairs(config.guard, config.train.seed, ctx, data, denoiser)
    batches, prompts = pair_batches(config, ctx), fixed_prompts(data)
    told = with_alarm(ctx, config.train)
    facts = run_training(objective, batches, config.train, told, model_of, card, prompts, guard, init)
    model_of.write_adapter(ctx)
    if world()[0] == 0:
        rows = [json.loads(line) for line in (ctx.out / "metrics.jsonl").read_text().splitlines()]
        facts["winners_fell"] = winners_fell(rows, pairs_of_a_row(config.train))
    return facts | written(guard, ctx)


def pairs_of_a_row(train: TrainConfig) -> int:
    """How many pairs a row of the log is the mean of."""
    return train.log_every * train.batch_size


def with_alarm(ctx: StageContext, train: TrainConfig) -> StageContext:
    """The context whose progress warns, once, when winners have become less likely."""
    rows = list[dict[str, float]]()

    def progress(done: int, total: int, numbers: Mapping[str, float]) -> None:
        rows.append({**numbers, "step": done})
        if winners_fell(rows, pairs_of_a_row(train)) == done:
            log.warning(
                "%s: winners are less likely than at the start in %d rows of the log running, by step %d (winner_change "
                "%+.2g): the preference pulls both pictures down; raise anchor, or lower beta_per_element or the rates",
                ctx.name, FELL_ROWS, done, numbers["winner_change"],
            )  # fmt: skip
        ctx.progress(done, total, numbers)

    return replace(ctx, progress=progress)


def guard_of_pairs(config: GuardConfig, seed: int, ctx: StageContext, data: TrainingData, denoiser: Denoiser) -> Guard:
    """The guard on prompts of which there is no pair: published scenes, or captions of one's own without a judge."""
    card, pairs = read_card(ctx.inputs["init"]), pq.read_table(ctx.inputs["pairs"] / "pairs.parquet")
    around = families.surroundings(ctx.inputs["init"], card)
    sampling = sampling_of(card, data, denoiser, around)
    trained: Reward = (
        Sharpness()
    )  # DPO has no reward of its own; where no judge is, the guard shows the pictures' edges
    judge, spare = Judge.load(ctx.inputs["judge"]) if "judge" in ctx.inputs else None, list[demo.Scene]()
    if judge is not None:
        scenes = published(config.prompts + num_outside(config), seed, set(pairs["scene"].to_pylist()))
        prompts, spare = Prompts.of(scenes[: config.prompts], 0, around), scenes[config.prompts :]
        trained = JudgeReward(judge, prompts.scenes)
    else:
        paired = set(pairs["prompt"].to_pylist())
        free = [caption for caption in data.set.captions[1:] if caption not in paired]
        if len(free) < config.prompts:
            raise ConfigError(
                f"dpo: {len(free)} captions have no pair, the guard asks {config.prompts}; lower guard.prompts"
            )
        order = np.random.default_rng([seed, 78]).permutation(len(free))[: config.prompts]
        prompts = Prompts.of_captions([free[i] for i in order], 0, around)
    outside = outside_prompts(config, spare, around)
    return guard_of(config, denoiser, card, sampling, judge, prompts, outside, trained, "denoiser")


def pair_batches(config: DpoConfig, ctx: StageContext) -> Callable[[int], Batch]:
    """This worker's pairs as a pure function of the step: a fresh permutation each epoch."""
    pairs = read_pairs(ctx.inputs["pairs"]).of(TRAIN)
    pictures, prompts = {"winner": pairs.winner, "loser": pairs.loser}, list(pairs.prompts)
    distinct = list(dict.fromkeys(prompts))
    around = families.surroundings(ctx.inputs["init"], read_card(ctx.inputs["init"]))
    warn_of_cut(distinct, around.encode)
    encoded = [around.encode(distinct[at : at + CHUNK]) for at in range(0, len(distinct), CHUNK)]
    tokens, mask = (torch.cat(part) for part in zip(*encoded, strict=True))
    longest = int(mask.sum(1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    caption = torch.tensor([distinct.index(p) for p in prompts])
    size, count, seed = config.train.batch_size, len(prompts), config.train.seed
    slots = local_slots(size)

    def batch(step: int) -> Batch:
        rows = shuffled(seed, "pair order", count, [step * size + slot for slot in slots])
        ids = caption[rows]
        return Batch(
            around.codec.x_0(to_model(pictures["winner"][rows.numpy()])), tokens[ids], mask[ids], slots,
            extra={"loser": around.codec.x_0(to_model(pictures["loser"][rows.numpy()]))},
        )  # fmt: skip

    return batch
