"""What the looks of DreamBooth's `until` draw: the subject by its captions, and the base's pictures of ordinary ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infra.errors import ConfigError
from infra.stages import StageContext
from models.networks.checkpoint import read_card
from models.networks.denoiser import Denoiser
from models.networks.families import surroundings
from models.personalization.config import DreamBoothConfig
from models.personalization.dreambooth import Pictures
from models.personalization.learning import LearningWatch
from models.personalization.lora import merge
from models.sampling.generate import Generator, load_generator, sample_together
from tasks.training_data import to_model

WATCHED = 24  # ordinary prompts whose drift is seen


@dataclass(frozen=True)
class Asked:
    """The subject's captions and pictures [N, 3, H, W]."""

    captions: Sequence[str]
    images: torch.Tensor


def watch_of(
    config: DreamBoothConfig,
    ctx: StageContext,
    adapted: Denoiser,
    base: Denoiser,
    subject: Asked,
    captions: Sequence[str],
) -> LearningWatch:
    """A watch over `adapted`; every look draws the subject's captions in turn from the same noise, all workers together."""
    assert config.until is not None
    if config.text is not None:
        raise ConfigError(
            f"{config.name}: until takes back weights of the denoiser alone, and text moves others; set one of them to null"
        )
    init = ctx.inputs["init"]
    card, around, count = read_card(init), surroundings(init, read_card(init)), config.until.pictures
    asked = [subject.captions[number % len(subject.captions)] for number in range(count)]

    def draw(denoiser: Denoiser) -> torch.Tensor:
        net = denoiser if config.lora is None else merge(denoiser)
        return to_model(sample_together(Generator(net, card, around=around), asked, list(range(count))))

    picked = np.random.default_rng([config.train.seed, 79]).permutation(np.arange(1, len(captions)))[:WATCHED]
    plain = [captions[int(place)] for place in picked]
    images = sample_together(load_generator(init), plain, list(range(len(plain))))
    ordinary = Pictures(to_model(images), *around.encode(plain))
    return LearningWatch(config.until, adapted, base, draw, subject.images, ordinary, around.encode([""]))
