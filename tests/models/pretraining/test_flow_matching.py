import math
from dataclasses import replace

import pytest
import torch

from models.engine.objective import COUNT, SUM, Batch, divided
from models.engine.randomness import Randomness
from models.networks.denoiser import T_CLAMP, velocity_of
from models.pretraining.config import FlowMatchingConfig, RepaConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching, noised, velocity_error
from models.pretraining.repa import Projector, Repa
from models.pretraining.timesteps import apply_shift, sample_times, shift_of

UNIFORM = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def test_path_and_velocity_agree_with_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0.1, 0.4, 0.5, 0.9, 1.0])
    x_t = noised(x_0, eps, t)
    torch.testing.assert_close(velocity_of(x_0, x_t, t), eps - x_0, atol=2e-5, rtol=1e-4)


def test_loss_is_the_velocity_error_and_its_gradient_is_analytic() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, guess = torch.randn(2, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.01, 0.2, 0.6, 1.0], dtype=torch.float64)
    guess.requires_grad_()
    velocity_error(guess, x_0, t).mean().backward()
    scale = t.clamp_min(T_CLAMP).view(-1, 1, 1, 1) ** 2
    torch.testing.assert_close(guess.grad, 2 * (guess.detach() - x_0) / scale / x_0.numel())


@pytest.mark.parametrize(
    ("std", "density", "floor"),
    [
        (1.0, "uniform", math.pi / 2),
        (1.0, "logit_normal", 1.7413),
        (0.5, "uniform", 0.7852),
        (0.5, "logit_normal", 0.8108),
    ],
)
def test_optimal_predictor_on_gaussian_data_reaches_the_irreducible_loss(std, density, floor) -> None:
    """Data N(0, s^2): E[x_0 | x_t] is linear and the loss is s^2 / ((1-t)^2 s^2 + t^2), averaged over the density."""
    generator = torch.Generator().manual_seed(0)
    n = 400_000
    t = sample_times(
        torch.rand(n, generator=generator, dtype=torch.float64), 64, TimestepConfig(density=density)
    ).double()
    x_0 = std * torch.randn(n, generator=generator, dtype=torch.float64)
    eps = torch.randn(n, generator=generator, dtype=torch.float64)
    x_t = (1 - t) * x_0 + t * eps
    best = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * x_t
    velocity = (x_t - best) / t.clamp_min(1e-4)
    assert float((velocity - (eps - x_0)).square().mean()) == pytest.approx(floor, rel=0.02)


