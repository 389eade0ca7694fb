import math

import pytest
import torch

from models.engine.randomness import Randomness
from models.posttraining.config import DpoConfig
from models.posttraining.diffusion_dpo import DiffusionDpo

SLOTS = (0, 1, 2, 3)


def prepared(objective: DiffusionDpo, batches):
    return objective.prepare(batches(0), Randomness(0, 0, SLOTS))


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
def test_loss_at_the_reference_is_ln_2_for_any_beta(tiny, batches, beta) -> None:
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(beta_per_element=beta, anchor=0.0))
    loss = objective.loss("denoiser", prepared(objective, batches))
    assert loss.total.item() == pytest.approx(math.log(2), abs=1e-6)
    assert float(loss.parts["implicit_accuracy"]) == 0.5


def gradients(objective: DiffusionDpo, batch) -> torch.Tensor:
    objective.denoiser.zero_grad()
    objective.loss("denoiser", batch).total.backward()
    return torch.cat([p.grad.reshape(-1) for p in objective.denoiser.parameters() if p.grad is not None])


def test_swapping_winner_and_loser_flips_the_gradient(tiny, batches) -> None:
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(anchor=0.0))
    batch = batches(0)
    forward = gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS)))
    batch.images, batch.extra = batch.extra["loser"], {"loser": batch.images}
    backward = gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS)))
    torch.testing.assert_close(forward, -backward, atol=1e-5, rtol=1e-3)
    assert forward.norm() > 0


def test_identical_pictures_give_no_gradient(tiny, batches) -> None:
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(anchor=0.0))
    batch = batches(0)
    ordinary = gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS))).norm()
    batch.extra = {"loser": batch.images.clone()}
    assert gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS))).norm() < 1e-5 * ordinary


def test_one_step_prefers_the_winner_and_leaves_the_reference_alone(tiny, batches) -> None:
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(anchor=0.0))
    before = {k: v.clone() for k, v in objective.reference.state_dict().items()}
    batch = prepared(objective, batches)
    gradients(objective, batch)
    with torch.no_grad():
        for parameter in objective.denoiser.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    parts = objective.loss("denoiser", batch).parts
    assert parts["winner_change"] < parts["loser_change"]
    assert all(torch.equal(before[k], v) for k, v in objective.reference.state_dict().items())


def test_anchor_is_flow_matching_on_the_winner_in_units_of_half_beta(tiny, batches) -> None:
    config = DpoConfig(beta_per_element=0.2, anchor=0.5)
    objective, plain = (DiffusionDpo(tiny(0), tiny(0), config.model_copy(update={"anchor": a})) for a in (0.5, 0.0))
    batch = prepared(objective, batches)
    winner = objective._errors(objective.denoiser, batch).chunk(2)[0].mean()
    half_beta = 0.2 * batch.images[0].numel() / 2
    added = objective.loss("denoiser", batch).total - plain.loss("denoiser", batch).total
    torch.testing.assert_close(added, 0.5 * half_beta * winner)
