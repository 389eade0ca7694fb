"""Reader of a training set: which rows a step sees is a pure function of (seed, step), so a resumed run needs no state.

Shapes: N rows of a bucket, B rows of a batch, H x W picture px, T text tokens (longest of the batch), D = 384.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from infra.errors import DataRefused

Split = Literal["train", "validation"]
COLUMNS = ("resolution", "width", "height", "position", "caption_short", "caption_long", "domain", "split")


@dataclass(frozen=True)
class Batch:
    """What one step reads: rows of one bucket; `positions` count inside its tensors, `rows` inside index.parquet."""

    bucket: tuple[int, int]  # width, height
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Gathered:
    """The arrays of one batch."""

    images: NDArray[np.uint8]  # [B, H, W, 3]
    short: NDArray[np.int64]  # [B] caption ids
    long: NDArray[np.int64]  # [B] caption ids
    teacher: NDArray[np.float16]  # [B, H/4, W/4, 40]


@dataclass(frozen=True)
class Selection:
    """Rows of a training set grouped by bucket, and the order in which an epoch visits them."""

    buckets: dict[tuple[int, int], NDArray[np.int64]]  # (width, height) -> index rows
    positions: NDArray[np.int64]  # index row -> position in its bucket's tensors
    _plans: dict[tuple[int, int, int], list[tuple[tuple[int, int], NDArray[np.int64]]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.buckets.values())

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of one pass; a bucket's last batch is filled up from its own start, so no row is left out."""
        return sum(-(-len(rows) // batch_size) for rows in self.buckets.values())

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of a global step; the same answer in every process, whatever was asked before."""
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        bucket, rows = self._plan(batch_size, seed, epoch)[place]
        return Batch(bucket, self.positions[rows], rows)

    def _plan(self, batch_size: int, seed: int, epoch: int) -> list[tuple[tuple[int, int], NDArray[np.int64]]]:
        key = (batch_size, seed, epoch)
        if key not in self._plans:
            rng = np.random.default_rng([seed, epoch])
            plan = []
            for bucket, rows in sorted(self.buckets.items()):
                filled = np.resize(rng.permutation(rows), -(-len(rows) // batch_size) * batch_size)
                plan += [(bucket, part) for part in filled.reshape(-1, batch_size)]
            self._plans.clear()
            self._plans[key] = [plan[i] for i in rng.permutation(len(plan))]
        return self._plans[key]


class TrainingSet:
    """An encoded training set on disk (written by `encode`); tensors are read when a bucket is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = pq.read_table(folder / "index.parquet")
        self.captions: list[str] = pq.read_table(folder / "captions.parquet")["text"].to_pylist()
        text = load_file(folder / "text.safetensors")
        self._tokens, self._offsets = text["tokens"], text["offsets"]
        self.mean, self.std = text["mean"], text["std"]
        self._short = self.index["caption_short"].to_numpy().astype(np.int64)
        self._long = self.index["caption_long"].to_numpy().astype(np.int64)
        self._pictures: dict[tuple[int, int], tuple[NDArray[np.uint8], NDArray[np.float16]]] = {}
        self._latents: dict[tuple[int, int], NDArray[np.float32]] = {}

    @classmethod
    def open(cls, folder: Path) -> TrainingSet:
        """Open the output folder of the encode stage."""
        if not (folder / "index.parquet").exists():
            raise DataRefused(f"training set {folder}: no index.parquet; give the output folder of the encode stage")
        table = pq.read_schema(folder / "index.parquet")
        if missing := [name for name in COLUMNS if name not in table.names]:
            raise DataRefused(
                f"training set {folder}: index.parquet lacks the columns {', '.join(missing)}; make it with the encode stage"
            )
        return cls(folder)

    def select(
        self, resolutions: Sequence[int], domains: Sequence[str] | None = None, split: Split = "train"
    ) -> Selection:
        """Rows of the given resolutions (bucket sides), domains (None: all) and split."""
        if not self.index.num_rows:
            raise DataRefused(
                f"training set {self.folder}: index.parquet has 0 rows; loosen a filter, then encode again"
            )
        wanted = pc.and_(
            pc.is_in(self.index["resolution"], value_set=_column(self.index, "resolution", resolutions)),
            pc.equal(self.index["split"], split),
        )
        if domains is not None:
            wanted = pc.and_(wanted, pc.is_in(self.index["domain"], value_set=_column(self.index, "domain", domains)))
        rows = np.flatnonzero(wanted.to_numpy(zero_copy_only=False)).astype(np.int64)
        if not len(rows):
            have = sorted(set(self.index["resolution"].to_pylist())), sorted(set(self.index["domain"].to_pylist()))
            raise DataRefused(
                f"training set {self.folder.name}: no {split} rows for resolutions {tuple(resolutions)} and domains "
                f"{domains}; it has resolutions {have[0]} and domains {have[1]}"
            )
        size = np.stack([self.index["width"].to_numpy(), self.index["height"].to_numpy()], axis=1)[rows]
        buckets = {(int(w), int(h)): rows[(size == (w, h)).all(axis=1)] for w, h in np.unique(size, axis=0)}
        return Selection(buckets, self.index["position"].to_numpy().astype(np.int64))

    def teacher_width(self, bucket: tuple[int, int]) -> int:
        """Channels of a bucket's teacher features; 0 where the encode stage made none."""
        return int(self._bucket(bucket)[1].shape[-1])

    def gather(self, batch: Batch) -> Gathered:
        """Pictures, caption ids and teacher features of a batch."""
        images, teacher = self._bucket(batch.bucket)
        return Gathered(
            images[batch.positions], self._short[batch.rows], self._long[batch.rows], teacher[batch.positions]
        )

    @property
    def latent_scaling(self) -> tuple[float, float] | None:
        """Scale and shift of cached latents; None where pictures were not encoded by a VAE."""
        path = self.folder / "latents.json"
        if not path.exists():
            return None
        told = json.loads(path.read_text())
        return float(told["scale"]), float(told["shift"])

    @property
    def latent_channels(self) -> int | None:
        """Channels of the cached latents; None where there are none."""
        for path in sorted(self.folder.glob("latents-*.safetensors"))[:1]:
            with safe_open(path, framework="np") as file:
                return int(file.get_slice("moments").get_shape()[1]) // 2
        return None

    @property
    def longest_text(self) -> int:
        """Tokens of the longest caption."""
        return int(np.diff(self._offsets).max())

    def latents(self, batch: Batch) -> NDArray[np.float32]:
        """Cached posteriors of a batch, mean and log-variance [B, 2C, H / f, W / f]."""
        if batch.bucket not in self._latents:
            path = self.folder / f"latents-{batch.bucket[0]}x{batch.bucket[1]}.safetensors"
            self._latents[batch.bucket] = load_file(path)["moments"]
        return self._latents[batch.bucket][batch.positions]

    def text(
        self, ids: Sequence[int] | NDArray[np.int64], max_tokens: int | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """Text features of caption ids (0: the empty prompt) as stored, padded with zeros: ([B, T, D], mask [B, T])."""
        ids = np.asarray(ids, np.int64)
        starts = self._offsets[ids]
        lengths = self._offsets[ids + 1] - starts
        if max_tokens is not None:
            lengths = np.minimum(lengths, max_tokens)
        width = int(lengths.max()) if max_tokens is None else max_tokens
        tokens = np.zeros((len(ids), width, self._tokens.shape[1]), np.float16)
        for row, start, length in zip(tokens, starts, lengths, strict=True):
            row[:length] = self._tokens[start : start + length]
        return tokens, np.arange(width) < lengths[:, None]

    def _bucket(self, bucket: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        if bucket not in self._pictures:
            with safe_open(self.folder / f"images-{bucket[0]}x{bucket[1]}.safetensors", framework="np") as file:
                self._pictures[bucket] = (file.get_tensor("images"), file.get_tensor("teacher"))
        return self._pictures[bucket]


def _column(index, name: str, values: Sequence[object]):  # type: ignore[no-untyped-def]
    import pyarrow as pa

    return pa.array(list(values), index.schema.field(name).type)
