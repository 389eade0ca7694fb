"""Reward model: Bradley-Terry (ImageReward, arXiv:2304.05977, eq. 1) on frozen image and text features.

loss = -log sigmoid(r_w - r_l), ln 2 while the head is zero. Image features are three maps of the packaged encoder, each
pooled to 4 x 4 places, so that where something stands can be told; text is the mean token. Scores are normalised after
training (mean 0, sigma 1 over the training pictures); calibration.py turns differences into probabilities. Left out: fine-tuning of the encoders, ties, several annotators.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from infra.errors import ArtifactCorrupted
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.discriminator import text_vector
from models.networks.image_encoder import CHANNELS, ImageEncoder
from models.posttraining.reward import RewardCard

PLACES = 4
IMAGE_DIM = sum(CHANNELS) * PLACES**2
LEAST_STD = 1e-3


class Scorer(nn.Module):
    """Features of picture [B, F] and text [B, D] -> score [B]; projections, their product, a linear head that starts at 0."""

    image_mean: torch.Tensor
    image_std: torch.Tensor
    text_mean: torch.Tensor
    text_std: torch.Tensor

    def __init__(self, image_dim: int, text_dim: int, width: int, seed: int) -> None:
        super().__init__()
        for name, size in (("image", image_dim), ("text", text_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image, self.text = nn.Linear(image_dim, width), nn.Linear(text_dim, width)
            self.head = nn.Linear(2 * width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def standardise(self, image: torch.Tensor, text: torch.Tensor) -> None:
        """Take each feature's mean and deviation from training data, [N, F] and [N, D]."""
        for name, values in (("image", image), ("text", text)):
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(values.std(0).clamp_min(LEAST_STD))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """One score a picture."""
        seen = self.image((image - self.image_mean) / self.image_std)
        asked = self.text((text - self.text_mean) / self.text_std)
        scores: torch.Tensor = self.head(torch.cat([seen, seen * asked], 1))[:, 0]
        return scores


def image_features(encoder: ImageEncoder, pictures: torch.Tensor) -> torch.Tensor:
    """[B, F] of pictures [B, 3, H, W] in [-1, 1], differentiable."""
    return torch.cat([F.adaptive_avg_pool2d(part, PLACES).flatten(1) for part in encoder(pictures)], 1)


class BradleyTerry:
    """Player `scorer`. `extra` holds the image features `winner` and `loser` [B, F]."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the scorer; the encoders are frozen."""
        return {"scorer": self.scorer}

    def turns(self, step: int) -> Sequence[str]:
        """The scorer moves in every step."""
        return ("scorer",)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Nothing to draw."""
        return batch

    def loss(self, player: str, batch: Batch) -> Loss:
        """-log sigmoid(r_w - r_l)."""
        text = text_vector(batch.tokens, batch.mask)
        margin = self.scorer(batch.extra["winner"], text) - self.scorer(batch.extra["loser"], text)
        return Loss(-F.logsigmoid(margin).mean(), {"pair_accuracy": (margin > 0).float().mean()})

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


class RewardModel:
    """A trained scorer with its encoder: a reward that needs nothing but picture and prompt."""

    def __init__(self, scorer: Scorer, encoder: ImageEncoder, mean: float, sigma: float) -> None:
        self.scorer, self.encoder = scorer.eval().requires_grad_(False), encoder
        self.mean, self.sigma = mean, sigma
        self.card = RewardCard("reward-model", -10.0, 10.0, "trained")

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        """Normalised scores [B]."""
        text = asked.extra.get("reward_text")  # where the denoiser has another text encoder than the scorer
        if text is None:
            text = text_vector(asked.tokens, asked.mask)
        raw = self.scorer(image_features(self.encoder, pictures), text)
        scores: torch.Tensor = (raw - self.mean) / self.sigma
        return scores.clamp(self.card.low, self.card.high)

    def save(self, folder: Path) -> None:
        """Write reward.safetensors and reward.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.scorer.state_dict().items()}, folder / "reward.safetensors")
        (folder / "reward.json").write_text(json.dumps({"mean": self.mean, "sigma": self.sigma}, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """Read what `save` wrote."""
        try:
            scale = json.loads((folder / "reward.json").read_text())
            tensors = load_file(folder / "reward.safetensors")
        except (OSError, ValueError) as error:
            raise ArtifactCorrupted(
                f"reward model in {folder} cannot be read ({error}); run its stage again"
            ) from error
        (width, image_dim), text_dim = tensors["image.weight"].shape, tensors["text.weight"].shape[1]
        scorer = Scorer(image_dim, text_dim, width, 0)
        scorer.load_state_dict(tensors)
        return cls(scorer, ImageEncoder(), **scale)
