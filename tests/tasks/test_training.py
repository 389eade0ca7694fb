"""The flow-matching stage as it is run: what it writes, tells and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file

from infra.artifacts import Artifact
from infra.errors import ConfigError, DataRefused, LifecycleError
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from infra.storage import Store, open_store
from models.networks import prx
from models.networks.checkpoint import SamplingCard, read_card
from models.pretraining.config import FlowMatchingConfig, ShiftConfig
from models.pretraining.curriculum import phases_of
from tasks.catalog import spec_of
from tasks.stage import job_of, perform
from tasks.training import card_of, flow_matching
from tasks.training_checks import refuse_other_space, refuse_other_text, refuse_uneven
from tasks.training_data import TrainingData

NETWORK = {"hidden_size": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
TRAIN = {"steps": 4, "batch_size": 2, "log_every": 2, "checkpoint_every": 2, "ema_gamma": 0.0}


def settings(**more: Any) -> FlowMatchingConfig:
    base = {"name": "flow", "network": NETWORK, "train": TRAIN, "repa": None, "select": {"empty_captions": 0.0}}
    return FlowMatchingConfig.model_validate({**base, **more})


def performed(config: FlowMatchingConfig, data: Path, root: Path) -> tuple[Store, Artifact]:
    """The stage's artifact, from an encoded training set."""
    store = open_store(str(root))
    staged = store.scratch("data", "0") / "out"
    shutil.copytree(data, staged)
    artifacts = {"data": store.commit("data", "0", "training-set", staged, [], {})}
    artifact = perform(
        job_of(spec_of("flow", "flow_matching", config, data="data"), store, artifacts, Resources()), store
    )
    assert artifact is not None
    return store, artifact


