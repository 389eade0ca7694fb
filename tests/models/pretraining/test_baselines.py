"""Objectives on one path agree with each other, with the papers' formulas and with diffusers' DDPM."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import nn

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.networks.prx import PrxDenoiser
from models.pretraining.baselines import Predictor, as_x_0, error, input_scale, target, vp_scale, weight
from models.pretraining.config import ObjectiveConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching, noised, velocity_error
from models.sampling.euler import grid, integrate

KINDS = ("x_0", "velocity", "ddpm_eps", "ddpm_v", "edm", "score")
CLOSE = {"atol": 1e-12, "rtol": 1e-10}


@pytest.fixture
def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, eps, guess = torch.randn(3, 9, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    return x_0, eps, t, guess


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_means_the_clean_picture(kind, samples) -> None:
    x_0, eps, t, _ = samples
    config = ObjectiveConfig(kind=kind, sigma_data=0.7)
    torch.testing.assert_close(as_x_0(target(x_0, eps, t, config), noised(x_0, eps, t), t, config), x_0, **CLOSE)
    assert float(error(target(x_0, eps, t, config), x_0, eps, t, config).max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_guess_of_the_picture_costs_the_same_under_every_objective_after_min_snr(kind, samples) -> None:
    """min-SNR names a weight on the x_0 error, so the objective's own weight must cancel exactly."""
    x_0, eps, t, guess = samples
    config = ObjectiveConfig(kind=kind, weight="min_snr", sigma_data=0.7)
    x_t = noised(x_0, eps, t)
    zero, one = (as_x_0(torch.full_like(x_0, v), x_t, t, config) for v in (0.0, 1.0))
    output = (guess - zero) / (one - zero)  # the answer that means `guess`
    torch.testing.assert_close(as_x_0(output, x_t, t, config), guess, **CLOSE)
    snr = ((1 - t) / t).square().clamp_max(5)
    torch.testing.assert_close(
        error(output, x_0, eps, t, config), snr * (guess - x_0).square().mean((1, 2, 3)), **CLOSE
    )


def test_ddpm_is_the_flow_at_another_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    x_0, eps = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    steps = torch.tensor([10, 200, 500, 800, 999])
    signal = scheduler.alphas_cumprod[steps].double().sqrt()
    noise = (1 - scheduler.alphas_cumprod[steps].double()).sqrt()
    t = noise / (signal + noise)
    theirs = scheduler.add_noise(x_0, eps, steps)
    ours = noised(x_0, eps, t) * vp_scale(t).view(-1, 1, 1, 1)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    velocity = scheduler.get_velocity(x_0, eps, steps)
    torch.testing.assert_close(target(x_0, eps, t, ObjectiveConfig(kind="ddpm_v")), velocity, atol=2e-6, rtol=0)
    snr = compute_snr(scheduler, steps).double()
    eps_weight = weight(t, ObjectiveConfig(kind="ddpm_eps", weight="min_snr"))
    torch.testing.assert_close(eps_weight, snr.clamp_max(5) / snr, atol=1e-5, rtol=1e-4)
    v_weight = weight(t, ObjectiveConfig(kind="ddpm_v", weight="min_snr"))
    torch.testing.assert_close(v_weight, snr.clamp_max(5) / (snr + 1), atol=1e-5, rtol=1e-4)


def test_noised_and_the_weights_of_sd3_are_diffusers() -> None:
    generator = torch.Generator().manual_seed(3)
    x_0, eps = torch.randn(2, 6, 3, 4, 4, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler()
    steps = scheduler.timesteps[[0, 5, 300, 700, 940, 949]]  # t from 1 down to .051
    t = steps / 1000
    assert torch.equal(noised(x_0, eps, t), scheduler.scale_noise(x_0, steps, eps))
    for name in ("sigma_sqrt", "cosmap"):
        want = compute_loss_weighting_for_sd3(name, t)
        torch.testing.assert_close(weight(t, ObjectiveConfig(weight=name)), want, atol=0, rtol=1e-6)
    assert float(weight(torch.zeros(1), ObjectiveConfig(weight="sigma_sqrt"))) == pytest.approx(400)  # theirs: infinite


def test_edm_is_the_papers_table() -> None:
    """Karras 2022, table 1, written out for sigma = t / (1 - t) and x = x_t / (1 - t)."""
    generator = torch.Generator().manual_seed(2)
    x_0, eps = torch.randn(2, 5, 1, 2, 2, generator=generator, dtype=torch.float64)
    t, data = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 0.7
    sigma = (t / (1 - t)).view(-1, 1, 1, 1)
    x, c_skip = x_0 + sigma * eps, data**2 / (sigma**2 + data**2)
    c_out, c_in = sigma * data / (sigma**2 + data**2).sqrt(), 1 / (sigma**2 + data**2).sqrt()
    config = ObjectiveConfig(kind="edm", sigma_data=data)
    torch.testing.assert_close(target(x_0, eps, t, config), (x_0 - c_skip * x) / c_out, **CLOSE)
    scale = input_scale(t, config)
    assert scale is not None
    torch.testing.assert_close(noised(x_0, eps, t) * scale.view(-1, 1, 1, 1), c_in * x, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_at_both_ends(kind) -> None:
    x_0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 1.0])
    for name in ("own", "min_snr", "sigma_sqrt", "cosmap"):
        config = ObjectiveConfig(kind=kind, weight=name)
        assert bool(torch.isfinite(error(torch.zeros_like(x_0), x_0, eps, t, config)).all())
        assert bool(torch.isfinite(as_x_0(torch.zeros_like(x_0), noised(x_0, eps, t), t, config)).all())


