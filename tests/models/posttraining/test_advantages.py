import pytest
import torch

from models.posttraining.advantages import group_advantages


@pytest.mark.parametrize("unit", ["group", "batch"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 7.0), (50.0, 0.0), (0.5, -3.0)])
def test_advantages_ignore_offset_and_scale(unit, scale, offset) -> None:
    rewards = 10 * torch.rand(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, taught = group_advantages(rewards, 4, unit)
    other, same = group_advantages(scale * rewards + offset, 4, unit)
    assert torch.equal(taught, same)
    assert found.abs().min() > 1e-3
    torch.testing.assert_close(other, found, atol=1e-3, rtol=0)  # SMOOTHING is added to a deviation of 1 or more


def test_advantages_of_idle_groups_are_0() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 4.0, 0.1, 0.1, 0.1, 0.1, float("nan"), 1.0, 2.0, 3.0]])
    found, taught = group_advantages(rewards, 4)
    assert taught.tolist() == [[True, False, False]]
    assert not found[0, 4:].any()
    assert found[0, :4].mean() == pytest.approx(0, abs=1e-6)
    assert found[0, :4].std(correction=0) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(group_advantages(50 * rewards + 7, 4)[0], found, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="groups of 5"):
        group_advantages(rewards, 5)


def test_pooled_unit_lets_a_nearly_tied_group_teach_little() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.50, 0.51, 0.50, 0.51, 2.0, 2.0, 2.0, float("nan")]])
    own, _ = group_advantages(rewards, 4)
    pooled, taught = group_advantages(rewards, 4, "batch")
    assert taught.tolist() == [[True, True, False]]
    assert own[0, 4:8].abs().min() > 0.9
    torch.testing.assert_close(pooled[0, 4:8] / pooled[0, :4], torch.full((4,), 0.01), atol=1e-4, rtol=0)
    assert not pooled[0, 8:].any()
