"""Sizes of a batch, lanes, in which a picture has the same bits, so that few pictures need not pay for many.

A matrix product of 2 rows may add in another order than one of 8. The order follows from the shapes alone, so a lane is
used for a shape after pictures drawn in it had the bits of those drawn in the largest one, wherever they lay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from models.sampling.generate import Generator

if TYPE_CHECKING:
    from tasks.serving.engine import Look


class Lanes:
    """The lanes of every network and shape drawn so far."""

    def __init__(self, largest: int) -> None:
        self.sizes = tuple(sorted({*(1 << power for power in range(largest.bit_length())), largest}))
        self._proven: dict[tuple[object, ...], tuple[int, ...]] = {}

    def fitting(self, generator: Generator, look: Look, count: int) -> int:
        """The smallest lane that holds `count` pictures; the largest where none does."""
        key = (look.model.artifact.digest, look.width, look.height, look.guidance > 1, look.num_tokens)
        if key not in self._proven:
            self._proven[key] = proven(generator, look, self.sizes)
        lanes = self._proven[key]
        return next((size for size in lanes if size >= count), lanes[-1])


def proven(generator: Generator, look: Look, sizes: Sequence[int]) -> tuple[int, ...]:
    """The lanes whose pictures have the bits of the largest lane that is indifferent to places; (1,) when none is."""
    for position in reversed(range(len(sizes))):
        largest = sizes[position]
        want = _drawn(generator, look, range(largest), largest)
        turned = [*range(1, largest), 0]
        if np.array_equal(_drawn(generator, look, turned, largest), want[turned]):
            smaller = (size for size in sizes[:position] if largest % size == 0)
            return (*(s for s in smaller if np.array_equal(_drawn(generator, look, range(largest), s), want)), largest)
    return (1,)


def _drawn(generator: Generator, look: Look, seeds: Sequence[int], lane: int) -> np.ndarray:
    """Pictures of short prompts, all different, with the look's shapes; a step more would have the same."""
    steps = look.steps if generator.card.distilled else 1
    prompts = [str(seed) for seed in seeds]
    for prompt in prompts:
        generator.features([prompt])
    return generator.draw(
        prompts, list(seeds), look.width, look.height, steps, look.guidance, lane, look.num_tokens
    )  # fmt: skip
