"""The guard of a stage of preference tuning, and the record of what it saw."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from data_curation import scenes as demo
from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.distribute import world
from models.engine.objective import Batch
from models.evaluation.judge import Judge
from models.networks.checkpoint import SamplingCard
from models.networks.denoiser import Denoiser
from models.networks.families import Surroundings
from models.posttraining.clip_reward import ClipReward
from models.posttraining.guard_config import GuardConfig
from models.posttraining.guards import Guard, Watched
from models.posttraining.reward import JudgeReward, Reward
from models.posttraining.rollout import Sampling
from tasks.online_prompts import Prompts


def guard_of(
    config: GuardConfig, denoiser: Denoiser, card: SamplingCard, sampling: Sampling, judge: Judge | None,
    prompts: Prompts, outside: Prompts | None, trained: Reward, player: str,
) -> Guard:  # fmt: skip
    """The guard on prompts that are not trained on; a reward of the hub watches, or the shape judge."""
    rows = torch.arange(prompts.trained, prompts.trained + config.prompts).repeat_interleave(config.seeds)
    asked = prompts.batch(rows, range(len(rows)), card.side).to(denoiser.device)
    beyond = None if outside is None else outside_batch(outside, len(prompts.tokens), config.seeds, card.side)
    beyond = None if beyond is None else beyond.to(denoiser.device)
    captions, scenes = prompts.captions, prompts.scenes
    if outside is not None:
        captions, scenes = (*captions, *outside.captions), (*scenes, *outside.scenes)
    held_out: Reward
    features: Callable[[torch.Tensor], torch.Tensor]
    if config.held_out is not None:
        held_out = hub = ClipReward(config.held_out, captions)
        features = hub.features
    elif judge is not None:
        held_out, features = JudgeReward(judge, scenes, "shape"), partial(judge_features, judge)
    else:
        raise ConfigError(
            "a guard needs the demo's judge or guard.held_out; give a held-out reward, or set guard to null"
        )
    watched = Watched(asked, config.seeds, trained, held_out, features, sampling, card.steps, beyond)
    return Guard(config, player, denoiser, watched)


def outside_prompts(config: GuardConfig | None, scenes: Sequence[demo.Scene], around: Surroundings) -> Prompts | None:
    """Prompts unlike those that are trained on, if they are asked for: one's own, or the long wording of these scenes."""
    if config is None or config.outside is None:
        return None
    if config.outside.texts:
        return Prompts.of_captions(config.outside.texts, 0, around)
    return Prompts.of(scenes, 0, around, long=True)


def num_outside(config: GuardConfig | None) -> int:
    """Scenes that `outside_prompts` needs."""
    return 0 if config is None or config.outside is None or config.outside.texts else config.outside.prompts


def outside_batch(outside: Prompts, first: int, seeds: int, side: int) -> Batch:
    """`seeds` of every prompt; the held-out reward knows them by numbers from `first` on."""
    rows = torch.arange(len(outside.tokens)).repeat_interleave(seeds)
    asked = outside.batch(rows, range(len(rows)), side)
    return replace(asked, extra={**asked.extra, "scene": rows + first})


def judge_features(judge: Judge, pictures: torch.Tensor) -> torch.Tensor:
    """[B, F] of the colour judge, of pictures [B, 3, 32, 32] in [-1, 1]."""
    return judge.colour.features(pictures / 2 + 0.5)


def written(guard: Guard | None, ctx: StageContext) -> dict[str, Any]:
    """What the guard saw, for the facts; rank 0 writes it beside the weights too."""
    if guard is None:
        return {}
    report = guard.report()
    if world()[0] == 0:
        (ctx.out / "guard.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return {"guard": report}
