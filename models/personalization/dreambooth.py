"""DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, eq. 2): a rare token learns a subject, class pictures keep the rest.

loss = L(instance) + prior_weight * L(class), where class pictures are the base model's own pictures of ordinary
prompts, drawn before any adapter exists. L(instance) is plain flow matching; the weights ride on the batch.
L(class) has two targets. "pictures" is the paper's: the class picture itself; as it was drawn with guidance and is
sampled with guidance again, the class drifts away from real pictures. "prediction" asks for what the base predicts
from the same noisy class picture (output preservation): zero for a fresh adapter, so nothing but the subject pulls.
Some prior prompts name another rare token, which must mean to the adapted model what it means to the base: an adapter
that answers to any unknown word spoils every other one it is mixed with.
With masks a pixel of an instance picture counts as much as its mask says, so that the subject is learnt and not its
background; `unmasked` is what is left of the weight outside, and every picture's weights have mean 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.pretraining.config import TimestepConfig
from models.pretraining.flow_matching import FlowMatching


@dataclass(frozen=True)
class Pictures:
    """Pictures [N, 3, H, W] in [-1, 1] with text features [N, T, D] and mask [N, T]; weights of pixels [N, H, W]."""

    images: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    focus: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


class DreamBooth(FlowMatching):
    """Flow matching of an adapted denoiser; rows of `extra["prior"]` aim at the base's prediction if there is a base."""

    def __init__(self, denoiser: Denoiser, timesteps: TimestepConfig, base: Denoiser | None) -> None:
        super().__init__(denoiser, timesteps)
        self.base = None if base is None else base.eval().requires_grad_(False)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Draw t and eps, mix x_t; put the base's x_0 in place of the prior pictures."""
        batch = super().prepare(batch, rng)
        prior = batch.extra["prior"]
        if self.base is None or not prior.any():
            return batch
        targets = batch.images.clone()
        with torch.no_grad():
            targets[prior], _ = self.base(
                batch.extra["x_t"][prior], batch.extra["t"][prior], batch.tokens[prior], batch.mask[prior]
            )
        return replace(batch, images=targets)

    def error(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of each sample [B]; with `extra["focus"]` [B, H, W] every pixel's error times its weight."""
        focus = batch.extra.get("focus")
        if focus is not None:
            output = batch.images + focus.sqrt().unsqueeze(1) * (output - batch.images)
        return super().error(output, batch)


def focus_of(masks: torch.Tensor, unmasked: float) -> torch.Tensor:
    """Weights [N, H, W] of mean 1 a picture, in the ratio 1 : `unmasked` inside and outside of masks [N, H, W] in 0..1."""
    weights = unmasked + (1 - unmasked) * masks
    return weights / weights.mean((1, 2), keepdim=True)


def longest_prompt(*sources: Pictures) -> int:
    """Tokens of the longest prompt: what lies behind is padding, which costs time and changes nothing."""
    return max(int(source.mask.sum(1).max()) for source in sources if len(source))


def mixed_batches(
    instance: Pictures, prior: Pictures, prior_weight: float, slots: tuple[int, ...], seed: int
) -> Callable[[int], Batch]:
    """Even slots show the subject, odd slots the class; with no prior pictures every slot shows the subject.

    Text is cut where the longest prompt ends. Weights make the batch mean equal L(instance) + prior_weight * L(prior); `extra["prior"]` bool [B] marks the class;
    `extra["prompt"]` int64 [B] is the row's place among the prompts of instance and prior.
    """
    if not len(instance):
        raise ValueError("no instance pictures; DreamBooth needs at least one picture of the subject")
    longest = longest_prompt(instance, prior)

    def batch(step: int) -> Batch:
        draws = Randomness(seed, step, slots).uniform("picture")
        images, tokens, masks, weights, of_class, prompts, focus = [], [], [], [], [], [], []
        for slot, u in zip(slots, draws.tolist(), strict=True):
            own = len(prior) == 0 or slot % 2 == 0
            source = instance if own else prior
            index = int(u * len(source))
            images.append(source.images[index])
            tokens.append(source.tokens[index, :longest])
            masks.append(source.mask[index, :longest])
            weights.append(1.0 if len(prior) == 0 else 2.0 if own else 2.0 * prior_weight)
            of_class.append(not own)
            prompts.append(index if own else len(instance) + index)
            if instance.focus is not None:
                focus.append(instance.focus[index] if own else torch.ones_like(instance.focus[0]))
        extra = {"prior": torch.tensor(of_class), "prompt": torch.tensor(prompts)} | (
            {"focus": torch.stack(focus)} if focus else {}
        )
        return Batch(
            torch.stack(images), torch.stack(tokens), torch.stack(masks), slots,
            weight=torch.tensor(weights), extra=extra,
        )  # fmt: skip

    return batch
