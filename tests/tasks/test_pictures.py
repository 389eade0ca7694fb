"""Pictures of fixed captions where no judge is: held-out captions come first, the same noise for all, real ones beside."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from data_curation.dataset import TrainingSet
from data_curation.encode import INDEX_SCHEMA
from data_curation.manifest import write_table
from models.sampling.generate import load_generator
from tasks.config import PicturesConfig
from tasks.pictures import draw_pictures


def test_every_checkpoint_draws_the_same_captions_held_out_ones_first(inputs, context, tmp_path) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs["data"], data)
    rows = pq.read_table(data / "index.parquet").to_pylist()
    for i, row in enumerate(rows):  # eight pictures, the last two held out, captions 1 to 7 and one of them twice
        row |= {"caption_short": min(i + 1, 7), "split": "validation" if i >= 6 else "train"}
    write_table(rows, INDEX_SCHEMA, data / "index.parquet")
    given = {"data": data, "sft": inputs["init"], "again": inputs["init"]}
    ctx = context("pictures", given, tmp_path)
    facts = draw_pictures(PicturesConfig(prompts=5, seed=3), ctx)
    grid = json.loads((ctx.out / "grid.json").read_text())
    captions = TrainingSet.open(data).captions
    assert facts == {"prompts": 5, "held_out": 1, "checkpoints": 2}
    assert grid["stages"] == ["sft", "again", "real"]
    assert grid["held_out"] == [True, False, False, False, False]
    assert grid["prompts"][0] == captions[7] and len(set(grid["prompts"])) == 5
    assert grid["seeds"] == [3, 4, 5, 6, 7]

    def seen(stage: str) -> np.ndarray:
        folder = ctx.out / "samples" / stage
        return np.stack([np.asarray(Image.open(folder / f"{i}-{seed}.png")) for i, seed in enumerate(grid["seeds"])])

    wanted = load_generator(inputs["init"]).sample(grid["prompts"], grid["seeds"])
    assert (seen("sft") == wanted).all() and (seen("again") == wanted).all()
    stored = TrainingSet.open(data)
    places = [captions.index(prompt) - 1 for prompt in grid["prompts"][1:]]  # of the trained ones
    (bucket,) = stored.select([32]).buckets
    real = stored._bucket(bucket)[0]
    assert (seen("real")[1:] == real[places]).all()
    assert Image.open(ctx.out / "samples" / "sft.png").size == (5 * 96, 96)
