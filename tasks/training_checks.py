"""What a training stage refuses before its first step: a network, a training set and workers that do not fit together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from infra.errors import ConfigError
from models.engine.distribute import world
from models.networks.config import NetworkConfig, Sd3Config
from models.networks.denoiser import Denoiser
from models.pretraining.curriculum import Phase
from tasks.training_data import TrainingData

PIXEL_CHANNELS = 3
TEXT_WIDTHS = ("context_in_dim", "joint_attention_dim", "cross_attention_dim")  # in the config of PRX, SD3, UNet


def refuse_uneven(phases: Sequence[Phase], accumulate: int, stage: str) -> None:
    """Every phase's batch must be cut evenly over the workers, and then into the parts of a step."""
    workers = world()[1]
    for phase in phases:
        if phase.batch_size % (workers * accumulate):
            raise ConfigError(
                f"stage {stage!r}: batch_size={phase.batch_size} from step {phase.first_step} on cannot be cut into "
                f"accumulate={accumulate} equal parts on each of {workers} workers; make it a multiple of {workers * accumulate}"
            )


def refuse_other_space(denoiser: Denoiser, data: TrainingData, stage: str) -> None:
    """A denoiser of latents needs a training set with latents of its channels, one of pixels a set without."""
    if (data.scaling is None) != (denoiser.channels == PIXEL_CHANNELS):
        has = "no latents" if data.scaling is None else "latents"
        raise ConfigError(
            f"stage {stage!r}: its network takes {denoiser.channels} channels, but its training set has {has}; "
            "pixels need the encode stage's set, latents the features stage's"
        )
    has_channels = data.set.latent_channels
    if has_channels is not None and has_channels != denoiser.channels:
        raise ConfigError(
            f"stage {stage!r}: its network takes latents of {denoiser.channels} channels, but its training set's have "
            f"{has_channels}; make the set with the VAE that the network is for"
        )


def refuse_other_text(
    network: NetworkConfig, folder: Path | None, data: TrainingData, longest: int, stage: str
) -> None:  # fmt: skip
    """Text features must have the width the network reads, and no more tokens than its sampler gives it.

    `folder` holds the network, if it is not made anew; SD3's tokens are of several encoders, so they are not counted.
    """
    sd3 = isinstance(network, Sd3Config)
    if folder is not None and (folder / "config.json").exists():
        told = json.loads((folder / "config.json").read_text())
        wanted = next((int(told[name]) for name in TEXT_WIDTHS if told.get(name)), None)
        sd3 = "joint_attention_dim" in told
    else:
        wanted = None if isinstance(network, Sd3Config) else network.text_dim
    width, most = len(data.text_mean), data.set.longest_text
    if wanted is not None and width != wanted:
        raise ConfigError(
            f"stage {stage!r}: its network reads text features of {wanted} numbers a token, but its training set's have "
            f"{width}; set network.text_dim to {width}, or make the set with the encoder that the network is for"
        )
    if not sd3 and most > longest:
        raise ConfigError(
            f"stage {stage!r}: its training set has captions of {most} tokens, but the model is sampled with at most "
            f"prompt_max_tokens={longest}; raise network.prompt_max_tokens, or lower data.encode.max_tokens"
        )