def test_the_default_is_the_velocity_error_to_the_bit(samples) -> None:
    x_0, eps, t, guess = samples
    assert torch.equal(error(guess, x_0, eps, t, ObjectiveConfig()), velocity_error(guess, x_0, t))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_twice_the_weighted_difference(kind, samples) -> None:
    x_0, eps, t, guess = samples
    config = ObjectiveConfig(kind=kind, weight="cosmap")
    output = guess.clone().requires_grad_()
    error(output, x_0, eps, t, config).mean().backward()
    own = t.clamp_min(0.05) ** -2.0 if kind == "x_0" else torch.ones_like(t)
    factor = (own * 2 / (math.pi * (1 - 2 * t + 2 * t**2))).view(-1, 1, 1, 1)
    torch.testing.assert_close(output.grad, 2 * factor * (guess - target(x_0, eps, t, config)) / x_0.numel(), **CLOSE)


def test_a_velocity_network_is_sampled_alike_as_a_predictor_and_as_a_family(tiny, batches) -> None:
    raw, batch = tiny(0), batches(0)
    family = PrxDenoiser(raw.transformer, "velocity", raw.text_mean, raw.text_std)
    asked = batch.images, grid(4), batch.tokens, batch.mask, (batch.tokens[:1] * 0, batch.mask[:1]), 2.0
    mine = integrate(Predictor(raw, ObjectiveConfig(kind="velocity")), *asked)
    torch.testing.assert_close(mine, integrate(family, *asked), atol=1e-5, rtol=1e-5)


class Line(Denoiser):
    """A network of numbers as pictures [B, 1, 1, 1], whose answer is taken as it is."""

    patch_size = 1  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def predict(self, x_t, t, tokens, mask, hidden_layer=None, condition=None, route=None):
        inputs = torch.stack([x_t.flatten(), t, x_t.flatten() * t], 1)
        return self.net(inputs).view(-1, 1, 1, 1), None


MEAN, STD, SLOTS = 0.7, 0.3, tuple(range(64))


def numbers(step: int) -> Batch:
    """Data from N(MEAN, STD^2)."""
    x_0 = MEAN + STD * Randomness(9, step, SLOTS).normal("data", (1, 1, 1))
    return Batch(x_0, torch.zeros(64, 1, 4), torch.ones(64, 1, dtype=torch.bool), SLOTS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "x_0"])
def test_every_kind_trains_and_its_predictor_draws_the_data(kind, tmp_path) -> None:
    config = ObjectiveConfig(kind=kind, sigma_data=STD)
    denoiser = Line()
    objective = FlowMatching(denoiser, TimestepConfig(density="uniform", shift="none"), objective=config)
    batch = objective.prepare(numbers(0), Randomness(0, 0, SLOTS))
    t = batch.extra["t"]
    batch.extra["t"] = t = 0.05 + 0.9 * t  # where nothing is clamped the loss is a weight times the picture's error
    batch.extra["x_t"] = noised(batch.images, batch.extra["eps"], t)
    x_0, _ = Predictor(denoiser, config)(batch.extra["x_t"], t, batch.tokens, batch.mask)
    g = ((1 - t) ** 2 + t**2) ** -0.5
    gain = {"velocity": t, "ddpm_eps": t / (1 - t), "score": t / (1 - t), "ddpm_v": g * t,
            "edm": STD * t / ((STD * (1 - t)) ** 2 + t**2).sqrt()}[kind]  # fmt: skip
    by_hand = ((x_0 - batch.images).flatten() / gain).square().mean()
    torch.testing.assert_close(objective.loss("denoiser", batch).total, by_hand, rtol=1e-4, atol=1e-5)

    optimizer = OptimizerConfig(muon_lr=None, adamw_lr=1e-2, warmup_steps=20)
    settings = TrainConfig(
        steps=300, batch_size=64, log_every=100, checkpoint_every=300, ema_gamma=17.0, optimizer=optimizer
    )
    trained = train(objective, numbers, settings, tmp_path)
    average = {n.removeprefix("denoiser."): v for n, v in trained.emas["denoiser"].average.items()}
    denoiser.load_state_dict(average, strict=False)
    noise = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(2000, 1, 4), torch.ones(2000, 1, dtype=torch.bool)
    drawn = integrate(Predictor(denoiser, config), noise, grid(40), *nothing, (nothing[0][:1], nothing[1][:1]), 1.0)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.08)
    assert float(drawn.std()) == pytest.approx(STD, abs=0.08)
