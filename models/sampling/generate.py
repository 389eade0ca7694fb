"""Pictures from a checkpoint folder: prompts and seeds in, pixels out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.networks import prx, text_encoder
from models.networks.checkpoint import SamplingCard, read_card
from models.networks.prx import Denoiser
from models.pretraining.config import TimestepConfig
from models.pretraining.timesteps import shift_of
from models.sampling.euler import grid, integrate


class Generator:
    """A checkpoint ready to draw. A picture depends on its prompt and seed, not on its neighbours in the batch."""

    def __init__(self, denoiser: Denoiser, card: SamplingCard) -> None:
        self.denoiser, self.card = denoiser.eval(), card
        self._features: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def features(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features of prompts; each distinct prompt is encoded once."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._features]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            tokens, mask = text_encoder.encode(part, self.card.prompt_max_tokens)
            self._features |= {p: (tokens[i], mask[i]) for i, p in enumerate(part)}
        pairs = [self._features[p] for p in prompts]
        return torch.stack([t for t, _ in pairs]), torch.stack([m for _, m in pairs])

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 8,  # on a CPU larger ones leave the cache and are a quarter slower
    ) -> np.ndarray:
        """uint8 [N, H, W, 3]; sizes, steps and guidance default to the checkpoint's card."""
        card = self.card
        width, height = width or card.side, height or card.side
        patch = self.denoiser.transformer.config.patch_size
        if width % patch or height % patch:
            raise ValueError(f"size {width}x{height} is not a multiple of the patch {patch}; choose e.g. {patch * 8}")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed a picture")
        rule = TimestepConfig(shift=card.shift, base_tokens=card.base_tokens)
        times = grid(steps or card.steps, shift_of(width * height // patch**2, rule))
        null = self.features([""])
        pictures = []
        for start in range(0, len(prompts), batch_size):
            tokens, mask = self.features(prompts[start : start + batch_size])
            used = max(int(mask.sum(1).max()), int(null[1].sum()))  # padding beyond the longest prompt changes nothing
            noise = torch.stack(
                [
                    torch.randn((3, height, width), generator=torch.Generator().manual_seed(seed))
                    for seed in seeds[start : start + batch_size]
                ]
            )
            cut = (null[0][:, :used], null[1][:, :used])
            strength = card.guidance if guidance is None else guidance
            x = integrate(self.denoiser, noise, times, tokens[:, :used], mask[:, :used], cut, strength)
            pictures.append(to_uint8(x))
        return np.concatenate(pictures)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], rounded as diffusers' image processor does."""
    return ((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy() * 255).round().astype(np.uint8)


def load_generator(checkpoint: Path) -> Generator:
    """The generator of a checkpoint folder."""
    return Generator(prx.load(checkpoint / "transformer"), read_card(checkpoint))
