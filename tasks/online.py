"""Stage functions of post-training on the model's own pictures: Flow-GRPO, DiffusionNFT, ReFL. SPMD."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, assert_never

import numpy as np
import torch

from data_curation import scenes as demo
from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.config import TrainConfig
from models.engine.distribute import world
from models.engine.loop import Trainer
from models.engine.objective import Batch, Objective
from models.engine.randomness import Randomness, shuffled
from models.evaluation.judge import Judge
from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card
from models.networks.denoiser import Denoiser
from models.networks.discriminator import text_vector
from models.networks.families import Surroundings
from models.networks.text_features import Encode, PackagedText
from models.posttraining.clip_reward import ClipReward
from models.posttraining.config import GrpoConfig, NftConfig, OnlineConfig, ReflConfig, RewardTerm
from models.posttraining.diffusion_nft import DiffusionNft
from models.posttraining.flow_grpo import FlowGrpo
from models.posttraining.guard_config import GuardConfig
from models.posttraining.guards import Guard, Watched
from models.posttraining.refl import Refl
from models.posttraining.reward import Composite, JudgeReward, Measured, Reward, Sharpness, Weighted
from models.posttraining.reward_model import RewardModel
from models.posttraining.rollout import Sampling
from tasks.adapted import Finished, adapt
from tasks.training import averaged, fixed_prompts, refuse_distilled, run_training
from tasks.training_data import TrainingData, local_slots

REWARD_TOKENS = 64  # as the reward model reads prompts
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
class Prompts:
    """Captions with their text features; the first `trained` are for training, the others for the guard."""

    scenes: tuple[demo.Scene, ...]  # what the captions show, as far as it is known
    tokens: torch.Tensor  # [N, T, D]
    mask: torch.Tensor  # [N, T]
    trained: int
    channels: int = 3
    factor: int = 1
    reward_text: torch.Tensor | None = None  # [N, E] for the reward model, whose text encoder may not be the denoiser's
    captions: tuple[str, ...] = ()  # [N]

    @classmethod
    def of(cls, scenes: Sequence[demo.Scene], trained: int, around: Surroundings) -> Prompts:
        """Encode the scenes' short captions."""
        captions = [demo.short_caption(scene) for scene in scenes]
        tokens, mask = features_of(captions, around.encode)
        codec, said = around.codec, tuple(captions)
        return cls(tuple(scenes), tokens, mask, trained, codec.channels, codec.factor, captions=said)

    @classmethod
    def of_captions(cls, captions: Sequence[str], trained: int, around: Surroundings) -> Prompts:
        """Encode captions of one's own, for the denoiser and for the reward model."""
        own = text_vector(*features_of(captions, PackagedText(REWARD_TOKENS)))
        tokens, mask = features_of(captions, around.encode)
        return cls((), tokens, mask, trained, around.codec.channels, around.codec.factor, own, tuple(captions))

    def batch(self, rows: torch.Tensor, slots: Sequence[int], side: int) -> Batch:
        """What these rows [B] ask; the pictures only give the size."""
        blank = torch.zeros(len(rows), self.channels, side // self.factor, side // self.factor)
        extra = {"scene": rows} if self.reward_text is None else {"scene": rows, "reward_text": self.reward_text[rows]}
        return Batch(blank, self.tokens[rows], self.mask[rows], tuple(slots), extra=extra)


def features_of(captions: Sequence[str], encode: Encode) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, T, D] and mask [N, T] of captions, no longer than the longest."""
    features = [encode(captions[at : at + 64]) for at in range(0, len(captions), 64)]
    tokens, mask = (torch.cat(part) for part in zip(*features, strict=True))
    longest = int(mask.sum(1).max())
    return tokens[:, :longest], mask[:, :longest]


def published(count: int, seed: int, without: Collection[str] = ()) -> list[demo.Scene]:
    """Published scenes in a random order, except those named; held-out ones stay for the evaluation."""
    scenes = [scene for scene in demo.all_scenes("full") if not scene.held_out and scene.id not in without]
    if count > len(scenes):
        raise ConfigError(
            f"{count} prompts are asked of {len(scenes)} published scenes; lower prompts.count or guard.prompts"
        )
    return [scenes[i] for i in np.random.default_rng([seed, 78]).permutation(len(scenes))[:count]]


def prompt_batches(prompts: Prompts, side: int, train: TrainConfig, group: int) -> Callable[[int], Batch]:
    """This worker's prompts as a pure function of the step: each `group` slots in a row, a new order each epoch."""
    slots = local_slots(train.batch_size)
    groups = train.batch_size // group

    def batch(step: int) -> Batch:
        places = [step * groups + slot // group for slot in slots]
        rows = shuffled(train.seed, "prompt order", prompts.trained, places)
        return prompts.batch(rows, slots, side)

    return batch


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
            guard = partial(guard_of, config.guard, denoiser, card, sampling, judge, prompts, Composite(rewards))
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
    scenes = published(config.prompts.count + watched, config.train.seed)
    return Prompts.of(scenes, config.prompts.count, around)


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


def guard_of(
    config: GuardConfig, denoiser: Denoiser, card: SamplingCard, sampling: Sampling, judge: Judge | None,
    prompts: Prompts, trained: Reward, player: str,
) -> Guard:  # fmt: skip
    """The guard on prompts that are not trained on; a reward of the hub watches, or the shape judge."""
    rows = torch.arange(prompts.trained, prompts.trained + config.prompts).repeat_interleave(config.seeds)
    asked = prompts.batch(rows, range(len(rows)), card.side).to(denoiser.device)
    held_out: Reward
    features: Callable[[torch.Tensor], torch.Tensor]
    if config.held_out is not None:
        held_out = hub = ClipReward(config.held_out, prompts.captions)
        features = hub.features
    elif judge is not None:
        held_out, features = JudgeReward(judge, prompts.scenes, "shape"), partial(judge_features, judge)
    else:
        raise ConfigError(
            "a guard needs the demo's judge or guard.held_out; give a held-out reward, or set guard to null"
        )
    return Guard(
        config, player, denoiser, Watched(asked, config.seeds, trained, held_out, features, sampling, card.steps)
    )


def judge_features(judge: Judge, pictures: torch.Tensor) -> torch.Tensor:
    """[B, F] of the colour judge, of pictures [B, 3, 32, 32] in [-1, 1]."""
    return judge.colour.features(pictures / 2 + 0.5)


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


def written(guard: Guard | None, ctx: StageContext) -> dict[str, Any]:
    """What the guard saw, for the facts; rank 0 writes it beside the weights too."""
    if guard is None:
        return {}
    report = guard.report()
    if world()[0] == 0:
        (ctx.out / "guard.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return {"guard": report}
