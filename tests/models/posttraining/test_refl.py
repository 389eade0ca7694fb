from dataclasses import replace

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.randomness import Randomness
from models.networks.denoiser import velocity_of
from models.posttraining.config import ReflConfig
from models.posttraining.refl import Refl, straight_through_clamp
from models.posttraining.reward import Composite, Weighted
from models.pretraining.config import TimestepConfig
from models.pretraining.flow_matching import FlowMatching

TRAIN = TrainConfig(steps=4, batch_size=8, log_every=1, checkpoint_every=1)
SLOTS = tuple(range(8))


def refl(tiny, sampling, reward, **fields) -> Refl:
    config = ReflConfig.model_validate({"train": TRAIN.model_dump(), "guard": None, **fields})
    return Refl(tiny(0), Composite((Weighted(reward),)), sampling, config)


def gradient(net, loss) -> torch.Tensor:
    net.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in net.parameters()])


def test_gradient_is_that_of_one_step(tiny, sampling, brightness, grouped) -> None:
    objective = refl(tiny, sampling, brightness, pretraining=0.0, weight=1.0, hinge=50.0)
    batch = objective.prepare(grouped(0), Randomness(0, 0, SLOTS))
    assert not batch.extra["x"].requires_grad
    found = gradient(objective.denoiser, objective.loss("denoiser", batch).total)
    x, t = batch.extra["x"].clone(), float(batch.extra["time"])
    cond, _ = objective.denoiser(x, torch.full((8,), t), batch.tokens, batch.mask)
    null = [part.expand(8, *part.shape[1:]) for part in sampling.null]
    uncond, _ = objective.denoiser(x, torch.full((8,), t), *null)
    x_0 = uncond + sampling.guidance * (cond - uncond)
    expected = gradient(objective.denoiser, -(x_0.mean((1, 2, 3)) / brightness.card.sigma).mean())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert expected.norm() > 0


def test_only_the_last_steps_get_gradient(tiny, sampling, brightness, grouped) -> None:
    objective = refl(tiny, sampling, brightness, steps=8, late=0.25)
    times = {float(objective.prepare(grouped(0), Randomness(0, s, SLOTS)).extra["time"]) for s in range(12)}
    assert times == set(sampling.times(8, grouped(0).images)[6:8])


def test_the_hinge_stops_pulling_above_its_sigmas(tiny, sampling, brightness, grouped) -> None:
    reached = refl(tiny, sampling, brightness, pretraining=0.0, hinge=-1e3)
    batch = reached.prepare(grouped(0), Randomness(0, 0, SLOTS))
    loss = reached.loss("denoiser", batch)
    assert loss.parts["reached"] == 1
    assert not gradient(reached.denoiser, loss.total).any()


def test_the_pretraining_term_is_flow_matching_on_the_other_pictures(tiny, sampling, brightness, grouped) -> None:
    with_it, without = (refl(tiny, sampling, brightness, pretraining=p) for p in (0.5, 0.0))
    batch = with_it.prepare(grouped(0), Randomness(0, 0, SLOTS))
    t, eps, real = batch.extra["t"], batch.extra["eps"], batch.extra["real"]
    x_t = (1 - t.view(-1, 1, 1, 1)) * real + t.view(-1, 1, 1, 1) * eps
    x_0, _ = with_it.denoiser(x_t, t, batch.extra["real_tokens"], batch.extra["real_mask"])
    flow = (velocity_of(x_0, x_t, t) - velocity_of(real, x_t, t)).square().mean()
    added = with_it.loss("denoiser", batch).total - without.loss("denoiser", batch).total
    torch.testing.assert_close(added, 0.5 * flow, atol=1e-5, rtol=1e-4)


def test_a_clamped_pixel_keeps_its_gradient() -> None:
    x = torch.tensor([-3.0, 0.2, 5.0], requires_grad=True)
    clamped = straight_through_clamp(x)
    torch.testing.assert_close(clamped, torch.tensor([-1.0, 0.2, 1.0]))
    clamped.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.slow
def test_the_reward_rises_while_the_pretraining_loss_holds_because_of_its_term(tiny, sampling, brightness, grouped, tmp_path) -> None:  # fmt: skip
    """From a denoiser of dark pictures: with the term its loss rises by less than a tenth, without it by more."""
    optimizer = OptimizerConfig(muon_lr=None, adamw_lr=2e-3, warmup_steps=0)

    def dark(step):
        batch = grouped(step)
        return replace(batch, extra={**batch.extra, "real": batch.extra["real"] / 4 - 0.5})

    def pictures(step):
        batch = dark(step)
        return replace(
            batch, images=batch.extra["real"], tokens=batch.extra["real_tokens"], mask=batch.extra["real_mask"]
        )

    start = tiny(0)
    first = TRAIN.model_copy(update={"steps": 150, "log_every": 150, "checkpoint_every": 150, "optimizer": optimizer})
    train(FlowMatching(start, TimestepConfig()), pictures, first, tmp_path / "first")

    def worth(net) -> tuple[float, float]:
        """Mean reward of pictures drawn as at inference, and flow matching's loss on pictures never trained on."""
        asked, rng = dark(5000), Randomness(9, 0, SLOTS)
        noise = rng.normal("noise", tuple(asked.images.shape[1:]))
        with torch.no_grad():
            drawn = sampling.pictures(sampling.follow(net, noise, sampling.times(8, noise), asked))
            objective = FlowMatching(net, TimestepConfig())
            losses = [objective.loss("denoiser", objective.prepare(pictures(5000 + i), Randomness(9, i, SLOTS))).total for i in range(8)]  # fmt: skip
        return float(brightness(drawn, asked).mean()), float(torch.stack(losses).mean())

    def tuned(weight: float) -> tuple[float, float]:
        objective = refl(tiny, sampling, brightness, pretraining=weight, weight=0.02, hinge=3.0)
        objective.denoiser.load_state_dict(start.state_dict())
        config = TRAIN.model_copy(update={"steps": 40, "log_every": 40, "checkpoint_every": 40, "optimizer": optimizer})
        train(objective, dark, config, tmp_path / str(weight))
        return worth(objective.denoiser)

    before, held, free = worth(start), tuned(1.0), tuned(0.0)
    assert held[0] > before[0] + 0.01
    assert held[1] < 1.1 * before[1]
    assert free[0] > before[0] + 0.01
    assert free[1] > 1.1 * before[1]


@pytest.mark.parametrize("late", [0.0, 1.5])
def test_a_share_outside_0_to_1_is_refused(late) -> None:
    with pytest.raises(ValueError, match="late"):
        ReflConfig(late=late)
