"""Reward model: Bradley-Terry (ImageReward, arXiv:2304.05977, eq. 1) on a small network that sees pixels and reads the prompt.

loss = -log sigmoid(r_w - r_l), ln 2 at the start, plus what captioned pictures teach (alignment.py), in the same steps.
The network sees squares of `side` pixels, larger pictures averaged down by area; text is the mean token of a frozen encoder.
Scores are normalised after training (mean 0, sigma 1 over the training pictures); calibration.py turns differences into
probabilities. Left out: published encoders as a start, ties, several annotators.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from infra.errors import ArtifactCorrupted
from models.device import compute_device
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.discriminator import text_vector
from models.posttraining.alignment import info_nce, spoilt, varied
from models.posttraining.reward import RewardCard

PLACES = 4  # a side of the map that is flattened, so that where something stands can be told
GROUPS = 8
LEAST_STD = 1e-3
STARTING_SCALE = 3.0


def small(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures [B, 3, H, W] brought to [B, 3, side, side] by area, differentiable."""
    if pictures.shape[-2:] == (side, side):
        return pictures
    return F.interpolate(pictures, size=(side, side), mode="area")


def convolution(inside: int, outside: int, stride: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, group normalisation, SiLU."""
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(GROUPS, outside), nn.SiLU())


class Scorer(nn.Module):
    """Picture [B, 3, H, W] and text [B, D] -> score [B]: how well they agree, plus what is seen of the picture alone.

    score = scale <h(picture), g(text)> / F + q(h(picture)); g and q start at zero. `width` is a multiple of 8.
    """

    text_mean: torch.Tensor
    text_std: torch.Tensor

    def __init__(self, text_dim: int, width: int, features: int, side: int, seed: int) -> None:
        super().__init__()
        self.settings = {"text_dim": text_dim, "width": width, "features": features, "side": side}
        self.register_buffer("text_mean", torch.zeros(text_dim))
        self.register_buffer("text_std", torch.ones(text_dim))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(
                convolution(3, width, 2, 5), convolution(width, 2 * width, 1), convolution(2 * width, 3 * width, 2),
                convolution(3 * width, 3 * width, 1), convolution(3 * width, 4 * width, 2),
                nn.AdaptiveAvgPool2d(PLACES), nn.Flatten(),
                nn.Linear(4 * width * PLACES**2, features), nn.LayerNorm(features), nn.SiLU(),
            )  # fmt: skip
            read, wanted = nn.Linear(text_dim, 2 * features), nn.Linear(2 * features, features, bias=False)
            self.text, self.alone = nn.Sequential(read, nn.SiLU(), wanted), nn.Linear(features, 1)
        self.scale = nn.Parameter(torch.tensor(STARTING_SCALE).log())
        for last in (wanted.weight, self.alone.weight, self.alone.bias):
            nn.init.zeros_(last)

    def standardise(self, text: torch.Tensor) -> None:
        """Take each text feature's mean and deviation from training data [N, D]."""
        self.text_mean.copy_(text.mean(0))
        self.text_std.copy_(text.std(0).clamp_min(LEAST_STD))

    def seen(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features [B, F]."""
        features: torch.Tensor = self.trunk(small(pictures, self.settings["side"]))
        return features

    def asked(self, text: torch.Tensor) -> torch.Tensor:
        """What to look for [B, F]."""
        wanted: torch.Tensor = self.text((text - self.text_mean) / self.text_std)
        return wanted * self.scale.exp() / self.settings["features"]

    def table(self, seen: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Scores [B, P] of every picture under every prompt."""
        scores: torch.Tensor = seen @ asked.T + self.alone(seen)
        return scores

    def forward(self, pictures: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """One score a picture."""
        seen = self.seen(pictures)
        scores: torch.Tensor = (seen * self.asked(text)).sum(1) + self.alone(seen)[:, 0]
        return scores


class BradleyTerry:
    """Player `scorer`. `extra`: `winner`, `loser` [B, 3, S, S], the number of the `prompt` [B]; with `alignment` above 0
    also `curated` [C, 3, S, S], their `captions` [C, D] and the numbers of these, `caption` [C]. Preferences count from
    step `after` on: earlier they are learnt by heart, before the network can see what they are about."""

    def __init__(self, scorer: Scorer, alignment: float = 0.0, after: int = 0) -> None:
        self.scorer, self.alignment, self.after = scorer, alignment, after

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the scorer; the text encoder is frozen."""
        return {"scorer": self.scorer}

    def turns(self, step: int) -> Sequence[str]:
        """The scorer moves in every step."""
        return ("scorer",)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Whether preferences count yet; with alignment small changes to every picture, and curated ones spoilt."""
        batch = replace(batch, weight=batch.images.new_full((len(batch.slots),), float(rng.step >= self.after)))
        if not self.alignment:
            return batch
        generator, extra = rng.shared("reward pictures"), dict(batch.extra)
        for name in ("winner", "loser", "curated"):
            extra[name] = varied(batch.extra[name], generator)
        extra["spoilt"] = spoilt(batch.extra["curated"], generator)
        return replace(batch, extra=extra)

    def loss(self, player: str, batch: Batch) -> Loss:
        """-log sigmoid(r_w - r_l), and the alignment terms."""
        extra, count = batch.extra, len(batch.slots)
        asked = self.scorer.asked(text_vector(batch.tokens, batch.mask))
        names = ("winner", "loser", *(("curated", "spoilt") if self.alignment else ()))
        seen = self.scorer.seen(torch.cat([extra[name] for name in names]))
        drawn = self.scorer.table(seen[: 2 * count], asked)
        margin = drawn[:count].diagonal() - drawn[count:].diagonal()
        preference = -F.logsigmoid(margin)
        total = (preference if batch.weight is None else preference * batch.weight).mean()
        parts = {"preference": preference.detach().mean(), "pair_accuracy": (margin > 0).float().mean()}
        if self.alignment:
            curated, broken = self.scorer.table(seen[2 * count :], self.scorer.asked(extra["captions"])).chunk(2)
            terms = {
                "curated": info_nce(curated, extra["caption"]),
                "drawn": info_nce(drawn[:count], extra["prompt"]),
                "spoilt": -F.logsigmoid(curated.diagonal() - broken.diagonal()).mean(),
            }
            total = total + self.alignment * torch.stack(list(terms.values())).sum()
            parts |= {name: term.detach() for name, term in terms.items()}
        return Loss(total, parts)

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


class RewardModel:
    """A trained scorer: a reward that needs nothing but picture and prompt."""

    def __init__(self, scorer: Scorer, mean: float, sigma: float) -> None:
        self.scorer, self.mean, self.sigma = scorer.to(compute_device()).eval().requires_grad_(False), mean, sigma
        self.card = RewardCard("reward-model", -10.0, 10.0, "trained")

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        """Normalised scores [B]."""
        text = asked.extra.get("reward_text")  # where the denoiser has another text encoder than the scorer
        if text is None:
            text = text_vector(asked.tokens, asked.mask)
        scores: torch.Tensor = (self.scorer(pictures, text) - self.mean) / self.sigma
        return scores.clamp(self.card.low, self.card.high)

    def save(self, folder: Path) -> None:
        """Write reward.safetensors and reward.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.scorer.state_dict().items()}, folder / "reward.safetensors")
        told = {"mean": self.mean, "sigma": self.sigma, "scorer": self.scorer.settings}
        (folder / "reward.json").write_text(json.dumps(told, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """Read what `save` wrote."""
        try:
            told = json.loads((folder / "reward.json").read_text())
            scorer = Scorer(**told["scorer"], seed=0)
            scorer.load_state_dict(load_file(folder / "reward.safetensors"))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ArtifactCorrupted(
                f"reward model in {folder} cannot be read ({error}); run its stage again"
            ) from error
        return cls(scorer, told["mean"], told["sigma"])
