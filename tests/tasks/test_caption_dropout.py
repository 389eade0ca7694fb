"""Caption dropout of the training batches: its share, and that what is dropped becomes the empty prompt."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from models.pretraining.config import SelectConfig
from tasks.training_data import TrainingData

STEPS, SIZE = 250, 8
LENGTHS = (1, 2, 4)  # tokens of the empty, the short and the long caption: which one it is shows in the mask


@pytest.fixture
def data(tmp_path):
    index = [
        {"row_id": str(i), "resolution": 8, "width": 8, "height": 8, "position": i, "caption_short": 1, "caption_long": 2,
         "domain": "basic", "split": "train"} for i in range(16)
    ]  # fmt: skip
    write_table(index, INDEX_SCHEMA, tmp_path / "index.parquet")
    captions = [{"id": i, "text": text} for i, text in enumerate(("", "short", "long"))]
    write_table(captions, CAPTIONS_SCHEMA, tmp_path / "captions.parquet")
    offsets = np.cumsum([0, *LENGTHS])
    tokens = np.repeat(np.arange(1, 4, dtype=np.float16), LENGTHS)[:, None]
    save_file({"tokens": tokens, "offsets": offsets, "mean": np.zeros(1, np.float32), "std": np.ones(1, np.float32)},
              tmp_path / "text.safetensors")  # fmt: skip
    save_file({"images": np.zeros((16, 8, 8, 3), np.uint8), "teacher": np.zeros((16, 2, 2, 0), np.float16)},
              tmp_path / "images-8x8.safetensors")  # fmt: skip
    return TrainingData(tmp_path)


def read(data, empty: float, long: float) -> np.ndarray:
    """Caption ids of all samples, told by the number of tokens; features and mask must be that caption's own."""
    batches = data.batches(
        SelectConfig(resolutions=(8,), empty_captions=empty, long_captions=long), SIZE, 0, teacher=False
    )
    found = []
    for step in range(STEPS):
        batch = batches(step)
        lengths = batch.mask.sum(1)
        ids = torch.tensor([LENGTHS.index(int(n)) for n in lengths])
        tokens, mask = data.text(ids.numpy())
        assert torch.equal(batch.mask, mask)
        assert torch.equal(batch.tokens, tokens)
        found.append(ids.numpy())
    return np.concatenate(found)


@pytest.mark.parametrize(("empty", "long"), [(0.0, 0.5), (0.1, 0.0), (0.25, 0.8)])
def test_the_share_of_empty_prompts_is_what_was_asked_whatever_the_wording(data, empty, long) -> None:
    ids = read(data, empty, long)
    error = 3 * (empty * (1 - empty) / len(ids)) ** 0.5
    assert (ids == 0).mean() == pytest.approx(empty, abs=error)
    kept = ids[ids > 0]
    if len(kept):
        assert (kept == 2).mean() == pytest.approx(long, abs=3 * (long * (1 - long) / len(kept)) ** 0.5)


def test_a_dropped_caption_has_the_features_of_the_empty_prompt(data) -> None:
    batch = data.batches(SelectConfig(resolutions=(8,), empty_captions=0.5), SIZE, 0, teacher=False)(0)
    tokens, mask = data.null()
    dropped = batch.mask.sum(1) == LENGTHS[0]
    assert 0 < dropped.sum() < SIZE
    width = tokens.shape[1]
    for kept, null in ((batch.tokens[dropped], tokens), (batch.mask[dropped], mask)):
        assert torch.equal(kept[:, :width], null.expand_as(kept[:, :width]))
        assert not kept[:, width:].any()
