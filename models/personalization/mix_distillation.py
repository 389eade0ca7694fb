"""Distilled mixes: one model learns to predict what each of several tuned models predicts for its own prompts.

    loss = E_i E_{x_t} |v(x_t, c) - v_i(x_t, c)|^2,   (x_0, c) a picture that model i drew and its prompt

with i = 0 the base and its ordinary prompts, i >= 1 the base with adapter i and prompts of subject i: concept distillation from
several teachers, which Mix-of-Show's fusion (arXiv:2305.18292) solves a layer at a time and here is solved through the
whole network, so that a layer learns what to do with the inputs that the mixed layers below it make. It needs no picture of
the subjects. Pictures are drawn with guidance, g v(c) - (g - 1) v(""), and the teachers disagree about the empty prompt. So the mix
answers to it as the base does, and the target for c makes up for that: with
v_i'(c) = v_i(c) + (1 - 1/g) (v_0("") - v_i("")) the guided mix is the guided teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.personalization.dreambooth import Pictures, longest_prompt
from models.pretraining.config import TimestepConfig
from models.pretraining.flow_matching import FlowMatching


class MixDistillation(FlowMatching):
    """Flow matching whose target is the x_0 of the row's teacher, numbered in `extra["teacher"]` int64 [B].

    Rows of `extra["empty"]` bool [B] have the empty prompt and the base as their teacher; `null` is its features [1, T, D] and
    mask [1, T], and `guidance` the g pictures are drawn with.
    """

    def __init__(
        self, denoiser: Denoiser, timesteps: TimestepConfig, teachers: Sequence[Denoiser],
        null: tuple[torch.Tensor, torch.Tensor], guidance: float,
    ) -> None:  # fmt: skip
        super().__init__(denoiser, timesteps)
        self.teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        used = int(null[1].sum())
        self.null, self.guidance = (null[0][:, :used], null[1][:, :used]), guidance

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Draw t and eps, mix x_t; put what each row's teacher makes of it in place of the picture."""
        batch = super().prepare(batch, rng)
        targets = batch.images.clone()
        numbers = batch.extra["teacher"].masked_fill(batch.extra["empty"], 0)
        for number in range(len(self.teachers)):
            rows = numbers == number
            if rows.any():
                given = batch.extra["x_t"][rows], batch.extra["t"][rows]
                targets[rows] = self.wanted(number, *given, batch.tokens[rows], batch.mask[rows])
        return replace(batch, images=targets)

    @torch.no_grad()
    def wanted(
        self, number: int, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """x_0 [B, C, H, W] that, guided against the base's answer to the empty prompt, is what the teacher draws."""
        own: torch.Tensor = self.teachers[number](x_t, t, tokens, mask)[0]
        if number == 0 or self.guidance <= 1:
            return own
        empty = [each.expand(len(t), *each.shape[1:]) for each in self.null]
        base, mine = (self.teachers[i](x_t, t, *empty)[0] for i in (0, number))
        guided: torch.Tensor = own + (1 - 1 / self.guidance) * (base - mine)
        return guided


def lesson_batches(
    lessons: Sequence[Pictures],
    null: tuple[torch.Tensor, torch.Tensor],
    empty_share: float,
    slots: tuple[int, ...],
    seed: int,
) -> Callable[[int], Batch]:
    """Slot s shows a picture of lesson s mod L, whose teacher has its number; text is cut to the longest prompt of all.

    A share of the rows has the empty prompt, `null` [1, T, D] and [1, T], in place of its own, which guidance will ask for.
    """
    longest = max(longest_prompt(*lessons), int(null[1].sum()))

    def batch(step: int) -> Batch:
        rng, numbers = Randomness(seed, step, slots), [slot % len(lessons) for slot in slots]
        draws, empty = rng.uniform("lesson").tolist(), rng.uniform("empty") < empty_share
        places = [int(u * len(lessons[number])) for number, u in zip(numbers, draws, strict=True)]
        chosen = [(lessons[number], place) for number, place in zip(numbers, places, strict=True)]
        tokens = torch.stack([lesson.tokens[place] for lesson, place in chosen])
        mask = torch.stack([lesson.mask[place] for lesson, place in chosen])
        tokens[empty], mask[empty] = null
        images = torch.stack([lesson.images[place] for lesson, place in chosen])
        taught = {"teacher": torch.tensor(numbers), "empty": empty}
        return Batch(images, tokens[:, :longest], mask[:, :longest], slots, extra=taught)

    return batch
