import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from infra.errors import ConfigError, DataRefused
from infra.stages import fan_out_here
from models.distillation.config import PairStoreConfig
from models.engine.config import TrainConfig
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig
from models.sampling.generate import load_generator
from tasks import teacher_pairs as module
from tasks.teacher_pairs import PairStore, noise_of, pair_batches, teacher_pairs


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A context for the stage, with a small random teacher."""
    teacher = prx.build(PrxConfig(hidden_size=32, depth=1, num_heads=2), torch.zeros(384), torch.ones(384), 0)
    with torch.no_grad():
        teacher.transformer.final_layer.linear.weight.normal_(std=0.1)
    write_checkpoint(tmp_path / "teacher", teacher, SamplingCard())
    texts = ["", "a cat", "two dogs", "a big red apple"]
    monkeypatch.setattr(
        module, "chosen_captions", lambda config, folder: [(1 + i % 3, texts[1 + i % 3]) for i in range(config.count)]
    )
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return SimpleNamespace(
        inputs={"init": tmp_path / "teacher", "data": tmp_path}, parents={"init": SimpleNamespace(digest="abc")},
        out=tmp_path / "out", scratch=tmp_path / "work", fan_out=fan_out_here,
    )  # fmt: skip


CONFIG = PairStoreConfig(count=5, steps=2, shard_rows=2, guidance=1.5)


def test_a_pair_is_what_the_sampler_draws_from_its_seed(stage) -> None:
    facts = teacher_pairs(CONFIG, stage)
    assert facts == {"pairs": 5, "shards": 3, "drawn": 3}
    store = PairStore(stage.out, ["abc"])
    assert len(store) == 5
    prompts = pq.read_table(stage.out / "pairs.parquet")["prompt"].to_pylist()
    again = load_generator(stage.inputs["init"]).draw(prompts, store.seeds, steps=2, guidance=1.5)
    np.testing.assert_allclose(store.images, again, atol=1e-5)
    batch = pair_batches(stage.out, ["abc"], _data(), TrainConfig(batch_size=4))(3)
    row = next(i for i in range(5) if np.array_equal(store.images[i], batch.images[0].numpy()))
    assert torch.equal(batch.extra["noise"][0], noise_of(store.seeds[row], 32, 32))


def _data():
    def text(ids):
        return torch.zeros(len(ids), 2, 384), torch.ones(len(ids), 2, dtype=torch.bool)

    return SimpleNamespace(text=text)


def test_shards_that_are_there_are_not_drawn_again(stage) -> None:
    teacher_pairs(CONFIG, stage)
    before = {path.name: path.read_bytes() for path in stage.out.iterdir()}
    (stage.scratch / "shard-00001.safetensors").unlink()  # as if killed in the middle
    assert teacher_pairs(CONFIG, stage)["drawn"] == 1
    assert {path.name: path.read_bytes() for path in stage.out.iterdir()} == before


def test_an_epoch_shows_every_pair_once_and_workers_share_it(stage) -> None:
    teacher_pairs(CONFIG, stage)
    batch = pair_batches(stage.out, ["abc"], _data(), TrainConfig(batch_size=5, seed=3))
    first, second = batch(0).images, batch(1).images
    assert len(torch.unique(first.flatten(1), dim=0)) == 5
    assert not torch.equal(first, second)
    assert torch.equal(batch(0).images, first)


def test_the_store_of_another_teacher_or_with_mixed_shards_is_refused(stage) -> None:
    teacher_pairs(CONFIG, stage)
    with pytest.raises(ConfigError, match="was made by abc, this stage learns from other"):
        PairStore(stage.out, ["other"])
    about = json.loads((stage.out / "store.json").read_text())
    wrong = {"images": np.zeros((2, 3, 32, 32), np.float32), "seeds": np.zeros(2, np.int64)}
    save_file(wrong, stage.out / about["shards"][0])
    with pytest.raises(DataRefused, match="seeds of shards and table differ"):
        PairStore(stage.out, ["abc"])
