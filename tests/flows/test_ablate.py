import pytest

from flows.ablate import ablate, arm, changed
from flows.config import LifecycleConfig, PosttrainConfig
from flows.dag import latents
from flows.nightly import begin
from flows.run import LogDisplay
from infra.errors import ConfigError
from infra.storage import open_store
from models.evaluation.intervals import paired
from models.networks.config import LatentPrxConfig
from models.pretraining.config import AutoencoderConfig, FlowMatchingConfig
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
