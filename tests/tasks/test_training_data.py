import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import save_file
from scipy.stats import binom

from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.encoders import encode_texts
from data_curation.manifest import write_table
from infra.errors import ConfigError, DataRefused
from models.networks import prx
from models.networks.checkpoint import SamplingCard
from models.networks.config import PrxConfig
from models.pretraining.config import FlowMatchingConfig, SelectConfig
from models.pretraining.curriculum import phases_of
from models.sampling.generate import Generator
from tasks.training import curriculum_batches, flow_matching, text_parts
from tasks.training_data import TrainingData

ROWS = {32: 24, 40: 112}  # the last 40 are held out
CHANNELS = {32: 5, 40: 0}


@pytest.fixture
def data(tmp_path):
    """An encoded training set of 24 pictures at 32 px and 72 at 40 px, with 40 held out there; every third one is of the extended domain."""
    index = [
        {"row_id": f"{side}-{i}", "resolution": side, "width": side, "height": side, "position": i, "caption_short": 1,
         "caption_long": 2, "domain": "extended" if i % 3 == 0 else "basic", "split": "validation" if side == 40 and i >= 72 else "train"}
        for side, count in ROWS.items() for i in range(count)
    ]  # fmt: skip
    write_table(index, INDEX_SCHEMA, tmp_path / "index.parquet")
    captions = [{"id": i, "text": text} for i, text in enumerate(("", "short", "long"))]
    write_table(captions, CAPTIONS_SCHEMA, tmp_path / "captions.parquet")
    save_file(
        {"tokens": np.ones((6, 4), np.float16), "offsets": np.array([0, 1, 3, 6]), "mean": np.zeros(4, np.float32),
         "std": np.ones(4, np.float32)},
        tmp_path / "text.safetensors",
    )  # fmt: skip
    for side, count in ROWS.items():
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, 3)).copy()
        teacher = np.zeros((count, side // 4, side // 4, CHANNELS[side]), np.float16)
        save_file({"images": images, "teacher": teacher}, tmp_path / f"images-{side}x{side}.safetensors")
    return TrainingData(tmp_path)


def sides(data, select, steps=400):
    batches = data.batches(select, 4, 0, teacher=False)
    return np.array([batches(step).images.shape[-1] for step in range(steps)])


def test_without_shares_a_resolution_comes_as_often_as_it_has_pictures(data) -> None:
    assert (sides(data, SelectConfig(resolutions=(32, 40))) == 32).mean() == pytest.approx(0.25, abs=0.01)


def test_shares_are_the_share_of_the_steps(data) -> None:
    select = SelectConfig(resolutions=(32, 40), shares=(0.8, 0.2))
    assert (sides(data, select) == 32).mean() == pytest.approx(0.8, abs=0.06)
    assert np.array_equal(sides(data, select)[100:], sides(data, select)[100:])  # a pure function of the step
    with pytest.raises(ValidationError, match="one positive share for each"):
        SelectConfig(resolutions=(32, 40), shares=(1.0,))


def test_replay_is_the_share_of_the_steps_that_read_every_domain(data) -> None:
    """Picture i is grey level i; the extended domain has every third one."""

    def foreign(replay: float) -> float:
        batches = data.batches(SelectConfig(domains=("extended",), replay=replay), 4, 0, teacher=False)
        levels = np.stack([((batches(step).images[:, 0, 0, 0] + 1) * 127.5).round() for step in range(400)])
        return float((levels % 3 != 0).mean())

    assert foreign(0.0) == 0
    assert foreign(0.6) == pytest.approx(0.6 * 2 / 3, abs=0.05)


def test_repa_on_a_resolution_without_teacher_features_is_refused(data) -> None:
    assert data.teacher_dim(SelectConfig(resolutions=(32,))) == 5
    with pytest.raises(ConfigError, match="data.encode.teacher_resolutions"):
        data.teacher_dim(SelectConfig(resolutions=(32, 40)))


def test_held_out_pictures_are_the_validation_split_evenly_taken(data) -> None:
    found = data.held_out(SelectConfig(resolutions=(32, 40)), 20)
    assert [len(batch.rows) for batch in found] == [16, 4]
    levels = torch.cat([((batch.images[:, 0, 0, 0] + 1) * 127.5).round() for batch in found]).int().tolist()
    assert len(set(levels)) == 20
    assert (min(levels), max(levels)) == (72, 111)
    assert len(data.held_out(SelectConfig(resolutions=(40,)), 1000)) == 3  # all forty
    with pytest.raises(DataRefused, match="no validation rows"):
        data.held_out(SelectConfig(resolutions=(32,)), 20)


def test_each_text_encoder_is_dropped_on_its_own(data, tmp_path) -> None:
    tokens = np.concatenate([np.full((2, 4), value, np.float16) for value in (0, 1, 2)])
    save_file({"tokens": tokens, "offsets": np.array([0, 2, 4, 6]), "mean": np.zeros(4, np.float32),
               "std": np.ones(4, np.float32)}, tmp_path / "text.safetensors")  # fmt: skip
    data = TrainingData(tmp_path)
    first = torch.zeros(2, 4, dtype=torch.bool)
    first[0] = True
    data.text_parts = (first, ~first)
    select = SelectConfig(resolutions=(32,), empty_captions=0.0, empty_encoders=0.3)
    batches = data.batches(select, 8, 0, teacher=False)
    seen = torch.cat([batches(step).tokens for step in range(200)])[..., 0]  # [N, 2]: what each encoder says
    empty = seen == 0
    assert empty.float().mean(0).numpy() == pytest.approx([0.3, 0.3], abs=0.04)
    assert (empty[:, 0] & empty[:, 1]).float().mean() == pytest.approx(0.09, abs=0.025)
    whole = data.batches(select.model_copy(update={"empty_encoders": 0.0}), 8, 0, teacher=False)
    assert (whole(0).tokens == 1).all()


def test_dropping_encoders_of_a_model_that_has_one_is_refused(data, tmp_path) -> None:
    config = FlowMatchingConfig(select=SelectConfig(empty_encoders=0.1))
    with pytest.raises(ConfigError, match="pretrain-32: select.empty_encoders is for SD3"):
        text_parts(config, phases_of(config), SamplingCard(), tmp_path, data)
    assert text_parts(FlowMatchingConfig(), phases_of(FlowMatchingConfig()), SamplingCard(), tmp_path, data) == ()


GROWING = {
    "name": "growing", "network": {"hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "text_dim": 4},
    "train": {"steps": 7, "batch_size": 6, "log_every": 1, "checkpoint_every": 1, "ema_gamma": 3.0},
    "repa": {"layer": 0, "hidden": 8, "until": 1.0}, "select": {"resolutions": [32], "empty_captions": 0.0},
    "curriculum": [
        {"from_samples": 0},
        {"from_samples": 18, "select": {"resolutions": [40], "long_captions": 1.0, "empty_captions": 0.0}, "repa": False},
    ],
}  # fmt: skip
EDGE = 3


def test_a_phase_reads_other_pictures_longer_captions_and_smaller_batches(data) -> None:
    phases = phases_of(FlowMatchingConfig.model_validate(GROWING))
    batches = curriculum_batches(data, phases, 0, teacher=True)
    read = [batches(step) for step in range(7)]
    assert [tuple(batch.images.shape) for batch in read] == [(6, 3, 32, 32)] * EDGE + [(4, 3, 40, 40)] * 4  # 6 x .8^2
    assert [set(batch.mask.sum(1).tolist()) for batch in read] == [{2}] * EDGE + [{3}] * 4
    levels = [((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for batch in read]
    assert len({level for batch in levels[:EDGE] for level in batch}) == 18  # none twice: an epoch begins with a phase
    assert len({level for batch in levels[EDGE:] for level in batch}) == 16


@pytest.mark.parametrize("kills", [(EDGE, EDGE + 1), (EDGE + 1, EDGE + 2)], ids=str)
def test_a_stage_killed_twice_where_its_phase_changes_resumes_to_the_bit(data, kills, context, tmp_path) -> None:
    """A report comes before its checkpoint, so the run that is killed at one goes on from the step before."""
    config, made = FlowMatchingConfig.model_validate(GROWING), {}

    def stop(at: int):
        def progress(done, total, numbers) -> None:
            if done == at:
                raise KeyboardInterrupt

        return progress

    for name in ("straight", "broken"):
        ctx = context(name, {"data": data.set.folder}, tmp_path)
        for kill in kills if name == "broken" else ():
            with pytest.raises(KeyboardInterrupt):
                flow_matching(config, replace(ctx, progress=stop(kill)))
        facts = flow_matching(config, ctx)
        assert facts["samples"] == EDGE * 6 + 4 * 4
        files = ("transformer/diffusion_pytorch_model.safetensors", "metrics.jsonl", "sampling.json")
        made[name] = [(ctx.out / file).read_bytes() for file in files]
    assert made["straight"] == made["broken"]
    rows = [json.loads(line) for line in made["straight"][1].splitlines()]
    assert ["repa" in row for row in rows] == [True] * EDGE + [False] * 4


def test_captions_are_dropped_at_the_rate_told_and_what_is_dropped_is_the_empty_prompt(data, tmp_path) -> None:
    """Every caption of its own value; the share is within the 99.9 % interval of a binomial of 2000 samples."""
    tokens = np.concatenate([np.full((count, 4), caption, np.float16) for caption, count in ((5, 1), (1, 2), (2, 3))])
    text = {"tokens": tokens, "offsets": np.array([0, 1, 3, 6])}
    save_file(text | {"mean": np.zeros(4, np.float32), "std": np.ones(4, np.float32)}, tmp_path / "text.safetensors")
    data = TrainingData(tmp_path)
    for share in (0.1, 0.3):
        select = SelectConfig(resolutions=(32,), empty_captions=share, long_captions=0.5)
        batches = data.batches(select, 8, 0, teacher=False)
        seen = [(values, int(mask.sum())) for step in range(250) for batch in [batches(step)]
                for values, mask in zip(batch.tokens, batch.mask, strict=True)]  # fmt: skip
        first = np.array([float(values[0, 0]) for values, _ in seen])
        low, high = binom.ppf([0.0005, 0.9995], len(seen), share)
        assert low <= (first == 5).sum() <= high
        dropped = [(values, length) for values, length in seen if values[0, 0] == 5]
        null, _ = data.null()
        assert all(
            length == 1 and torch.equal(values[:1], null[0]) and not values[1:].any() for values, length in dropped
        )
        kept = (1 - share) / 2  # the long and the short caption alike
        assert binom.ppf(0.0005, len(seen), kept) <= (first == 2).sum() <= binom.ppf(0.9995, len(seen), kept)


def test_the_stored_empty_prompt_is_the_samplers(data, tmp_path) -> None:
    states = encode_texts(["", "a cat", "a big dog on a green background"], 64)
    stored = {"tokens": np.concatenate(states), "offsets": np.cumsum([0, *map(len, states)])}
    save_file(
        stored | {"mean": np.zeros(384, np.float32), "std": np.ones(384, np.float32)}, tmp_path / "text.safetensors"
    )
    tokens, mask = TrainingData(tmp_path).null()
    network = prx.build(PrxConfig(hidden_size=32, depth=1, num_heads=2), torch.zeros(384), torch.ones(384), 0)
    sampled, read = Generator(network, SamplingCard()).features([""])
    assert int(read.sum()) == int(mask.sum()) == tokens.shape[1] == 2
    torch.testing.assert_close(sampled[:, :2], tokens, rtol=2**-10, atol=2**-10)  # an fp16's rounding