def spoilt(data: Path, steps: range, value: float, folder: Path) -> Path:
    """The training set of eight pictures with a text of `value` under those that only these steps of an epoch read."""
    shutil.copytree(data, folder)
    batches = TrainingData(folder).batches(settings().select, 2, 0, teacher=False)
    broken = {row for step in steps for row in batches(step).rows}
    index = pq.read_table(folder / "index.parquet")
    captions = [2 if row in broken else 1 for row in range(index.num_rows)]
    place = index.schema.get_field_index("caption_short")
    column = np.array(captions, index.schema.field("caption_short").type.to_pandas_dtype())
    pq.write_table(index.set_column(place, index.schema.field("caption_short"), [column]), folder / "index.parquet")
    text = load_file(folder / "text.safetensors")
    text["tokens"][text["offsets"][2] :] = value
    save_file(text, folder / "text.safetensors")
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("steps", [range(3, 4), range(2, 4)], ids=["last", "last-window"])
def test_steps_left_out_at_the_end_do_not_lose_the_run(value, steps, inputs, tmp_path: Path) -> None:
    data = spoilt(inputs["data"], steps, value, tmp_path / "data")
    store, artifact = performed(settings(), data, tmp_path / "root")
    rows = [json.loads(line, parse_constant=pytest.fail) for line in
            (store.local(artifact) / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert [row.get("skipped_steps", 0) for row in rows] == [0, len(steps)]
    assert "loss" in rows[0]
    assert ("loss" in rows[1]) == (len(steps) == 1)  # the mean of the steps that were taken
    assert artifact.facts["last"] == rows[-1]
    weights = load_file(store.local(artifact) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(np.isfinite(value).all() for value in weights.values())


def test_a_run_of_steps_left_out_ends_the_stage(inputs, tmp_path: Path) -> None:
    data = spoilt(inputs["data"], range(4), np.nan, tmp_path / "data")
    with pytest.raises(LifecycleError, match=r"not finite in 20 steps running up to step 19; lower the learning rate"):
        performed(settings(train={**TRAIN, "steps": 30}), data, tmp_path / "root")


LATE_TIMES = {"shift": "static", "static_shift": 2.5, "density": "uniform"}


def test_a_curriculum_is_sampled_with_the_shift_it_ends_with(inputs, tmp_path: Path) -> None:
    config = settings(curriculum=[{"from_samples": 0}, {"from_samples": 4, "timesteps": LATE_TIMES}])
    store, artifact = performed(config, inputs["data"], tmp_path)
    card = read_card(store.local(artifact))
    assert (card.shift, card.static_shift) == ("static", 2.5)
    assert card.shift_rule == ShiftConfig(shift="static", static_shift=2.5)
    shifted = [t / (2.5 - 1.5 * t) for t in np.linspace(0, 1, 11)]  # where the shift by 2.5 puts a tenth comes from
    assert artifact.facts["times"] == pytest.approx(np.diff(shifted), abs=1e-4)


def test_a_card_without_curriculum_is_the_stages_times() -> None:
    """Its bytes are part of a checkpoint's digest."""
    config = settings(timesteps={"shift": "exponential", "max_mu": 1.0})
    told = json.loads(card_of(config, None).model_dump_json())
    assert (told["shift"], told["max_mu"]) == ("exponential", 1.0)
    plain = json.loads(card_of(settings(), None).model_dump_json())
    assert plain == json.loads(SamplingCard().model_dump_json())
    assert card_of(settings(curriculum=[{"from_samples": 0}, {"from_samples": 4}]), None) == card_of(settings(), None)


def test_every_phase_is_shared_by_the_workers_and_cut_into_parts_before_the_first_step(
    inputs, tmp_path, monkeypatch
) -> None:
    config = settings(train={**TRAIN, "batch_size": 4, "accumulate": 2},
                      curriculum=[{"from_samples": 0}, {"from_samples": 8, "batch_size": 6}])  # fmt: skip
    refuse_uneven(phases_of(config), 2, "flow")
    monkeypatch.setattr("tasks.training_checks.world", lambda: (0, 2))
    with pytest.raises(ConfigError, match=r"'flow': batch_size=6 from step 2 on .* accumulate=2 equal parts on each of 2 "
                                          r"workers; make it a multiple of 4"):  # fmt: skip
        flow_matching(
            config,
            StageContext(
                "flow", {"data": inputs["data"]}, {}, tmp_path, tmp_path, Resources(), no_progress, fan_out_here
            ),
        )


def altered(data: Path, folder: Path, **text: Any) -> Path:
    """The training set with other text features."""
    shutil.copytree(data, folder)
    save_file(load_file(folder / "text.safetensors") | text, folder / "text.safetensors")
    return folder


def test_text_the_network_cannot_read_is_refused(inputs, tmp_path: Path) -> None:
    some = {"tokens": np.ones((15, 7), np.float16), "mean": np.zeros(7, np.float32), "std": np.ones(7, np.float32)}
    narrow = altered(inputs["data"], tmp_path / "narrow", **some)
    with pytest.raises(ConfigError, match=r"'flow': its network reads text features of 384 numbers a token, .* have 7; set "
                                          r"network.text_dim to 7"):  # fmt: skip
        performed(settings(), narrow, tmp_path / "a")
    store, artifact = performed(settings(network={**NETWORK, "text_dim": 7}), narrow, tmp_path / "b")
    trained = store.local(artifact) / "transformer"
    with pytest.raises(ConfigError, match=r"'flow': its network reads .* of 7 numbers a token, .* have 384"):
        refuse_other_text(settings().network, trained, TrainingData(inputs["data"]), 64, "flow")
    tokens, offsets = np.ones((80, 384), np.float16), np.array([0, 2, 5, *range(6, 15), 80])
    long = altered(inputs["data"], tmp_path / "long", tokens=tokens, offsets=offsets)
    with pytest.raises(ConfigError, match=r"captions of 66 tokens, .* at most prompt_max_tokens=64; raise"):
        performed(settings(), long, tmp_path / "c")
    performed(settings(network={**NETWORK, "prompt_max_tokens": 66}), long, tmp_path / "d")


def test_pictures_and_latents_of_another_space_are_refused(inputs, tiny_latents, tmp_path: Path) -> None:
    pixels = prx.build(settings().network, torch.zeros(384), torch.ones(384), 0)
    latents = prx.build(settings().network, torch.zeros(384), torch.ones(384), 0, 16, "velocity")
    plain, encoded = TrainingData(inputs["data"]), TrainingData(tiny_latents)
    refuse_other_space(pixels, plain, "flow")
    with pytest.raises(ConfigError, match="'flow': its network takes 16 channels, but its training set has no latents"):
        refuse_other_space(latents, plain, "flow")
    with pytest.raises(ConfigError, match="'flow': its network takes 3 channels, but its training set has latents"):
        refuse_other_space(pixels, encoded, "flow")
    with pytest.raises(
        ConfigError, match="takes latents of 16 channels, but its training set's have 4; make the set with"
    ):
        refuse_other_space(latents, encoded, "flow")
    refuse_other_space(
        prx.build(settings().network, torch.zeros(384), torch.ones(384), 0, 4, "velocity"), encoded, "flow"
    )


@pytest.fixture
def tiny_latents(inputs, tmp_path: Path) -> Path:
    """The training set with cached latents of four channels."""
    folder = tmp_path / "latents"
    shutil.copytree(inputs["data"], folder)
    (folder / "latents.json").write_text('{"scale": 1.0, "shift": 0.0}')
    save_file({"moments": np.zeros((8, 8, 4, 4), np.float32)}, folder / "latents-32x32.safetensors")
    return folder


def test_a_training_set_without_columns_or_rows_is_refused(inputs, tmp_path: Path) -> None:
    for name in ("lacking", "empty"):
        shutil.copytree(inputs["data"], tmp_path / name)
    index = pq.read_table(inputs["data"] / "index.parquet")
    pq.write_table(index.drop_columns(["caption_long", "split"]), tmp_path / "lacking" / "index.parquet")
    pq.write_table(index.slice(0, 0), tmp_path / "empty" / "index.parquet")
    with pytest.raises(DataRefused, match="lacking: index.parquet lacks the columns caption_long, split; make it with"):
        TrainingData(tmp_path / "lacking")
    with pytest.raises(DataRefused, match="empty: index.parquet has 0 rows; loosen a filter"):
        TrainingData(tmp_path / "empty").set.select((32,))


def test_a_disk_that_fills_up_in_a_checkpoint_is_told_and_the_run_goes_on_when_there_is_room(
    inputs, tmp_path: Path, monkeypatch
) -> None:
    """Safetensors raises an error of its own, in which the system's is only words."""
    calls = []

    def fills_up(tensors, path: Path) -> None:
        calls.append(path)
        if len(calls) == 6:  # in the second checkpoint
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        torch_save_file(tensors, path)

    straight, whole = performed(settings(), inputs["data"], tmp_path / "straight")
    monkeypatch.setattr("models.engine.state.save_file", fills_up)
    with pytest.raises(
        LifecycleError, match=r"'flow' stopped: the disk under .* is full; free some space and run again"
    ):
        performed(settings(), inputs["data"], tmp_path / "full")
    assert len(list((tmp_path / "full").rglob("state.json"))) == 1  # the first checkpoint stands
    shutil.rmtree(tmp_path / "full" / "data", ignore_errors=True)
    _, resumed = performed(settings(), inputs["data"], tmp_path / "full")
    assert resumed.digest == whole.digest
    assert straight.local(whole).exists()
