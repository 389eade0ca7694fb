"""Token routing of TREAD (Krause et al. 2025, arXiv:2501.04765): some tokens skip a span of blocks and come back after it.

Left out: routing at sampling time, and reference guidance with routed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Route:
    """Tokens `keep` [B, K] (ascending) pass the blocks first..last; the others skip them."""

    keep: torch.Tensor
    first: int
    last: int

    def covers(self, block: int) -> bool:
        """Whether that block (0-based) sees the kept tokens alone."""
        return self.first <= block <= self.last

    def visible(self, tokens: torch.Tensor) -> torch.Tensor:
        """Kept rows [B, K, ...] of [B, L, ...] or, the same for all samples, [1, L, ...]."""
        b, k = self.keep.shape
        tokens = tokens.expand(b, *tokens.shape[1:])
        index = self.keep.view(b, k, *[1] * (tokens.ndim - 2)).expand(b, k, *tokens.shape[2:])
        return tokens.gather(1, index)

    def restored(self, whole: torch.Tensor, passed: torch.Tensor) -> torch.Tensor:
        """The tokens [B, L, W] as they entered the span, those that passed it replaced."""
        return whole.scatter(1, self.keep[..., None].expand_as(passed), passed)
