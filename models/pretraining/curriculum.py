"""Curriculum: phases of one stage by samples seen, switching resolution, captions, times, batch, routing and REPA together.

Low-resolution squares with short captions first, high-resolution pictures of any aspect with long captions last
(progressive growing as in PixArt, arXiv:2310.00426, and Lumina, arXiv:2405.05945). A phase begins at the first step at
which that many samples were seen, so its place is a pure function of the settings and a resumed run needs no state.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from models.pretraining.config import FlowMatchingConfig, PhaseConfig, SelectConfig, TimestepConfig, TreadConfig


@dataclass(frozen=True)
class Phase:
    """What holds from `first_step` on."""

    timesteps: TimestepConfig
    first_step: int = 0
    batch_size: int = 1
    select: SelectConfig = field(default_factory=SelectConfig)
    repa: bool = True
    tread: TreadConfig | None = None


def phases_of(config: FlowMatchingConfig) -> tuple[Phase, ...]:
    """The stage's phases in order; one when it has no curriculum. ValueError where a phase has no place in the stage."""
    train = config.train
    if not config.curriculum:
        return (Phase(config.timesteps, 0, train.batch_size, config.select, True, config.tread),)
    starts = [part.from_samples for part in config.curriculum]
    if starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(f"curriculum begins its phases at {starts} samples; begin at 0 and rise")
    phases: list[Phase] = []
    seen = step = 0
    for part in config.curriculum:
        if phases:
            before = phases[-1].batch_size
            steps = -(-(part.from_samples - seen) // before)
            seen, step = seen + steps * before, step + steps
        if step >= train.steps:
            raise ValueError(
                f"stage {config.name!r} ends after {train.steps} steps, before its phase from {part.from_samples} samples "
                f"begins at step {step}; raise train.steps or begin the phase earlier"
            )
        if (batch_size := batch_size_of(part, config)) % train.accumulate:
            raise ValueError(
                f"stage {config.name!r}: its phase from {part.from_samples} samples has batch_size={batch_size}, no multiple "
                f"of accumulate={train.accumulate}; give that phase a batch_size that is one"
            )
        phases.append(
            Phase(
                part.timesteps or config.timesteps,
                step,
                batch_size,
                part.select or config.select,
                part.repa,
                part.tread or config.tread,
            )
        )
    return tuple(phases)


def batch_size_of(part: PhaseConfig, config: FlowMatchingConfig) -> int:
    """As told, or so many pictures that a step has as many tokens as in the first phase."""
    if part.batch_size is not None:
        return part.batch_size
    first = max((config.curriculum[0].select or config.select).resolutions)
    here = max((part.select or config.select).resolutions)
    return max(1, round(config.train.batch_size * (first / here) ** 2))


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase a step lies in."""
    return phases[bisect_right([phase.first_step for phase in phases], step) - 1]


def samples_seen(phases: Sequence[Phase], steps: int) -> int:
    """Samples of the first `steps` steps."""
    ends = [*(phase.first_step for phase in phases[1:]), steps]
    lengths = (max(0, min(end, steps) - phase.first_step) for phase, end in zip(phases, ends, strict=True))
    return sum(length * phase.batch_size for length, phase in zip(lengths, phases, strict=True))
