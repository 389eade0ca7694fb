"""Prompts of training on the model's own pictures, encoded; those of the demo are published scenes, so held-out ones stay unseen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_curation import scenes as demo
from infra.errors import ConfigError
from models.engine.config import TrainConfig
from models.engine.objective import Batch
from models.engine.randomness import shuffled
from models.networks.discriminator import text_vector
from models.networks.families import Surroundings
from models.networks.text_features import Encode, PackagedText, warn_of_cut
from tasks.training_data import local_slots

REWARD_TOKENS = 64  # as the reward model reads prompts


@dataclass(frozen=True)
class Prompts:
    """Captions with their text features; the first `trained` are for training, the others for the guard."""

    scenes: tuple[demo.Scene, ...]  # what the captions show, as far as it is known
    tokens: torch.Tensor  # [N, T, D]
    mask: torch.Tensor  # [N, T]
    trained: int
    channels: int = 3
    factor: int = 1
    reward_text: torch.Tensor | None = None  # [N, E] for the reward model, whose text encoder may not be the denoiser's
    captions: tuple[str, ...] = ()  # [N]
    spare: tuple[demo.Scene, ...] = ()  # neither trained on nor among the guard's, for its outside prompts

    @classmethod
    def of(cls, scenes: Sequence[demo.Scene], trained: int, around: Surroundings, long: bool = False) -> Prompts:
        """Encode the scenes' short captions, or all four long wordings in turn."""
        captions = [
            demo.long_caption(scene, i) if long else demo.short_caption(scene) for i, scene in enumerate(scenes)
        ]
        tokens, mask = features_of(captions, around.encode)
        codec, said = around.codec, tuple(captions)
        return cls(tuple(scenes), tokens, mask, trained, codec.channels, codec.factor, captions=said)

    @classmethod
    def of_captions(cls, captions: Sequence[str], trained: int, around: Surroundings) -> Prompts:
        """Encode captions of one's own, for the denoiser and for the reward model."""
        own = text_vector(*features_of(captions, PackagedText(REWARD_TOKENS)))
        tokens, mask = features_of(captions, around.encode)
        return cls((), tokens, mask, trained, around.codec.channels, around.codec.factor, own, tuple(captions))

    def batch(self, rows: torch.Tensor, slots: Sequence[int], side: int) -> Batch:
        """What these rows [B] ask; the pictures only give the size."""
        blank = torch.zeros(len(rows), self.channels, side // self.factor, side // self.factor)
        extra = {"scene": rows} if self.reward_text is None else {"scene": rows, "reward_text": self.reward_text[rows]}
        return Batch(blank, self.tokens[rows], self.mask[rows], tuple(slots), extra=extra)


def features_of(captions: Sequence[str], encode: Encode) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, T, D] and mask [N, T] of captions, no longer than the longest."""
    warn_of_cut(captions, encode)
    features = [encode(captions[at : at + 64]) for at in range(0, len(captions), 64)]
    tokens, mask = (torch.cat(part) for part in zip(*features, strict=True))
    longest = int(mask.sum(1).max())
    return tokens[:, :longest], mask[:, :longest]


def published(count: int, seed: int, without: Collection[str] = ()) -> list[demo.Scene]:
    """Published scenes in a random order, except those named; held-out ones stay for the evaluation."""
    scenes = [scene for scene in demo.all_scenes("full") if not scene.held_out and scene.id not in without]
    if count > len(scenes):
        raise ConfigError(
            f"{count} prompts are asked of {len(scenes)} published scenes; lower prompts.count or guard.prompts"
        )
    return [scenes[i] for i in np.random.default_rng([seed, 78]).permutation(len(scenes))[:count]]


def prompt_batches(prompts: Prompts, side: int, train: TrainConfig, group: int) -> Callable[[int], Batch]:
    """This worker's prompts as a pure function of the step: each `group` slots in a row, a new order each epoch."""
    slots = local_slots(train.batch_size)
    groups = train.batch_size // group

    def batch(step: int) -> Batch:
        places = [step * groups + slot // group for slot in slots]
        rows = shuffled(train.seed, "prompt order", prompts.trained, places)
        return prompts.batch(rows, slots, side)

    return batch
