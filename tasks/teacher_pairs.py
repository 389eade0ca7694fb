"""Stage function that stores the teacher's pictures with the seed of their noise, and the batches made of them.

Sharded and idempotent: a shard that is there is not drawn again, and a pair depends on nothing but its own number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from data_curation.dataset import TrainingSet
from infra.arrays import save_arrays
from infra.errors import ConfigError, DataRefused
from infra.stages import StageContext
from models.distillation.config import PairStoreConfig
from models.engine.config import TrainConfig
from models.engine.distribute import one_thread
from models.engine.objective import Batch
from models.engine.randomness import derive_seed, shuffled
from models.sampling.generate import load_generator
from tasks.training_data import TrainingData, local_slots


def noise_of(seed: int, height: int, width: int) -> torch.Tensor:
    """The noise [3, H, W] a stored seed stands for; the sampler draws the same."""
    return torch.randn((3, height, width), generator=torch.Generator().manual_seed(seed))


def teacher_pairs(config: PairStoreConfig, ctx: StageContext) -> dict[str, Any]:
    """shard-*.safetensors with pictures, pairs.parquet with seed, caption and shard row, store.json with the teacher."""
    captions = chosen_captions(config, ctx.inputs["data"])
    seeds = [derive_seed(config.seed, "teacher pair", i) for i in range(config.count)]
    starts = range(0, config.count, config.shard_rows)
    parts = [slice(start, min(start + config.shard_rows, config.count)) for start in starts]
    paths = [ctx.scratch / f"shard-{i:05d}.safetensors" for i in range(len(parts))]
    missing = [
        (config, ctx.inputs["init"], [text for _, text in captions[part]], seeds[part], path)
        for part, path in zip(parts, paths, strict=True)
        if not path.exists()
    ]
    ctx.fan_out(draw_shard, missing)
    for path in paths:
        (ctx.out / path.name).write_bytes(path.read_bytes())
    table = {"seed": seeds, "caption": [i for i, _ in captions], "prompt": [text for _, text in captions]}
    pq.write_table(pa.table(table), ctx.out / "pairs.parquet")
    store = {
        "teacher": ctx.parents["init"].digest, "steps": config.steps, "guidance": config.guidance, "solver": "euler",
        "side": config.resolution, "count": config.count, "shards": [path.name for path in paths],
    }  # fmt: skip
    (ctx.out / "store.json").write_text(json.dumps(store, indent=1, sort_keys=True))
    return {"pairs": config.count, "shards": len(paths), "drawn": len(missing)}


def chosen_captions(config: PairStoreConfig, folder: Path) -> list[tuple[int, str]]:
    """(caption id, text) of each pair: captions of training pictures, drawn with replacement."""
    data = TrainingSet.open(folder)
    split = np.flatnonzero(np.array(data.index["split"].to_pylist()) == "train")
    if not len(split):
        raise DataRefused(f"training set {folder.name} has no training rows; run the data stages again")
    rng = np.random.default_rng([config.seed, 79])
    rows = split[rng.integers(len(split), size=config.count)]
    long = rng.random(config.count) < config.long_captions
    short_ids, long_ids = (data.index[name].to_numpy() for name in ("caption_short", "caption_long"))
    ids = np.where(long, long_ids[rows], short_ids[rows])
    return [(int(i), data.captions[i]) for i in ids]


def draw_shard(item: tuple[PairStoreConfig, Path, list[str], list[int], Path]) -> None:
    """One shard, complete or not there."""
    config, checkpoint, prompts, seeds, path = item
    with one_thread():
        generator = load_generator(checkpoint)
        distilled = generator.card.distilled  # a second reflow's pairs come from a student without guidance
        side, guidance = config.resolution, 1.0 if distilled else config.guidance
        images = generator.draw(prompts, seeds, width=side, height=side, steps=config.steps, guidance=guidance)
    partial = path.with_suffix(".partial")
    save_arrays(partial, {"images": images, "seeds": np.array(seeds, np.int64)})
    partial.rename(path)


class PairStore:
    """An opened pair store."""

    def __init__(self, folder: Path, teachers: Sequence[str]) -> None:
        self.about = json.loads((folder / "store.json").read_text())
        if self.about["teacher"] not in teachers:
            raise ConfigError(
                f"pair store {folder.name} was made by {self.about['teacher']}, this stage learns from "
                f"{' or '.join(teachers)}; make the pairs of that checkpoint"
            )
        table = pq.read_table(folder / "pairs.parquet")
        self.seeds: list[int] = table["seed"].to_pylist()
        self.captions = table["caption"].to_numpy()
        shards = [load_file(folder / name) for name in self.about["shards"]]
        self.images = np.concatenate([shard["images"] for shard in shards])  # [N, 3, H, W] float32
        stored = np.concatenate([shard["seeds"] for shard in shards])
        if stored.tolist() != self.seeds:
            raise DataRefused(f"pair store {folder.name}: seeds of shards and table differ; make the pairs again")

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.seeds)


def pair_batches(
    folder: Path, teachers: Sequence[str], data: TrainingData, config: TrainConfig
) -> Callable[[int], Batch]:
    """This worker's pairs as a pure function of the step: a fresh permutation each epoch.

    `teachers` are the digests of the checkpoints whose pairs are accepted.
    """
    store, size, slots = PairStore(folder, teachers), config.batch_size, local_slots(config.batch_size)
    height, width = store.images.shape[2:]

    def batch(step: int) -> Batch:
        rows = shuffled(config.seed, "pair order", len(store), [step * size + slot for slot in slots]).tolist()
        tokens, mask = data.text(store.captions[rows])
        noise = torch.stack([noise_of(store.seeds[row], height, width) for row in rows])
        images = torch.from_numpy(store.images[rows])
        return Batch(images, tokens, mask, slots, extra={"noise": noise})

    return batch
