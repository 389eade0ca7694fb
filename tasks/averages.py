"""A checkpoint of another average of the weights, put together afterwards from a stage's snapshots (models/engine/ema.py).

A stage with `train.ema_snapshot_every` leaves `ema-snapshots`: two power averages at every so many steps, as they were
trained, and the scale of its text features, which a checkpoint holds folded into its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError
from models.engine.ema import SNAPSHOT_GAMMAS, combined, misfit, synthesis
from models.engine.state import load_state
from models.engine.weights import put_weights
from models.networks import families
from models.networks.checkpoint import read_card, write_checkpoint
from models.networks.denoiser import Denoiser

FOLDER, TEXT = "ema-snapshots", "text.safetensors"
PLAYER = "denoiser"
MOST_MISFIT = 0.05  # of the profile asked for, in its own norm


@dataclass(frozen=True)
class Made:
    """What an average was made of."""

    gamma: float
    step: int
    snapshots: int
    misfit: float  # distance of the profile made from the one asked for, over the latter's norm


def keep_text_scale(folder: Path, denoiser: Denoiser) -> None:
    """Write the scale of the text features beside snapshots."""
    save_file({"mean": denoiser.text_mean.cpu(), "std": denoiser.text_std.cpu()}, folder / TEXT)


def other_average(checkpoint: Path, out: Path, gamma: float, at: int | None = None) -> Made:
    """Write `checkpoint` to `out` with the power average of `gamma` after step `at` (None: the last snapshot's)."""
    snapshots = snapshots_of(checkpoint)
    last = int(max(step for _, step, _ in snapshots))
    step = last if at is None else at
    if not 0 < step <= last:
        raise ConfigError(f"step {step} lies outside the snapshots of {checkpoint.name}, which end at step {last}")
    places = [(own, float(taken)) for own, taken, _ in snapshots]
    off = misfit(places, gamma, step)
    if off > MOST_MISFIT:
        first, second = sorted(SNAPSHOT_GAMMAS)
        raise ConfigError(
            f"gamma {gamma:g} at step {step} misses its profile by {off:.0%} with {len(places)} snapshots (limit "
            f"{MOST_MISFIT:.0%}); choose one near {first:g} to {second:g}, or train with a smaller ema_snapshot_every"
        )
    weights = combined([average for _, _, average in snapshots], synthesis(places, gamma, step))
    write_checkpoint(out, _with(checkpoint, weights), read_card(checkpoint), checkpoint)
    return Made(gamma, step, len(places), off)


def snapshots_of(checkpoint: Path) -> list[tuple[float, int, dict[str, torch.Tensor]]]:
    """(gamma, step, average by name) of every stored snapshot, in order."""
    found = list[tuple[float, int, dict[str, torch.Tensor]]]()
    for folder in sorted((checkpoint / FOLDER).glob("[0-9]*"), key=lambda path: int(path.name)):
        state = load_state(folder)
        if state is None:
            raise ConfigError(f"snapshot {folder} is damaged; run its stage again, or remove that folder")
        step, groups, meta = state
        for place, gamma in enumerate(meta["gammas"]):
            average = groups.get(f"{PLAYER}.power{place}")
            if average is not None:
                found.append((float(gamma), step, average))
    if not found:
        raise ConfigError(
            f"{checkpoint.name} has no {FOLDER} of a flow-matching stage; set train.ema_snapshot_every in its stage"
        )
    return found


def _with(checkpoint: Path, weights: dict[str, torch.Tensor]) -> Denoiser:
    """The checkpoint's denoiser with these weights, which are as they were trained."""
    if not (checkpoint / FOLDER / TEXT).exists():
        raise ConfigError(
            f"{checkpoint.name} keeps snapshots without {TEXT}, the scale of their text; run its stage again (t2i rerun)"
        )
    scale = load_file(checkpoint / FOLDER / TEXT)
    denoiser = families.load(checkpoint / "transformer", read_card(checkpoint), scale["mean"], scale["std"])
    own = {
        name.removeprefix(f"{PLAYER}."): value for name, value in weights.items() if name.startswith(f"{PLAYER}.")
    }  # less REPA's projector
    missing = own.keys() ^ {name for name, _ in denoiser.named_parameters()}
    if missing:
        raise ConfigError(
            f"the snapshots of {checkpoint.name} are not of all its weights ({len(missing)} differ, such as "
            f"{min(missing)}); averages of adapters are not made afterwards"
        )
    put_weights(denoiser, own)
    return denoiser
