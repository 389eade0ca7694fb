"""The loader against what it feeds: batches of an encoded training set, and training steps of the demo's network.

value: median seconds of a training step (batch 12, REPA, Muon and AdamW, one thread); peer: median seconds of loading
its batch (pictures, captions, teacher features; any order, no prefetching), taken in turn in one process. Bar: 5.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.record import record
from benchmarks.training_speed import demo_trainer
from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from infra.arrays import save_arrays
from models.engine.randomness import Randomness
from models.pretraining.config import SelectConfig
from tasks.training_data import TrainingData

ROWS, CAPTIONS, BATCH, ROUNDS, BAR = 8_000, 3_000, 12, 60, 5.0


def write_set(folder: Path) -> None:
    """An encoded set of the demo's size with random content: 32 px pictures, 6 to 24 tokens a caption."""
    rng = np.random.default_rng(0)
    index = [
        {"row_id": str(i), "resolution": 32, "width": 32, "height": 32, "position": i, "domain": "basic",
         "caption_short": int(rng.integers(CAPTIONS)), "caption_long": int(rng.integers(CAPTIONS)), "split": "train"}
        for i in range(ROWS)
    ]  # fmt: skip
    write_table(index, INDEX_SCHEMA, folder / "index.parquet")
    write_table([{"id": i, "text": str(i)} for i in range(CAPTIONS)], CAPTIONS_SCHEMA, folder / "captions.parquet")
    offsets = np.concatenate([[0], np.cumsum(rng.integers(6, 25, CAPTIONS))])
    tokens = rng.standard_normal((offsets[-1], 384), dtype=np.float32).astype(np.float16)
    statistics_of = {"mean": np.zeros(384, np.float32), "std": np.ones(384, np.float32)}
    save_arrays(folder / "text.safetensors", {"tokens": tokens, "offsets": offsets.astype(np.int64), **statistics_of})
    save_arrays(
        folder / "images-32x32.safetensors",
        {
            "images": rng.integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8),
            "teacher": rng.standard_normal((ROWS, 8, 8, 40), dtype=np.float32).astype(np.float16),
        },
    )


def main() -> dict[str, Any]:
    """Load a batch, train on it, again and again."""
    torch.set_num_threads(1)
    loading, training = [], []
    with TemporaryDirectory() as folder:
        write_set(Path(folder))
        batches = TrainingData(Path(folder)).batches(SelectConfig(long_captions=0.2), BATCH, 0, teacher=True)
        trainer = demo_trainer(Path(folder) / "scratch")
        for step in range(ROUNDS):
            marks = [time.perf_counter()]
            batch = batches(step)
            marks.append(time.perf_counter())
            trainer.move(trainer.objective.prepare(batch, Randomness(0, step, batch.slots)))
            marks.append(time.perf_counter())
            loading.append(marks[1] - marks[0])
            training.append(marks[2] - marks[1])
    value, peer = statistics.median(training[5:]), statistics.median(loading[5:])
    detail = {"pictures_per_second": BATCH / peer, "rows": ROWS, "batch_size": BATCH}
    return record("loader", [0], value, peer, BAR, value / peer >= BAR, detail)


if __name__ == "__main__":
    print(json.dumps(main()))
