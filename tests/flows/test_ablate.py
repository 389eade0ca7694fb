import json
import math

import pytest

from flows.ablate import SWITCHES, ablate, arm, changed, seconds_a_picture, summary, teacher_seconds
from flows.config import LifecycleConfig, PosttrainConfig
from flows.dag import latents
from flows.nightly import begin
from flows.run import LogDisplay
from infra.config import load_yaml, parse
from infra.errors import ConfigError
from infra.storage import open_store
from models.evaluation.intervals import paired
from models.networks.config import LatentPrxConfig
from models.pretraining.autoencoder_config import AutoencoderConfig
from models.pretraining.config import FlowMatchingConfig
from tasks.config import ModelConfig


def test_an_arm_changes_what_the_switch_names_and_no_more() -> None:
    stage = FlowMatchingConfig()
    other = changed(stage, {"timesteps.shift": "none"}, 0.5)
    assert (other.timesteps.shift, other.train.steps) == ("none", 1500)
    assert other.select == stage.select
    without = FlowMatchingConfig(repa=None)
    assert changed(without, {"repa.until": 1.0}, 1.0) == without
    assert changed(stage, {"tread": {"share": 0.5, "first": 2, "last": 2}}, 1.0).tread is not None


def test_paired_differences_have_the_t_interval() -> None:
    gap = paired([0.9, 0.8, 0.85], [0.8, 0.75, 0.75])
    assert gap["difference"] == pytest.approx(0.08333, abs=1e-5)
    assert gap["high"] - gap["difference"] == pytest.approx(4.303 * 0.028868 / 3**0.5, abs=1e-4)


def test_arms_in_latents_are_built_around_the_vae_and_read_its_training_set() -> None:
    latent = FlowMatchingConfig(network=LatentPrxConfig(), repa=None)
    config = LifecycleConfig(autoencoder=AutoencoderConfig(), pretrain=(latent,))
    assert [spec.name for spec in latents(config)] == ["autoencoder", "features"]
    (spec,) = arm(config, "with", {}, 0, 1.0)
    assert spec.inputs == {"data": "features", "frozen": "autoencoder"}
    assert arm(LifecycleConfig(), "with", {}, 0, 1.0)[0].inputs == {"data": "encode"}


def test_own_data_and_foreign_models_have_no_judge_for_arms_and_nights(tmp_path) -> None:
    config = LifecycleConfig(model=ModelConfig(source=str(tmp_path)), posttrain=PosttrainConfig(dpo=None))
    with pytest.raises(ConfigError, match="foreign model does not know; set model to null"):
        ablate(config, "repa", 2, 1.0, tmp_path, LogDisplay())
    with pytest.raises(ConfigError, match="foreign model does not know; set model to null"):
        begin(open_store(tmp_path / "root"), config)
    own = LifecycleConfig(judge=None, posttrain=PosttrainConfig(dpo=None))
    with pytest.raises(ConfigError, match="arms are judged by the demo's scenes, and judge is null"):
        ablate(own, "repa", 2, 1.0, tmp_path, LogDisplay())
    with pytest.raises(ConfigError, match="a night is judged by the demo's scenes, and judge is null"):
        begin(open_store(tmp_path / "root"), own)


BUCKETS = {"32:32x32": 100, "40:40x40": 10, "40:48x32": 20}


def test_the_teacher_is_paid_for_once_a_picture_by_the_arm_that_reads_its_features() -> None:
    low = FlowMatchingConfig(name="low", select={"resolutions": [32]})
    high = FlowMatchingConfig(name="high", select={"resolutions": [32, 40]}, repa=None)

    def paid(*stages: FlowMatchingConfig, switch: str = "repa", side: int = 0) -> float:
        config = LifecycleConfig(pretrain=stages, data={"encode": {"teacher_resolutions": (32, 40)}})
        chain = arm(config, "with", SWITCHES[switch][side], 0, 1.0)
        return teacher_seconds(chain, BUCKETS, lambda width, height: width * height)

    square = 100 * 32 * 32
    assert paid(low, high) == paid(low, low.model_copy(update={"name": "again"})) == square
    assert paid(low, high, side=1) == 0  # without REPA
    everything = low.model_copy(update={"select": high.select})
    assert paid(everything) == square + 10 * 40 * 40 + 20 * 48 * 32
    for free in ({"kind": "dispersive"}, {"teacher": "packaged"}):  # without an encoder, or timed with its stage
        assert paid(FlowMatchingConfig(repa=free)) == 0
    phases = [{"from_samples": 0}, {"from_samples": 24, "select": {"resolutions": [40]}, "repa": False}]
    assert paid(FlowMatchingConfig(select={"resolutions": [32]}, curriculum=phases), switch="density") == square


def test_a_larger_picture_costs_its_teacher_more() -> None:
    assert 0 < seconds_a_picture(16, 16) < seconds_a_picture(64, 64)


def test_a_summary_pairs_the_seeds_and_says_what_time_was_spent() -> None:
    accuracy = {("with", 0): 0.5, ("with", 1): 0.7, ("without", 0): 0.4, ("without", 1): 0.4,
                ("timed", 0): 0.6, ("timed", 1): 0.6}  # fmt: skip
    spent = {("with", 0): 10.0, ("with", 1): 12.0, ("without", 0): 5.0, ("without", 1): 6.0}
    taught = {(name, seed): 3.0 if name == "with" else 0.0 for name, seed in spent}
    told = json.loads(json.dumps(summary("repa", 2, accuracy, spent, taught, 0.5), allow_nan=False))
    assert (told["name"], told["seeds"], told["share_of_steps"]) == ("ablate-repa", [0, 1], 0.5)
    assert (told["value"], told["peer"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert told["accuracy"]["timed"] == [0.6, 0.6]
    half = 12.706 * math.sqrt(0.02) / math.sqrt(2)  # gaps .1 and .3
    assert told["equal_samples"] == {"difference": 0.2, "low": round(0.2 - half, 5), "high": round(0.2 + half, 5)}
    assert told["equal_time"]["difference"] == pytest.approx(0.0)
    assert told["seconds"] == {"with": [10.0, 12.0], "without": [5.0, 6.0]}
    assert told["teacher_seconds"] == {"with": 3.0, "without": 0.0}


@pytest.mark.lifecycle
def test_a_switch_is_measured_on_the_smoke_preset(smoke, tmp_path) -> None:
    settings = [*smoke.short, f"run.root={tmp_path / 'root'}"]
    config = parse(LifecycleConfig, load_yaml(smoke.preset, settings), "smoke")
    told = ablate(config, "repa", 2, 0.5, tmp_path / "out", LogDisplay())
    assert json.loads((tmp_path / "out" / "ablate-repa.json").read_text()) == told
    assert {name: len(values) for name, values in told["accuracy"].items()} == {"with": 2, "without": 2, "timed": 2}
    assert all(0 <= value <= 1 for values in told["accuracy"].values() for value in values)
    assert told["teacher_seconds"]["with"] > 0 == told["teacher_seconds"]["without"]
    assert min(told["seconds"]["with"]) > told["teacher_seconds"]["with"]
    assert told["equal_time"]["low"] <= told["equal_time"]["difference"] <= told["equal_time"]["high"]
