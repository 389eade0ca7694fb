"""Stage functions of post-training on the model's own pictures: Flow-GRPO, DiffusionNFT, ReFL. SPMD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, assert_never

import numpy as np
import torch

from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.loop import Trainer
from models.engine.objective import Batch, Objective
from models.engine.randomness import Randomness
from models.evaluation.judge import Judge
from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card
from models.networks.denoiser import Denoiser
from models.networks.families import Surroundings
from models.posttraining.clip_reward import ClipReward
from models.posttraining.config import GrpoConfig, NftConfig, OnlineConfig, ReflConfig, RewardTerm
from models.posttraining.diffusion_nft import DiffusionNft
from models.posttraining.flow_grpo import FlowGrpo
from models.posttraining.guards import Guard
from models.posttraining.refl import Refl
from models.posttraining.reward import Composite, JudgeReward, Measured, Reward, Sharpness, Weighted
from models.posttraining.reward_model import RewardModel
from models.posttraining.rollout import Sampling
from tasks.adapted import Finished, adapt
from tasks.guarding import guard_of, num_outside, outside_prompts, written
from tasks.online_prompts import Prompts, prompt_batches, published
from tasks.training import averaged, fixed_prompts, refuse_distilled, run_training
from tasks.training_data import TrainingData

MEASURED_ON = 64  # pictures of the start that give a reward its sigma


def grpo(config: GrpoConfig, ctx: StageContext) -> dict[str, Any]:
    """Flow-GRPO of `init`."""
    return grouped(FlowGrpo, config, ctx)


def nft(config: NftConfig, ctx: StageContext) -> dict[str, Any]:
    """DiffusionNFT of `init`."""
    return grouped(DiffusionNft, config, ctx)


def grouped(method: Callable[..., Objective], config: GrpoConfig | NftConfig, ctx: StageContext) -> dict[str, Any]:
    """A policy that learns from groups of its own pictures, held by a frozen copy where there is a KL term."""
    start = Start.of(config, ctx)
    reference = copy.deepcopy(start.denoiser) if config.kl > 0 else None
    adapt(start.denoiser, config.lora, config.train.seed, ctx.inputs["init"])
    objective = method(start.denoiser, reference, start.rewards, start.sampling, config)
    batches = prompt_batches(start.prompts, config.prompts.side, config.train, config.group)
    return tune(objective, "policy", batches, config, ctx, start)


def refl(config: ReflConfig, ctx: StageContext) -> dict[str, Any]:
    """ReFL of `init`, with flow matching on the training set's pictures."""
    start = Start.of(config, ctx)
    adapt(start.denoiser, config.lora, config.train.seed, ctx.inputs["init"])
    objective = Refl(start.denoiser, Composite(start.rewards), start.sampling, config)
    asked = prompt_batches(start.prompts, config.prompts.side, config.train, 1)
    real = start.data.batches(config.select, config.train.batch_size, config.train.seed, teacher=False)

    def batch(step: int) -> Batch:
        prompts, pictures = asked(step), real(step)
        beside = {"real": pictures.images, "real_tokens": pictures.tokens, "real_mask": pictures.mask}
        return replace(prompts, extra={**prompts.extra, **beside})

    return tune(objective, "denoiser", batch, config, ctx, start)


@dataclass(frozen=True)
class Start:
    """The checkpoint to tune with what surrounds it: data, prompts, rewards to train on, guard."""

    denoiser: Denoiser
    card: SamplingCard
    data: TrainingData
    sampling: Sampling
    prompts: Prompts
    rewards: tuple[Weighted, ...]
    guard: Callable[[str], Guard] | None

    @classmethod
    def of(cls, config: OnlineConfig, ctx: StageContext) -> Start:
        """Open the inputs; every reward is measured on pictures of the start."""
        init = ctx.inputs["init"]
        refuse_distilled(init, ctx.name)
        data, card = TrainingData(ctx.inputs["data"]), read_card(init)
        denoiser = families.load(init / "transformer", card, data.text_mean, data.text_std)
        around = families.surroundings(init, card)
        sampling = sampling_of(card, data, denoiser, around)
        judge = Judge.load(ctx.inputs["judge"]) if "judge" in ctx.inputs else None
        prompts = prompts_of(config, data, around, own=judge is None)
        first = torch.arange(min(MEASURED_ON, prompts.trained))
        asked = prompts.batch(first, first.tolist(), config.prompts.side).to(denoiser.device)
        pictures = drawn(denoiser, asked, sampling, card.steps, config.train.seed)
        rewards = tuple(
            Weighted(Measured.on(reward_of(term, judge, prompts, ctx), pictures, asked), term.weight)
            for term in config.rewards
        )
        guard = None
        if config.guard is not None:
            outside = outside_prompts(config.guard, prompts.spare, around)
            trained = Composite(rewards)
            guard = partial(guard_of, config.guard, denoiser, card, sampling, judge, prompts, outside, trained)
        return cls(denoiser, card, data, sampling, prompts, rewards, guard)


