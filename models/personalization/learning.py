"""When a subject is learnt: a Watch that ends DreamBooth once its pictures come no nearer to the subject's, or the rest drifts.

How long a subject takes cannot be read off its pictures (of the demo's two one needs twice the steps of the other), so the run looks:
with the averaged weights it draws fixed prompts of the subject from fixed noise, and asks how near these pictures are to the
subject's own, mean over the drawn of the greatest cosine. The features are the base's own, so no other model is needed: its hidden
layer in the middle on a slightly noised picture without a prompt (DIFT, Tang et al. 2023, arXiv:2306.03881), every channel in units
of its spread over the base's pictures, the greatest over the picture, less the base's mean. (Averages over the picture
see its background: on the demo the base is then at .99 of an octopus it never saw, by the greatest at .54.) Drift is the change of the velocity for ordinary prompts on the base's own
pictures, relative to it. When `patience` looks gain less than `gain`, or one drifts beyond `max_drift`, the run ends with the
weights of the best look that does not. Looks follow from the weights alone, so a resumed run has the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from models.engine.loop import Trainer
from models.engine.randomness import Randomness
from models.engine.watch import BestWeights
from models.engine.weights import with_weights
from models.networks.denoiser import Denoiser
from models.personalization.config import UntilLearntConfig
from models.personalization.dreambooth import Pictures
from models.pretraining.flow_matching import noised

FEATURE_TIME = 0.25  # of the noised picture whose hidden layer is looked at
DRIFT_TIMES = (0.3, 0.6, 0.9)
PLAYER, PREFIX = "denoiser", "denoiser."


@dataclass(frozen=True)
class Look:
    """What one set of weights knows."""

    step: int
    similarity: float  # -1 to 1
    drift: float  # 0: the base


class LearningWatch:
    """A Watch of the loop for DreamBooth's denoiser.

    `draw` makes pictures [N, 3, H, W] of the subject with a denoiser; `own` are the subject's [M, 3, H, W], `ordinary` the
    base's own with their prompts, `null` the features [1, T, D] and mask [1, T] of no prompt.
    """

    def __init__(
        self, config: UntilLearntConfig, adapted: Denoiser, base: Denoiser, draw: Callable[[Denoiser], torch.Tensor],
        own: torch.Tensor, ordinary: Pictures, null: tuple[torch.Tensor, torch.Tensor],
    ) -> None:  # fmt: skip
        self.config, self.adapted, self.base, self.draw = config, adapted, base, draw
        device = base.device
        self.ordinary = Pictures(ordinary.images.to(device), ordinary.tokens.to(device), ordinary.mask.to(device))
        self.null = (null[0].to(device), null[1].to(device))
        plain = self._hidden(self.ordinary.images)
        self.mean, self.spread = plain.mean((0, 1)), plain.std((0, 1))
        self.centre = self._greatest(self.ordinary.images).mean(0)
        self.own = self._features(own)
        self.looks: list[Look] = []
        self.best = BestWeights(PLAYER)
        self.best_at, self.ended = 0, False

    @property
    def every(self) -> int:
        """Steps between looks."""
        return self.config.every

    @torch.no_grad()
    def look(self, trainer: Trainer) -> None:
        """Measure the averaged weights; end the run, with the best ones, where nothing more is to be had."""
        average = trainer.emas[PLAYER].average
        net = with_weights(self.adapted, {name.removeprefix(PREFIX): value for name, value in average.items()})
        found = Look(trainer.step, self.similarity(self.draw(net)), self.drift(net.eval()))
        self.looks.append(found)
        drifted, first = found.drift > self.config.max_drift, not self.best.kept
        if first or (not drifted and found.similarity > self.looks[self.best_at].similarity):
            self.best.keep(trainer)
            self.best_at = len(self.looks) - 1
        if drifted or self.settled or trainer.step >= trainer.config.steps:
            self.ended = True
            self.best.restore(trainer)

    @property
    def settled(self) -> bool:
        """Whether the last `patience` looks are no nearer than one before, by the least gain."""
        seen, patience = [look.similarity for look in self.looks], self.config.patience
        return len(seen) > patience and max(seen[-patience:]) < max(seen[:-patience]) + self.config.gain

    def similarity(self, pictures: torch.Tensor) -> float:
        """Mean over pictures [N, 3, H, W] of the greatest cosine to one of the subject's own."""
        return float((self._features(pictures) @ self.own.T).max(1).values.mean())

    @torch.no_grad()
    def drift(self, net: Denoiser) -> float:
        """|v - v_base|^2 over |v_base|^2 for ordinary prompts."""
        asked, changed, size = self.ordinary, 0.0, 0.0
        for t in DRIFT_TIMES:
            now, eps = self._times(len(asked), t), self._noise(f"drift {t}", asked.images)
            x_t = noised(asked.images, eps, now)
            v, v_base = (each.as_velocity(each.predict(x_t, now, asked.tokens, asked.mask)[0], x_t, now)
                         for each in (net, self.base))  # fmt: skip
            changed, size = changed + float((v - v_base).square().sum()), size + float(v_base.square().sum())
        return changed / size

    def report(self) -> dict[str, Any]:
        """Looks and the step whose weights were taken, for the stage's facts."""
        return {"looks": [asdict(look) for look in self.looks], "taken": self.looks[self.best_at].step}

    def state(self) -> dict[str, torch.Tensor]:
        """Looks, best weights and counters as tensors."""
        table = torch.tensor([astuple(look) for look in self.looks], dtype=torch.float64)
        counters = torch.tensor([self.best_at, int(self.ended)])
        return {"looks": table, "counters": counters} | self.best.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        self.looks = [Look(int(row[0]), row[1], row[2]) for row in tensors["looks"].tolist()]
        self.best_at, ended = tensors["counters"].tolist()
        self.ended = bool(ended)
        self.best.load_state(tensors)

    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Rows [N, W] of length 1."""
        return F.normalize(self._greatest(pictures) - self.centre, dim=1)

    def _greatest(self, pictures: torch.Tensor) -> torch.Tensor:
        """The greatest of every channel over each picture [N, W]."""
        return ((self._hidden(pictures) - self.mean) / self.spread).amax(1)

    @torch.no_grad()
    def _hidden(self, pictures: torch.Tensor) -> torch.Tensor:
        """The base's hidden layer [N, L, W]."""
        pictures = pictures.to(self.base.device)
        b, now = len(pictures), self._times(len(pictures), FEATURE_TIME)
        x_t = noised(pictures, self._noise("features", pictures[:1]).expand_as(pictures), now)
        tokens, mask = (each.expand(b, *each.shape[1:]) for each in self.null)
        hidden = self.base.predict(x_t, now, tokens, mask, self.base.depth // 2)[1]
        assert hidden is not None
        return hidden

    def _times(self, count: int, t: float) -> torch.Tensor:
        return torch.full((count,), t, device=self.base.device)

    def _noise(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return Randomness(0, 0, tuple(range(len(like))), self.base.device).normal(name, tuple(like.shape[1:]))
