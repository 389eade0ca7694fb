"""Pictures from a checkpoint folder: prompts and seeds in, pixels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from models.engine.distribute import sum_over_workers, world
from models.networks import families
from models.networks.checkpoint import SamplingCard, check_steps, read_card, transformer_folder
from models.networks.codec import Pixels
from models.networks.denoiser import Denoiser
from models.networks.families import Surroundings
from models.networks.text_features import PackagedText
from models.sampling.euler import euler_step, integrate
from models.sampling.few_step import renoise
from models.sampling.heun import heun_step
from models.sampling.times import times_of

REMEMBERED = 16_384  # prompts whose features are kept
BATCH = 8  # on a CPU larger batches leave the cache and are a quarter slower


class Generator:
    """A checkpoint ready to draw. A picture depends on its prompt and seed, not on its neighbours in the batch."""

    def __init__(
        self, denoiser: Denoiser, card: SamplingCard, others: Mapping[int, Denoiser] | None = None,
        around: Surroundings | None = None,
    ) -> None:  # fmt: skip
        self.denoiser, self.card = denoiser.eval(), card
        self.around = around or Surroundings(PackagedText(card.prompt_max_tokens), Pixels())
        self.others = {steps: other.eval() for steps, other in (others or {}).items()}  # weights for other step counts
        self._features: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.denoiser.device

    def features(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features of prompts; each distinct prompt is encoded once, as long as there are not very many."""
        if len(self._features) + len(prompts) > REMEMBERED:
            self._features.clear()
        new = [p for p in dict.fromkeys(prompts) if p not in self._features]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            tokens, mask = self.around.encode(part)
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            self._features |= {p: (tokens[i], mask[i]) for i, p in enumerate(part)}
        pairs = [self._features[p] for p in prompts]
        return torch.stack([t for t, _ in pairs]), torch.stack([m for _, m in pairs])

    def forget(self, prompts: Sequence[str]) -> None:
        """Encode these prompts anew when they are asked next (for measuring)."""
        for prompt in prompts:
            self._features.pop(prompt, None)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = BATCH,
    ) -> np.ndarray:
        """uint8 [N, H, W, 3]; sizes, steps and guidance default to the checkpoint's card."""
        return to_uint8(torch.from_numpy(self.draw(prompts, seeds, width, height, steps, guidance, batch_size)))

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = BATCH,
        num_tokens: int | None = None,
        sampler: str | None = None,
    ) -> np.ndarray:
        """As `sample`, but float32 [N, 3, H, W], about -1 to 1, not rounded; `num_tokens` fixes the length of the text.

        `sampler` (euler, heun) takes the place of the card's.
        """
        card = self.card
        width, height = width or card.side, height or card.side
        codec = self.around.codec
        patch = self.denoiser.stride * codec.factor
        if width % patch or height % patch:
            raise ValueError(f"size {width}x{height} is not a multiple of the patch {patch}; choose e.g. {patch * 8}")
        shape = (self.denoiser.channels, height // codec.factor, width // codec.factor)
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed a picture")
        steps = card.steps if steps is None else steps
        strength = card.guidance if guidance is None else guidance
        check_steps(card, steps, strength, sampler)
        times = times_of(card.scheduler, card.shift_rule, steps, shape[1] * shape[2] // self.denoiser.patch_size**2)
        denoiser, chosen = self.others.get(steps, self.denoiser), sampler or card.sampler
        null = self.features([""])
        pictures = []
        for start in range(0, len(prompts), batch_size):
            tokens, mask = self.features(prompts[start : start + batch_size])
            longest = max(int(mask.sum(1).max()), int(null[1].sum()))  # padding beyond it changes rounding at most
            used = longest if num_tokens is None else num_tokens
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
            if chosen == "renoise":
                x = renoise(denoiser, noise, times, tokens[:, :used], mask[:, :used], generators)
            else:
                cut = (null[0][:, :used], null[1][:, :used])
                step = heun_step if chosen == "heun" else euler_step
                x = integrate(denoiser, noise, times, tokens[:, :used], mask[:, :used], cut, strength, step)
            pictures.append(codec.pictures(x).cpu().numpy())
        return np.concatenate(pictures)


def sample_together(
    generator: Generator, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None
) -> np.ndarray:
    """As `Generator.sample` with the card's settings, each worker drawing every n-th batch; all get all, to the same bits."""
    (rank, workers), side = world(), generator.card.side
    pictures = torch.zeros((len(prompts), side, side, 3), dtype=torch.uint8)
    for start in range(rank * BATCH, len(prompts), workers * BATCH):
        part = slice(start, start + BATCH)
        pictures[part] = torch.from_numpy(generator.sample(prompts[part], seeds[part], steps=steps))
    sum_over_workers(pictures)
    return pictures.numpy()


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], rounded as diffusers' image processor does."""
    return ((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype(np.uint8)


def load_generator(checkpoint: Path) -> Generator:
    """The generator of a checkpoint folder."""
    card = read_card(checkpoint)
    folders = {n: transformer_folder(checkpoint, card, n) for n in card.trained_steps or ()}
    others = {n: families.load(folder, card) for n, folder in folders.items() if folder != checkpoint / "transformer"}
    around = families.surroundings(checkpoint, card)
    return Generator(families.load(checkpoint / "transformer", card), card, others, around)
