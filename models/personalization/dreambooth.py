"""DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, eq. 2): a rare token learns a subject, class pictures keep the rest.

loss = L(instance) + prior_weight * L(class), where class pictures are the base model's own pictures of ordinary
prompts, drawn before any adapter exists. Both halves go through plain flow matching; the weights ride on the batch.
Left out: prior prediction with the adapter off, pivotal tuning, full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.engine.objective import Batch
from models.engine.randomness import Randomness


@dataclass(frozen=True)
class Pictures:
    """Pictures [N, 3, H, W] in [-1, 1] with text features [N, T, D] and mask [N, T]."""

    images: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


def mixed_batches(
    instance: Pictures, prior: Pictures, prior_weight: float, slots: tuple[int, ...], seed: int
) -> Callable[[int], Batch]:
    """Even slots show the subject, odd slots the class; with no prior pictures every slot shows the subject.

    Weights make the batch mean equal L(instance) + prior_weight * L(prior).
    """
    if not len(instance):
        raise ValueError("no instance pictures; DreamBooth needs at least one picture of the subject")

    def batch(step: int) -> Batch:
        draws = Randomness(seed, step, slots).uniform("picture")
        images, tokens, masks, weights = [], [], [], []
        for slot, u in zip(slots, draws.tolist(), strict=True):
            own = len(prior) == 0 or slot % 2 == 0
            source = instance if own else prior
            index = int(u * len(source))
            images.append(source.images[index])
            tokens.append(source.tokens[index])
            masks.append(source.mask[index])
            weights.append(1.0 if len(prior) == 0 else 2.0 if own else 2.0 * prior_weight)
        return Batch(torch.stack(images), torch.stack(tokens), torch.stack(masks), slots, weight=torch.tensor(weights))

    return batch
