from dataclasses import replace

import pytest
import torch

from models.engine.config import TrainConfig
from models.engine.precision import autocast
from models.engine.randomness import Randomness
from models.posttraining.config import NftConfig
from models.posttraining.diffusion_nft import DiffusionNft, scaled_error
from models.posttraining.reward import Weighted

TRAIN = TrainConfig(steps=4, batch_size=8, log_every=1, checkpoint_every=1)


def nft(tiny, sampling, reward, **fields) -> DiffusionNft:
    config = NftConfig.model_validate({"train": TRAIN.model_dump(), "group": 4, "kl": 0.0, "guard": None, **fields})
    return DiffusionNft(tiny(0), tiny(0) if config.kl > 0 else None, [Weighted(reward)], sampling, config)


def prepared(objective, grouped, share=None):
    batch = objective.prepare(grouped(0), Randomness(0, 0, tuple(range(8))))
    if share is not None:
        batch = replace(batch, extra={**batch.extra, "share": torch.full((8,), share)})
    return batch


def gradient(objective, batch) -> torch.Tensor:
    objective.policy.zero_grad()
    objective.loss("policy", batch).total.backward()
    return torch.cat([p.grad.reshape(-1) for p in objective.policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_branches_cancel_at_the_old_policy_with_half_shares(tiny, sampling, same, brightness, grouped, beta) -> None:
    objective = nft(tiny, sampling, same, beta=beta)
    batch = prepared(objective, grouped)
    assert torch.equal(batch.extra["share"], torch.full((8,), 0.5))
    assert gradient(objective, batch).abs().max() <= 1e-6
    uneven = nft(tiny, sampling, brightness, beta=beta)
    assert gradient(uneven, prepared(uneven, grouped)).abs().max() > 1e-4


def test_branches_cancel_in_half_precision_too(tiny, sampling, same, grouped) -> None:
    objective = nft(tiny, sampling, same, train={**TRAIN.model_dump(), "precision": "bf16"}, kl=0.1)
    batch = prepared(objective, grouped)
    with autocast(torch.device("cpu"), "bf16"):  # as the loop has it around the loss alone
        assert gradient(objective, batch).abs().max() <= 1e-6
        assert objective.loss("policy", batch).parts["drift"] == 0
    assert not torch.equal(batch.extra["x_0"], prepared(nft(tiny, sampling, same), grouped).extra["x_0"])


def test_full_share_and_beta_1_is_scaled_flow_matching_in_x_0(tiny, sampling, brightness, grouped) -> None:
    objective = nft(tiny, sampling, brightness)
    batch = prepared(objective, grouped, share=1.0)
    found = gradient(objective, batch)
    objective.policy.zero_grad()
    x, _ = objective.policy(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask)
    error = (x - batch.extra["x_0"]).flatten(1)
    (error.square().mean(1) / error.abs().mean(1).detach()).mean().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in objective.policy.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_scaled_error_does_not_differentiate_its_scale() -> None:
    x = torch.tensor([[2.0, -4.0]], requires_grad=True)
    scaled_error(x, torch.zeros(1, 2)).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, -4.0]]) / 3)


def test_a_move_nears_good_pictures_and_leaves_bad_ones(tiny, sampling, brightness, grouped) -> None:
    objective = nft(tiny, sampling, brightness)
    batch = prepared(objective, grouped)
    gradient(objective, batch)

    def errors():
        with torch.no_grad():
            x, _ = objective.policy(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask)
        return (x - batch.extra["x_0"]).square().mean((1, 2, 3))

    before = errors()
    with torch.no_grad():
        for parameter in objective.policy.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    assert ((errors() - before) * (batch.extra["share"] - 0.5)).sum() < 0


def test_the_old_policy_follows_and_is_saved(tiny, sampling, brightness) -> None:
    objective = nft(tiny, sampling, brightness, old_rate=0.1, old_most=0.5)
    with torch.no_grad():
        for parameter in objective.policy.parameters():
            parameter += 1.0
    start = {name: value.clone() for name, value in objective.state().items()}
    objective.after_step(3)
    moved = objective.state()
    for name, value in objective.policy.named_parameters():
        torch.testing.assert_close(moved[name], 0.3 * start[name] + 0.7 * value)
    again = nft(tiny, sampling, brightness)
    again.load_state(moved)
    assert all(torch.equal(value, moved[name]) for name, value in again.state().items())


def test_gradient_reaches_the_policy_only(tiny, sampling, brightness, grouped) -> None:
    objective = nft(tiny, sampling, brightness, kl=0.1)
    assert gradient(objective, prepared(objective, grouped)).norm() > 0
    frozen = [*objective.old.parameters(), *objective.reference.parameters()]
    assert all(p.grad is None for p in frozen)
