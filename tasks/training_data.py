"""Training batches from an encoded training set: the one place where curation's arrays become the engine's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from data_curation.dataset import Batch as DatasetBatch
from data_curation.dataset import TrainingSet
from infra.errors import ConfigError
from models.engine.distribute import world
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.codec import Scaling, drawn
from models.pretraining.config import SelectConfig

HELD_OUT_BATCH = 16


def local_slots(batch_size: int) -> tuple[int, ...]:
    """This worker's positions in the global batch."""
    rank, workers = world()
    if batch_size % workers:
        raise ConfigError(f"batch_size={batch_size} cannot be shared by {workers} workers; make it a multiple")
    local = batch_size // workers
    return tuple(range(rank * local, (rank + 1) * local))


def to_model(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class TrainingData:
    """An opened training set with its text statistics as tensors."""

    def __init__(self, folder: Path) -> None:
        self.set = TrainingSet.open(folder)
        self.text_mean = torch.from_numpy(self.set.mean)
        self.text_std = torch.from_numpy(self.set.std)
        self.scaling = None if (told := self.set.latent_scaling) is None else Scaling(*told)
        self.text_parts: tuple[torch.Tensor, ...] = ()  # [T, D] bool of each text encoder, where there are several

    def null(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and mask of the empty prompt, [1, T, D] and [1, T]."""
        return self.text([0])

    def text(self, ids: Sequence[int] | np.ndarray, max_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features float32 [B, T, D] and mask [B, T] of caption ids."""
        tokens, mask = self.set.text(ids, max_tokens)
        return torch.from_numpy(tokens).float(), torch.from_numpy(mask)

    def _without_encoders(self, tokens: torch.Tensor, share: float, rng: Randomness) -> torch.Tensor:
        """Tokens [B, T, D] in which each text encoder's part is that of the empty prompt in so many samples."""
        null = self.null()[0] if share > 0 else None
        for number, part in enumerate(self.text_parts if null is not None else ()):
            empty = (rng.uniform(f"empty encoder {number}") < share).view(-1, 1, 1)
            tokens = torch.where(empty & part, null, tokens)  # type: ignore[arg-type]
        return tokens

    def teacher_dim(self, select: SelectConfig) -> int:
        """Width of the cached teacher features; refused where a selected bucket has none."""
        chosen = self.set.select(select.resolutions, select.domains)
        widths = {self.set.teacher_width(bucket) for bucket in chosen.buckets}
        if 0 in widths:
            raise ConfigError(
                f"REPA on resolutions {select.resolutions} needs teacher features of all of them; "
                "add them to data.encode.teacher_resolutions, or set repa to null"
            )
        return widths.pop()

    def held_out(self, select: SelectConfig, pictures: int) -> list[Batch]:
        """At most so many pictures of the validation split, evenly over its rows, with short captions; one bucket a batch."""
        chosen = self.set.select(select.resolutions, select.domains, "validation")
        rows = np.sort(np.concatenate(list(chosen.buckets.values())))
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(pictures, len(rows))).astype(int))]
        found = []
        for bucket, members in chosen.buckets.items():
            own = rows[np.isin(rows, members)]
            for ids in np.split(own, range(HELD_OUT_BATCH, len(own), HELD_OUT_BATCH)) if len(own) else ():
                part = DatasetBatch(bucket, chosen.positions[ids], ids)
                gathered = self.set.gather(part)
                images = to_model(gathered.images)
                if self.scaling is not None:
                    moments = torch.from_numpy(self.set.latents(part))
                    images = drawn(moments, torch.zeros_like(moments[:, : moments.shape[1] // 2]), self.scaling)
                tokens, mask = self.text(gathered.short)
                found.append(Batch(images, tokens, mask, tuple(range(len(ids))), rows=tuple(ids.tolist())))
        return found

    def batches(
        self,
        select: SelectConfig,
        batch_size: int,
        seed: int,
        teacher: bool,
        first_step: int = 0,
        past: Sequence[TrainingData] = (),
    ) -> Callable[[int], Batch]:
        """This worker's batch as a pure function of the step; epochs are counted from `first_step`.

        With `past`, replay draws from those sets, by their sizes.
        """
        if past and select.replay > 0:
            return _replaying(
                self.batches(select.model_copy(update={"replay": 0.0}), batch_size, seed, teacher, first_step),
                [each.batches(select.model_copy(update={"replay": 0.0, "domains": None}), batch_size, seed, teacher, first_step)
                 for each in past],
                [each.set.index.num_rows for each in past], select.replay, seed,
            )  # fmt: skip
        slots = local_slots(batch_size)
        groups = [select.resolutions] if select.shares is None else [(side,) for side in select.resolutions]
        bounds = np.cumsum(select.shares or (1.0,))
        main = [self.set.select(group, select.domains) for group in groups]
        replay = [self.set.select(group) for group in groups] if select.replay > 0 else main

        def batch(step: int) -> Batch:
            rng = Randomness(seed, step, slots)
            replayed = select.replay > 0 and float(torch.rand((), generator=rng.shared("replay"))) < select.replay
            place = float(torch.rand((), generator=rng.shared("resolution"))) * bounds[-1] if len(groups) > 1 else 0.0
            source = (replay if replayed else main)[int(np.searchsorted(bounds, place, side="right"))]
            ids = source.batch(step - first_step, batch_size, seed)
            part = type(ids)(ids.bucket, ids.positions[list(slots)], ids.rows[list(slots)])
            rows = self.set.gather(part)
            captions = rows.short
            if select.long_captions > 0:
                captions = np.where(rng.uniform("long caption").numpy() < select.long_captions, rows.long, captions)
            if select.empty_captions > 0:
                captions = np.where(rng.uniform("empty caption").numpy() < select.empty_captions, 0, captions)
            tokens, mask = self.text(captions)
            tokens = self._without_encoders(tokens, select.empty_encoders, rng)
            features = torch.from_numpy(rows.teacher) if teacher else None
            if self.scaling is None:
                images = to_model(rows.images)
            else:
                moments = torch.from_numpy(self.set.latents(part))
                eps = rng.normal("posterior", (moments.shape[1] // 2, *moments.shape[2:]))
                images = drawn(moments, eps, self.scaling)
            return Batch(
                images, tokens, mask, slots, features,
                rows=tuple(part.rows.tolist()),
            )  # fmt: skip

        return batch


def _replaying(
    main: Callable[[int], Batch], past: Sequence[Callable[[int], Batch]], sizes: Sequence[int], share: float, seed: int
) -> Callable[[int], Batch]:
    """A share of the steps from past sets, the larger the oftener; all workers choose alike."""
    bounds = np.cumsum(sizes) / sum(sizes)

    def batch(step: int) -> Batch:
        rng = Randomness(seed, step, (0,))
        if float(torch.rand((), generator=rng.shared("replay"))) >= share:
            return main(step)
        place = float(torch.rand((), generator=rng.shared("past set")))
        return past[int(np.searchsorted(bounds, place, side="right"))](step)

    return batch
