"""PickScore (Kirstain et al. 2023, arXiv:2305.01569, eq. 1), HPS v2 (Wu et al. 2023, arXiv:2306.09341) and plain CLIP as rewards.

All are CLIPs: score = s cos(E_text(prompt), E_image(picture)), s the learnt scale for PickScore and 1 for the others, as
their authors publish scores. The towers are frozen; the picture gets a gradient through torch's own resizing
(`models/evaluation/clip.py`), so ReFL can use them. Left out: ImageReward (a BLIP with a head of its own, no class of
transformers reads it), HPS v3 and other vision-language scorers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from models.engine.objective import Batch
from models.evaluation.clip import clip_of
from models.evaluation.config import HubReward
from models.posttraining.reward import RewardCard


class ClipReward:
    """A reward on the prompts it was made for; `asked.extra["scene"]` [B] numbers them."""

    def __init__(self, config: HubReward, prompts: Sequence[str]) -> None:
        self.clip, self._batch_size = clip_of(config), config.batch_size
        self.factor = self.clip.scale if config.kind == "pickscore" else 1.0
        self.texts = self.clip.texts(prompts)  # [N, D]
        self.card = RewardCard(config.label, -self.factor, self.factor, config.role)

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        """Scores [B] of pictures [B, 3, H, W] in [-1, 1]."""
        return self.score(pictures, asked.extra["scene"])

    def score(self, pictures: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Scores [B]; `prompts` [B] are the numbers of what was asked."""
        texts = self.texts[prompts.cpu()].to(pictures.device)
        if torch.is_grad_enabled() and pictures.requires_grad:
            return self.factor * (self.clip.features(pictures) * texts).sum(1)
        return self.factor * (self.features(pictures) * texts).sum(1)

    @torch.no_grad()
    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, D] of length 1, for diversity; without gradient."""
        return torch.cat([self.clip.features(part) for part in pictures.split(self._batch_size)])


def hub_scores(config: HubReward, images: np.ndarray | Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Scores float [N] of stored pictures, N times uint8 [H, W, 3], and their prompts, by the model's own image processor."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts; give one prompt per picture")
    clip, distinct = clip_of(config), list(dict.fromkeys(prompts))
    words = clip.texts(distinct)[[distinct.index(prompt) for prompt in prompts]]
    parts = [
        clip.of_images([Image.fromarray(image) for image in images[at : at + config.batch_size]])
        for at in range(0, len(images), config.batch_size)
    ]
    factor = clip.scale if config.kind == "pickscore" else 1.0
    scores: np.ndarray = (factor * (torch.cat(parts) * words).sum(1)).double().numpy()
    return scores