def test_logit_normal_quantiles_and_the_sign_of_its_mean() -> None:
    t = sample_times(UNIFORM, 64, TimestepConfig(mean=0.5, std=0.8))
    z = torch.special.ndtri(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    expected = torch.sigmoid(0.5 + 0.8 * z)
    torch.testing.assert_close(torch.quantile(t[::4].double(), torch.tensor([0.1, 0.5, 0.9]).double()), expected,
                               atol=1e-4, rtol=0)  # fmt: skip
    assert sample_times(UNIFORM, 64, TimestepConfig(mean=1.0)).mean() > 0.6  # a positive mean is more noise


def test_shift_identities() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(apply_shift(apply_shift(t, 3.0), 0.5), apply_shift(t, 1.5))
    torch.testing.assert_close(apply_shift(t, 1.0), t)
    assert apply_shift(t, 4.0)[[0, -1]].tolist() == [0.0, 1.0]
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(apply_shift(torch.sigmoid(z), 2.0), torch.sigmoid(z + math.log(2.0)))
    config = TimestepConfig(base_tokens=64)
    assert shift_of(64, config) == 1.0
    assert shift_of(1024, config) == 4.0
    assert sample_times(UNIFORM, 256, config).mean() > sample_times(UNIFORM, 64, config).mean()


def test_extreme_uniform_numbers_give_usable_times() -> None:
    t = sample_times(torch.tensor([0.0, 1.0 - 2**-24]), 64, TimestepConfig())
    assert bool(torch.isfinite(t).all())
    assert 0 <= float(t[0]) < float(t[1]) <= 1


def test_repa_ignores_the_teachers_scale_and_reads_its_order() -> None:
    repa = Repa(RepaConfig(coefficient=1.0), Projector(6, 8, 5, 0), steps=10)
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 6, 6, generator=generator), torch.randn(2, 2, 3, 5, generator=generator)
    loss = repa(hidden, teacher)
    torch.testing.assert_close(repa(hidden, 7 * teacher), loss)
    assert not torch.allclose(repa(hidden, teacher.flip(2)), loss)
    own = repa.projector(hidden).detach().reshape(2, 2, 3, 5)
    torch.testing.assert_close(repa(hidden, own), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(repa(hidden, -own), torch.full((2,), 2.0))
    with pytest.raises(ValueError, match="teacher grid 3x3 has 9 cells but the denoiser has 6 tokens"):
        repa(hidden, torch.randn(2, 3, 3, 5))


def test_repa_names_the_rows_whose_features_lie_on_another_grid(tiny, batches) -> None:
    """8 x 12 px in patches of 4 are 2 x 3 tokens; 3 x 2 cells are as many."""
    repa = Repa(RepaConfig(layer=1), Projector(32, 8, 10, 0), steps=10)
    objective = FlowMatching(tiny(0), TimestepConfig(), repa)
    batch = replace(batches(0), rows=(7, 8, 9, 10))
    objective.prepare(batch, Randomness(0, 0, batch.slots))
    turned = replace(batch, teacher=batch.teacher.transpose(1, 2))
    with pytest.raises(ValueError, match=r"rows \[7, 8, 9, 10\] have a teacher grid of 3x2, .* are 2x3 tokens"):
        objective.prepare(turned, Randomness(0, 0, batch.slots))


def test_repa_reaches_only_the_blocks_below_and_stops(tiny, batches) -> None:
    denoiser = tiny(0)
    repa = Repa(RepaConfig(coefficient=1.0, layer=1, until=0.5), Projector(32, 8, 10, 0), steps=10)
    objective = FlowMatching(denoiser, TimestepConfig(), repa)
    batch = objective.prepare(batches(0), Randomness(0, 0, (0, 1, 2, 3)))
    _, hidden = denoiser(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask, 1)
    repa(hidden, batch.teacher).mean().backward()
    blocks = denoiser.transformer.blocks
    assert all(float(b.gate_proj.weight.grad.abs().sum()) > 0 for b in blocks[:2])
    assert blocks[2].gate_proj.weight.grad is None
    objective.turns(4)
    assert "repa" in objective.loss("denoiser", batch).parts
    objective.turns(5)
    assert "repa" not in objective.loss("denoiser", batch).parts


def test_sample_weights_scale_each_samples_loss(tiny, batches) -> None:
    objective = FlowMatching(tiny(0), TimestepConfig())
    batch = objective.prepare(batches(0), Randomness(0, 0, (0, 1, 2, 3)))
    x_0, _ = objective.denoiser(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask)
    each = velocity_error(x_0, batch.images, batch.extra["t"])
    batch.weight = torch.tensor([2.0, 0.0, 1.0, 0.5])
    torch.testing.assert_close(objective.loss("denoiser", batch).total, (each * batch.weight).mean())


def test_a_repa_layer_beyond_the_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"repa.layer=9 but the network has depth=6"):
        FlowMatchingConfig(repa=RepaConfig(layer=9))


def test_times_follow_the_samples_own_token_count(tiny) -> None:
    objective = FlowMatching(tiny(0), TimestepConfig(base_tokens=4))
    slots = tuple(range(256))

    def mean_time(h: int, w: int) -> float:
        images = torch.zeros(256, 3, h, w)
        empty = Batch(images, torch.zeros(256, 1, 16), torch.ones(256, 1, dtype=torch.bool), slots)
        return float(objective.prepare(empty, Randomness(0, 0, slots)).extra["t"].mean())

    assert mean_time(8, 8) == pytest.approx(0.5, abs=0.05)
    assert mean_time(32, 32) > 0.65


def test_the_loss_by_time_is_the_mean_of_the_errors_in_each_part(tiny, batches) -> None:
    objective = FlowMatching(tiny(0), TimestepConfig(), bins=4)
    rows, errors = dict[str, float](), {place: list[float]() for place in range(4)}
    for step, times in enumerate(([0.0, 0.1, 0.25, 1.0], [0.2, 0.26, 0.3, 0.999])):  # none between .5 and .75
        batch = objective.prepare(batches(step), Randomness(0, step, (0, 1, 2, 3)))
        t = torch.tensor(times)
        batch.extra |= {"t": t, "x_t": noised(batch.images, batch.extra["eps"], t)}
        x_0, _ = objective.denoiser(batch.extra["x_t"], t, batch.tokens, batch.mask)
        for time, error in zip(times, velocity_error(x_0, batch.images, t).tolist(), strict=True):
            errors[min(int(4 * time), 3)].append(error)
        for name, value in objective.loss("denoiser", batch).numbers(1).items():
            rows[name] = rows.get(name, 0.0) + value / 2  # as a row of the log averages its steps
    assert rows[f"flow t=0-0.25{COUNT}"] == 1.5
    assert rows[f"flow t=0.5-0.75{SUM}"] == 0
    found = {name: value for name, value in divided(rows).items() if name.startswith("flow t=")}
    names = {0: "flow t=0-0.25", 1: "flow t=0.25-0.5", 3: "flow t=0.75-1"}
    assert found == pytest.approx({names[place]: sum(errors[place]) / len(errors[place]) for place in names})
