"""Rewards: one number a picture, with a declared range, a spread, and a role.

A reward that is `trained` on may be raised by tuning; a `held_out` one only watches, and is refused as a target. All
take pictures as tensors, so those that are differentiable serve ReFL too. The demo's reward is the colour judge's
log-likelihood of the asked scene; the shape judge has no part in it and is the held-out reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from models.engine.objective import Batch
from models.evaluation.judge import PAIRS, SIDE, Judge, SceneLike, luma_channel

LOWEST = -10.0
Role = Literal["trained", "held_out"]


@dataclass(frozen=True)
class RewardCard:
    """What a reward declares; `mean` and `sigma` are those of a base model's pictures, the unit of a hinge."""

    name: str
    low: float
    high: float
    role: Role
    mean: float = 0.0
    sigma: float = 1.0


class Reward(Protocol):
    """Pictures [B, 3, H, W] in [-1, 1] and what was asked -> rewards [B], higher is better."""

    @property
    def card(self) -> RewardCard:
        """Name, range, spread and role."""

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor: ...


@dataclass(frozen=True)
class Weighted:
    """A reward to train on and its weight."""

    reward: Reward
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what must not be trained on."""
        card = self.reward.card
        if card.role != "trained":
            raise ValueError(f"reward {card.name!r} is held out and only watches; train on another one")


def score(rewards: Sequence[Weighted], pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
    """Every reward of every picture [R, B]; one that answers for fewer pictures is refused."""
    values = [term.reward(pictures, asked) for term in rewards]
    for term, value in zip(rewards, values, strict=True):
        if value.shape != (len(pictures),):
            raise ValueError(
                f"reward {term.reward.card.name!r} answered {tuple(value.shape)} for {len(pictures)} pictures; "
                "it must give one number a picture"
            )
    return torch.stack(values)


@dataclass(frozen=True)
class Measured:
    """A reward whose card knows the mean and the spread of a base model's pictures."""

    reward: Reward
    card: RewardCard

    @classmethod
    def on(cls, reward: Reward, pictures: torch.Tensor, asked: Batch) -> Measured:
        """Measure it on these pictures [B, 3, H, W]."""
        values = reward(pictures, asked).double()
        mean, sigma = float(values.mean()), float(values.std())
        if not sigma > 0:
            raise ValueError(
                f"reward {reward.card.name!r} is {mean:g} for all {len(values)} pictures; take one that tells them apart"
            )
        return cls(reward, replace(reward.card, mean=mean, sigma=sigma))

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        """The reward itself."""
        return self.reward(pictures, asked)


class JudgeReward:
    """Log-likelihood of the asked scenes under one of the judge's networks; `asked.extra["scene"]` [B] numbers them."""

    def __init__(self, judge: Judge, scenes: Sequence[SceneLike], part: Literal["colour", "shape"] = "colour") -> None:
        self.network = (judge.colour if part == "colour" else judge.shape).eval().requires_grad_(False)
        device = judge.device
        self.part, self.scenes = part, scenes
        self.truth = {head: labels.to(device) for head, labels in judge.vocabulary.labels(scenes).items()}
        self.double = torch.tensor([scene.layout in PAIRS for scene in scenes], device=device)
        self.card = RewardCard(f"judge-{part}", LOWEST, 0.0, "trained" if part == "colour" else "held_out")

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        """At most 0."""
        rows = asked.extra["scene"]
        seen = F.adaptive_avg_pool2d(pictures / 2 + 0.5, SIDE) if pictures.shape[-1] != SIDE else pictures / 2 + 0.5
        logits = self.network(seen if self.part == "colour" else luma_channel(seen))
        truth = {head: labels[rows] for head, labels in self.truth.items()}
        return log_likelihood(logits, truth, self.double[rows])


class Sharpness:
    """A rule: mean absolute difference of neighbouring pixels, 0 for a flat picture. Noise raises it, so watch it."""

    def __init__(self, role: Role = "trained") -> None:
        self.card = RewardCard("sharpness", 0.0, 2.0, role, 0.1, 0.05)

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        """Mean of both directions."""
        across, down = pictures.diff(dim=3).abs().mean((1, 2, 3)), pictures.diff(dim=2).abs().mean((1, 2, 3))
        return (across + down) / 2


@dataclass(frozen=True)
class Composite:
    """Weighted sum of rewards in units of each one's sigma; declares the range that follows from theirs."""

    terms: tuple[Weighted, ...]

    @property
    def card(self) -> RewardCard:
        """Name, range and spread from the terms', which are taken as independent."""
        cards = [(term.reward.card, term.weight) for term in self.terms]
        ends = [[w * (end - c.mean) / c.sigma for end in (c.low, c.high)] for c, w in cards]
        return RewardCard(
            "+".join(c.name for c, _ in cards), sum(map(min, ends)), sum(map(max, ends)), "trained", 0.0,
            sum(w * w for _, w in cards) ** 0.5,
        )  # fmt: skip

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        """Sum of weight (r - mean) / sigma."""
        values = score(self.terms, pictures, asked)
        cards = [term.reward.card for term in self.terms]
        scaled = [(v - c.mean) / c.sigma * t.weight for v, c, t in zip(values, cards, self.terms, strict=True)]
        return torch.stack(scaled).sum(0)


def log_likelihood(
    logits: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], double: torch.Tensor
) -> torch.Tensor:
    """Mean log-probability [B] of what the network can name of layout, object(s), background, and of not refusing."""
    heads = [head for head in ("layout", "object_1", "object_2", "background") if head in logits]
    terms = {head: -F.cross_entropy(logits[head], truth[head].clamp_min(0), reduction="none") for head in heads}
    terms["object_2"] = torch.where(double, terms["object_2"], torch.zeros_like(terms["object_2"]))
    accepted = F.logsigmoid(-logits["reject"][:, 0])
    total = torch.stack([*terms.values(), accepted]).sum(0) / (len(heads) + double.float())
    return total.clamp_min(LOWEST)


@torch.inference_mode()
def judge_reward(judge: Judge, images: np.ndarray, scenes: Sequence[SceneLike]) -> np.ndarray:
    """The demo's reward of stored pictures: float32 [N], at most 0, of uint8 [N, S, S, 3]."""
    truth = judge.vocabulary.labels(scenes)
    colour, _ = judge.logits(images)
    return log_likelihood(colour, truth, torch.tensor([scene.layout in PAIRS for scene in scenes])).numpy()
