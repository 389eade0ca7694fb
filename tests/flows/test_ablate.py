import pytest

from flows.ablate import changed, paired
from models.pretraining.config import FlowMatchingConfig


def test_an_arm_changes_what_the_switch_names_and_no_more() -> None:
    stage = FlowMatchingConfig()
    other = changed(stage, {"timesteps.shift": "none"}, 0.5)
    assert (other.timesteps.shift, other.train.steps) == ("none", 1500)
    assert other.select == stage.select
    without = FlowMatchingConfig(repa=None)
    assert changed(without, {"repa.until": 1.0}, 1.0) == without


def test_paired_differences_have_the_t_interval() -> None:
    gap = paired([0.9, 0.8, 0.85], [0.8, 0.75, 0.75])
    assert gap["difference"] == pytest.approx(0.08333, abs=1e-5)
    assert gap["high"] - gap["difference"] == pytest.approx(4.303 * 0.028868 / 3**0.5, abs=1e-4)