def prompts_of(config: OnlineConfig, data: TrainingData, around: Surroundings, own: bool) -> Prompts:
    """Published scenes, or captions of one's own data where no judge knows what they show; the guard's come last."""
    watched = 0 if config.guard is None else config.guard.prompts
    if own:
        if config.guard is not None and config.guard.held_out is None:
            raise ConfigError(
                "the guard's held-out reward is the demo's judge; on data of your own set guard.held_out, or guard to null"
            )
        captions = data.set.captions[1:]
        order = np.random.default_rng([config.train.seed, 78]).permutation(len(captions))[
            : config.prompts.count + watched
        ]
        if len(order) <= watched:
            raise ConfigError(f"{len(captions)} captions leave none beside the guard's {watched}; lower guard.prompts")
        return Prompts.of_captions([captions[i] for i in order], len(order) - watched, around)
    asked = config.prompts.count + watched
    scenes = published(asked + num_outside(config.guard), config.train.seed)
    return replace(Prompts.of(scenes[:asked], config.prompts.count, around), spare=tuple(scenes[asked:]))


def sampling_of(card: SamplingCard, data: TrainingData, denoiser: Denoiser, around: Surroundings) -> Sampling:
    """As the card says; the empty prompt without its padding."""
    tokens, mask = data.null()
    used = int(mask.sum())
    null = (tokens[:, :used].to(denoiser.device), mask[:, :used].to(denoiser.device))
    return Sampling(null, card.guidance, card.shift_rule, denoiser.patch_size, around.codec, card.scheduler)


@torch.no_grad()
def drawn(net: Denoiser, asked: Batch, sampling: Sampling, steps: int, seed: int) -> torch.Tensor:
    """Pictures [B, 3, H, W] in [-1, 1]."""
    noise = Randomness(seed, 0, asked.slots, net.device).normal("measured", tuple(asked.images.shape[1:]))
    return sampling.pictures(sampling.follow(net, noise, sampling.times(steps, noise), asked))


def reward_of(term: RewardTerm, judge: Judge | None, prompts: Prompts, ctx: StageContext) -> Reward:
    """The reward of one term."""
    match term.kind:
        case "judge":
            if judge is None:
                raise ConfigError("the judge knows the demo's scenes only; reward with kind: model, sharpness or hub")
            return JudgeReward(judge, prompts.scenes)
        case "model":
            return RewardModel.load(ctx.inputs["reward"])
        case "sharpness":
            return Sharpness()
        case "hub":
            assert term.hub is not None  # by the configuration
            return ClipReward(term.hub, prompts.captions)
        case _:
            assert_never(term.kind)


def tune(
    objective: Objective, player: str, batches: Callable[[int], Batch], config: OnlineConfig, ctx: StageContext,
    start: Start,
) -> dict[str, Any]:  # fmt: skip
    """Train under the guard and write what it saw."""
    guard = None if start.guard is None else start.guard(player)

    def trained(trainer: Trainer) -> Denoiser:
        return averaged(trainer, player, start.denoiser)

    init, prompts = ctx.inputs["init"], fixed_prompts(start.data)
    model_of = Finished(trained, config.lora, init)
    facts = run_training(objective, batches, config.train, ctx, model_of, start.card, prompts, guard, init)
    model_of.write_adapter(ctx)
    return facts | written(guard, ctx)
