"""What each worker reads, through a training set on disk: 500 random (workers, batch size, buckets, cut) cases."""

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from models.engine.objective import Batch
from models.pretraining.config import SelectConfig
from tasks.training_data import TrainingData

CASES, MORE = 500, 3  # steps after the first epoch
COUNTS = {8: {"a": 7, "b": 1}, 12: {"a": 3, "b": 11}, 16: {"a": 13, "b": 5}}  # side -> pictures of each domain
DOMAINS = (("a",), ("b",), ("a", "b"))


@pytest.fixture
def data(tmp_path) -> TrainingData:
    """Three buckets of two domains; a picture's grey level is its row."""
    index, images = list[dict[str, object]](), dict[int, list[int]]()
    for side, domains in COUNTS.items():
        for domain in (name for name, count in domains.items() for _ in range(count)):
            images.setdefault(side, []).append(len(index))
            index.append({"row_id": str(len(index)), "resolution": side, "width": side, "height": side,
                          "position": len(images[side]) - 1, "caption_short": 1, "caption_long": 1, "domain": domain,
                          "split": "train"})  # fmt: skip
    write_table(index, INDEX_SCHEMA, tmp_path / "index.parquet")
    write_table([{"id": i, "text": text} for i, text in enumerate(("", "it"))], CAPTIONS_SCHEMA, tmp_path / "captions.parquet")  # fmt: skip
    save_file({"tokens": np.ones((2, 4), np.float16), "offsets": np.array([0, 1, 2]), "mean": np.zeros(4, np.float32),
               "std": np.ones(4, np.float32)}, tmp_path / "text.safetensors")  # fmt: skip
    for side, levels in images.items():
        pixels = np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), side, side, 3)).copy()
        teacher = np.zeros((len(levels), 1, 1, 0), np.float16)
        save_file({"images": pixels, "teacher": teacher}, tmp_path / f"images-{side}x{side}.safetensors")
    return TrainingData(tmp_path)


def test_order_and_multiset_survive_any_cut_and_any_number_of_workers(data, monkeypatch) -> None:
    """What another number of workers reads after a cut goes on where the first stopped; an epoch has every row."""

    def workers_of(count: int, select: SelectConfig, batch_size: int, seed: int) -> list[Callable[[int], Batch]]:
        made = []
        for rank in range(count):
            monkeypatch.setattr("tasks.training_data.world", lambda rank=rank: (rank, count))
            made.append(data.batches(select, batch_size, seed, teacher=False))
        return made

    def read(workers: list[Callable[[int], Batch]], step: int) -> list[int]:
        parts = [worker(step) for worker in workers]
        assert {len(part.rows) for part in parts} == {len(parts[0].rows)}
        levels = [int(v) for part in parts for v in ((part.images[:, 0, 0, 0] + 1) * 127.5).round()]
        rows = [row for part in parts for row in part.rows]
        assert levels == rows
        assert [slot for part in parts for slot in part.slots] == list(range(len(rows)))
        return rows

    rng = random.Random(0)
    for _ in range(CASES):
        before, after = rng.choice([1, 2, 4]), rng.choice([1, 2, 4])
        batch_size, seed = 4 * rng.randint(1, 3), rng.randint(0, 9)
        sides = tuple(sorted(rng.sample(sorted(COUNTS), rng.randint(1, len(COUNTS)))))
        select = SelectConfig(resolutions=sides, domains=rng.choice(DOMAINS))
        whole = data.set.select(select.resolutions, select.domains)
        epoch = whole.steps_per_epoch(batch_size)
        cut = rng.randrange(epoch + MORE)
        first, second = (workers_of(count, select, batch_size, seed) for count in (before, after))
        seen = [read(first if step < cut else second, step) for step in range(epoch + MORE)]
        assert seen == [whole.batch(step, batch_size, seed).rows.tolist() for step in range(epoch + MORE)]
        counted = Counter(row for rows in seen[:epoch] for row in rows)
        for rows in whole.buckets.values():  # a bucket's last batch is filled up from its own start
            times = [counted.pop(row) for row in rows.tolist()]
            assert min(times) >= 1
            assert sum(times) == len(rows) + -len(rows) % batch_size
        assert not counted
