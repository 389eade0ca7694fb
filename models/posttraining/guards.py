"""Guards against reward hacking: what tuning must not break, looked at on prompts that it never trains on.

A look draws with the averaged weights, the inference sampler and fixed noise, and compares with the start picture by
picture: the held-out reward (no worse than `errors` standard errors), the same on prompts unlike the trained ones if
there are some (`outside`), diversity within a prompt (a share of the start's), drift of the velocity at five times. A
number that is not finite is bad too. After `patience` bad looks in a row, or a bad last one, the run ends and takes the
weights of the best good look, the start included; a start that is bad itself is refused. Looks follow from the weights
alone, so a resumed run has the same ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from infra.errors import ConfigError
from models.engine.loop import Trainer
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.engine.watch import BestWeights
from models.engine.weights import with_weights
from models.networks.denoiser import Denoiser
from models.posttraining.guard_config import GuardConfig
from models.posttraining.reward import Reward
from models.posttraining.rollout import Sampling
from models.pretraining.flow_matching import noised

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
CHUNK = 16  # pictures drawn at a time
END = 6 + len(TIMES)  # of a look's row, without the outside prompts


@dataclass(frozen=True)
class Watched:
    """Prompts by neighbouring slots, `seeds` of each; the rewards; features [N, F] of pictures for diversity.

    `outside` are prompts unlike those that are trained on, for the held-out reward alone.
    """

    asked: Batch
    seeds: int
    trained: Reward
    held_out: Reward
    features: Callable[[torch.Tensor], torch.Tensor]
    sampling: Sampling
    steps: int
    outside: Batch | None = None


@dataclass(frozen=True)
class Look:
    """What one set of weights is worth; `change` and `error` are of the held-out reward against the start."""

    step: int
    trained: float
    held_out: float
    change: float
    error: float
    diversity: float  # over the start's
    drift: tuple[float, ...]  # at TIMES
    outside: tuple[float, float, float] | None = None  # held-out reward there, its change and error


@dataclass(frozen=True)
class Drawn:
    """One model's x_0 [N, C, H, W], its rewards [N] and the distance of pictures within a prompt."""

    x_0: torch.Tensor
    trained: torch.Tensor
    held_out: torch.Tensor
    distance: float


class Guard:
    """A Watch of the loop for one player that is a denoiser."""

    def __init__(self, config: GuardConfig, player: str, start: Denoiser, watched: Watched) -> None:
        self.config, self.player, self.watched = config, player, watched
        self.start = copy.deepcopy(start).eval().requires_grad_(False)
        self.looks: list[Look] = []
        self.best = BestWeights(player)
        self.best_step, self.bad, self.ended = 0, 0, False

    @property
    def every(self) -> int:
        """Steps between looks."""
        return self.config.every

    @torch.no_grad()
    def look(self, trainer: Trainer) -> None:
        """Measure the averaged weights; keep them if they are the best, end the run if they are bad for long."""
        average = trainer.emas[self.player].average
        found = self._measure(with_weights(self.start, average), trainer.step)
        faults = self.faults(found)
        if faults and trainer.step == 0:
            raise ConfigError(
                f"the guard finds faults in the start itself, so nothing could be restored: {'; '.join(faults)}; look at "
                f"the rewards and pictures of the start, or lower guard.min_diversity={self.config.min_diversity:g}"
            )
        if not faults and all(found.held_out > old.held_out for old in self.looks if not self.faults(old)):
            self.best.keep(trainer)
            self.best_step = found.step
        self.looks.append(found)
        self.bad = self.bad + 1 if faults else 0
        if self.bad >= self.config.patience or (faults and trainer.step >= trainer.config.steps):
            self.ended = True
            self.best.restore(trainer)

    def faults(self, look: Look) -> list[str]:
        """What is wrong, in words; empty for a good look."""
        if broken := not_finite(look):
            return broken
        config, found = self.config, []
        if look.change < -config.errors * look.error:
            found.append(
                f"held-out reward {look.change:+.4f} against the start, more than {config.errors:g} x {look.error:.4f} down"
            )
        if look.outside is not None and look.outside[1] < -config.errors * look.outside[2]:
            _, change, error = look.outside
            found.append(
                f"held-out reward {change:+.4f} on the outside prompts, more than {config.errors:g} x {error:.4f} down"
            )
        if look.diversity < config.min_diversity:
            found.append(f"diversity {look.diversity:.2f} of the start's, below {config.min_diversity:g}")
        if config.max_drift is not None and max(look.drift) > config.max_drift:
            at = TIMES[look.drift.index(max(look.drift))]
            found.append(f"velocity drift {max(look.drift):.3f} at t={at}, above {config.max_drift:g}")
        return found

    def report(self) -> dict[str, Any]:
        """Looks, and why and where the run was ended, for the stage's facts; null stands for what is no finite number."""
        reasons = self.faults(self.looks[-1]) if self.ended else []
        return {"looks": [told(look) for look in self.looks], "times": list(TIMES), "ended": self.ended,
                "reasons": reasons, "taken": self.best_step if self.ended else self.looks[-1].step}  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """Looks, best weights and counters as tensors."""
        table = [as_row(look) for look in self.looks]
        counters = torch.tensor([self.best_step, self.bad, int(self.ended)])
        return {"looks": torch.tensor(table, dtype=torch.float64), "counters": counters} | self.best.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        self.looks = [Look(int(r[0]), r[1], r[2], r[3], r[4], r[5], tuple(r[6:END]), outside_of(r[END:]))
                      for r in tensors["looks"].tolist()]  # fmt: skip
        self.best_step, self.bad, ended = tensors["counters"].tolist()
        self.ended = bool(ended)
        self.best.load_state(tensors)

    @cached_property
    def _first(self) -> Drawn:
        return self._draw(self.start)

    def _measure(self, net: Denoiser, step: int) -> Look:
        first, now = self._first, self._draw(net)
        diversity = 1.0 if first.distance == 0 else now.distance / first.distance
        outside = None if self._outside is None else compared(self._judged_outside(net), self._outside)
        return Look(step, float(now.trained.double().mean()), *compared(now.held_out, first.held_out), diversity,
                    self._drift(net), outside)  # fmt: skip

    @cached_property
    def _outside(self) -> torch.Tensor | None:
        return None if self.watched.outside is None else self._judged_outside(self.start)

    @torch.no_grad()
    def _judged_outside(self, net: Denoiser) -> torch.Tensor:
        assert self.watched.outside is not None
        parts = self._pictures(net, self.watched.outside, "guard outside")
        return torch.cat([self.watched.held_out(drawn, part) for _, drawn, part in parts])

    def _pictures(self, net: Denoiser, asked: Batch, stream: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, Batch]]:
        """x_0, pictures and what was asked, some at a time; the noise is that of the stream and the slots."""
        sampling = self.watched.sampling
        for start in range(0, len(asked.slots), CHUNK):
            part = rows(asked, slice(start, start + CHUNK))
            noise = Randomness(0, 0, part.slots, net.device).normal(stream, tuple(part.images.shape[1:]))
            times = sampling.times(self.watched.steps, noise)
            x_0 = sampling.codec.settled(sampling.follow(net, noise, times, part))
            yield x_0, sampling.pictures(x_0), part

    @torch.no_grad()
    def _draw(self, net: Denoiser) -> Drawn:
        watched = self.watched
        latents, pictures, trained, held_out = [], [], [], []
        for x_0, drawn, part in self._pictures(net, watched.asked, "guard"):
            latents.append(x_0)
            pictures.append(drawn)
            trained.append(watched.trained(drawn, part))
            held_out.append(watched.held_out(drawn, part))
        within = watched.features(torch.cat(pictures)).double().unflatten(0, (-1, watched.seeds))
        distance = float(torch.cdist(within, within).sum((1, 2)).mean())
        return Drawn(torch.cat(latents), torch.cat(trained), torch.cat(held_out), distance)

    @torch.no_grad()
    def _drift(self, net: Denoiser) -> tuple[float, ...]:
        asked, x_0 = self.watched.asked, self._first.x_0
        found = []
        for t in TIMES:
            changed, size = 0.0, 0.0
            for start in range(0, len(asked.slots), CHUNK):
                part = rows(asked, slice(start, start + CHUNK))
                now = x_0.new_full((len(part.slots),), t)
                eps = Randomness(0, 0, part.slots, net.device).normal(f"drift {t}", tuple(x_0.shape[1:]))
                x_t = noised(x_0[start : start + CHUNK], eps, now)
                own, base = (velocity_at(n, x_t, now, part) for n in (net, self.start))
                changed, size = changed + float((own - base).square().sum()), size + float(base.square().sum())
            found.append(changed / size)
        return tuple(found)


def velocity_at(net: Denoiser, x_t: torch.Tensor, t: torch.Tensor, asked: Batch) -> torch.Tensor:
    """The velocity without guidance [B, C, H, W]."""
    return net.as_velocity(net.predict(x_t, t, asked.tokens, asked.mask)[0], x_t, t)


def as_row(look: Look) -> list[float]:
    """All numbers of a look in one row."""
    return [look.step, look.trained, look.held_out, look.change, look.error, look.diversity, *look.drift,
            *(look.outside or ())]  # fmt: skip


def outside_of(row: Sequence[float]) -> tuple[float, float, float] | None:
    """The end of a row: reward, change and error on the outside prompts, or nothing."""
    return (row[0], row[1], row[2]) if row else None


def compared(now: torch.Tensor, first: torch.Tensor) -> tuple[float, float, float]:
    """Mean of the rewards [N], their mean change from the first, and its standard error."""
    gain = (now - first).double()
    return float(now.double().mean()), float(gain.mean()), float(gain.std() / len(gain) ** 0.5)


def not_finite(look: Look) -> list[str]:
    """Every number of a look that is none, by name."""
    named = {
        "trained reward": [look.trained], "held-out reward": [look.held_out, look.change, look.error],
        "held-out reward on the outside prompts": look.outside or (), "diversity": [look.diversity],
        "velocity drift": look.drift,
    }  # fmt: skip
    broken = {name: [value for value in values if not math.isfinite(value)] for name, values in named.items()}
    return [f"{name} is {values[0]}, which is no finite number" for name, values in broken.items() if values]


def told(look: Look) -> dict[str, Any]:
    """A look as JSON can hold it."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    found = {name: number(v) if isinstance(v, int | float) else v for name, v in asdict(look).items()}
    found["drift"] = [number(value) for value in look.drift]
    if look.outside is None:
        del found["outside"]
    else:
        found["outside"] = dict(zip(("held_out", "change", "error"), map(number, look.outside), strict=True))
    return found


def rows(asked: Batch, part: slice) -> Batch:
    """Some neighbouring samples of a batch."""
    extra = {name: value[part] for name, value in asked.extra.items()}
    return replace(asked, images=asked.images[part], tokens=asked.tokens[part], mask=asked.mask[part],
                   slots=asked.slots[part], extra=extra)  # fmt: skip
