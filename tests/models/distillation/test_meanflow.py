import pytest
import torch
from torch import nn

from models.distillation.conditioning import ConditionedDenoiser, ScalarEmbedding
from models.distillation.config import MeanFlowConfig
from models.distillation.meanflow import MeanFlow
from models.engine.randomness import Randomness
from models.networks.denoiser import T_CLAMP, Denoiser

NULL = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
SLOTS = (0, 1, 2, 3)


class Average(Denoiser):
    """The exact average velocity of a normal's flow, u = (x_t - x_r) / (t - r); `off` spoils it."""

    def __init__(self, world, off=0.0) -> None:
        super().__init__()
        self.world, self.off = world, off

    def forward(self, x_t, t, tokens, mask, gap):
        t, gap = (v.view(-1, 1, 1, 1).to(x_t.dtype) for v in (t, gap))
        u = (x_t - self.world.at(x_t, t, t - gap)) / gap + self.off * x_t * t
        return x_t - t.clamp_min(T_CLAMP) * u, None

    predict = forward


def test_the_exact_average_velocity_is_the_fixed_point(gaussian, line) -> None:
    """T20: u* = u for the exact u (which also satisfies x_r = x_t - (t - r) u by definition), and for no other."""
    for off, small in ((0.0, True), (0.1, False)):
        config = MeanFlowConfig(instant_share=0.0, whole_share=0.2, split=None)
        objective = MeanFlow(Average(gaussian(), off), gaussian(), NULL, config, 1.0)
        batch = line(torch.linspace(-1, 2, 128, dtype=torch.float64))
        batch = objective.prepare(batch, Randomness(0, 0, batch.slots))
        gap = (batch.extra["t"] - batch.extra["r"]) > 1e-3
        u = objective.average_velocity(batch.extra["x_t"], batch.extra["t"], batch.extra["r"], batch)
        error = (u - batch.extra["target"])[gap].abs().max()
        assert (float(error) < 1e-4) == small  # times are float32


def test_the_split_interval_is_right_up_to_the_teachers_euler_step(gaussian, line) -> None:
    """The exact u is off by less the shorter the teacher's step (order 1), and a short interval's target is v itself."""
    errors = []
    for split in (0.1, 0.05, 0.025):
        config = MeanFlowConfig(instant_share=0.2, whole_share=0.3, split=split)
        objective = MeanFlow(Average(gaussian()), gaussian(), NULL, config, 1.0)
        batch = line(torch.linspace(-1, 2, 128, dtype=torch.float64))
        batch = objective.prepare(batch, Randomness(0, 0, batch.slots))
        t, r, x = (batch.extra[name] for name in ("t", "r", "x_t"))
        whole = (t == 1) & (r == 0)
        u = objective.average_velocity(x, t, r, batch)
        errors.append(float((u - batch.extra["target"])[whole].abs().mean()))
        same = t - r <= split
        velocity = gaussian().velocity(x, t.view(-1, 1, 1, 1))
        torch.testing.assert_close(batch.extra["target"][same], velocity[same])
    assert errors[0] < 0.05
    assert 1.6 < errors[0] / errors[1] < 5
    assert 1.6 < errors[1] / errors[2] < 5


def test_intervals_have_their_shares(tiny) -> None:
    config = MeanFlowConfig(instant_share=0.25, whole_share=0.5)
    objective = MeanFlow(ConditionedDenoiser(tiny(0), ScalarEmbedding(32)), tiny(3), NULL, config, 2.0)
    t, r = objective.intervals(Randomness(0, 0, tuple(range(400))))
    assert bool(((t >= r) & (t <= 1) & (r >= 0)).all())
    assert float((t == r).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(((t == 1) & (r == 0)).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_derivative_is_that_of_central_differences(mlp, mixture, line) -> None:
    """T20, in double precision on a network of our own: relative error < 1e-4; a derivative along -v is seen."""
    student = mlp(inputs=3).double()
    objective = MeanFlow(student, mixture, NULL, MeanFlowConfig(instant_share=0.0, whole_share=0.0, split=None), 1.0)
    batch = line(mixture.draw(64, torch.Generator().manual_seed(0)).double())
    out = objective.prepare(batch, Randomness(0, 0, batch.slots))
    t, r, x = (out.extra[name] for name in ("t", "r", "x_t"))
    assert float(t.min()) > T_CLAMP
    v, h, u = mixture.velocity(x, t.view(-1, 1, 1, 1)), 1e-5, objective.average_velocity
    with torch.no_grad():
        for sign, same in ((1, True), (-1, False)):
            derivative = (u(x + sign * h * v, t + h, r, out) - u(x - sign * h * v, t - h, r, out)) / (2 * h)
            target = v - (t - r).view(-1, 1, 1, 1) * derivative
            assert (float((target - out.extra["target"]).norm() / target.norm()) < 1e-4) == same


def test_with_no_interval_it_is_the_teachers_velocity_and_the_derivative_is_right(tiny, batches) -> None:
    """T20: r = t reduces to flow matching; the derivative through attention is right."""
    told = ConditionedDenoiser(tiny(0), ScalarEmbedding(32)).double()
    nn.init.normal_(told.embedding.embed.weight, std=0.1)
    teacher = tiny(3).double()
    batch = batches(0)
    batch.images, batch.tokens = batch.images.double(), batch.tokens.double()
    null = (NULL[0].double(), NULL[1])
    objective = MeanFlow(told, teacher, null, MeanFlowConfig(instant_share=1.0, whole_share=0.0, split=None), 2.0)
    same = objective.prepare(batch, Randomness(0, 0, SLOTS)).extra
    assert torch.equal(same["t"], same["r"])
    objective = MeanFlow(told, teacher, null, MeanFlowConfig(instant_share=0.0, whole_share=0.5, split=None), 2.0)
    out = objective.prepare(batch, Randomness(0, 0, SLOTS))
    t, r, x = (out.extra[name].double() for name in ("t", "r", "x_t"))
    with torch.no_grad():
        u = objective.average_velocity
        v = (x - _guided(teacher, x, t, out, null)) / t.clamp_min(T_CLAMP).view(-1, 1, 1, 1)
        h = 1e-4  # the network's time embedding is float32: central differences are no better than a few thousandths
        ahead, behind = (u(x + s * v, t + s, r, out) for s in (h, -h))
        target = v - (t - r).view(-1, 1, 1, 1) * (ahead - behind) / (2 * h)
    assert float((target - out.extra["target"]).norm() / target.norm()) < 2e-2
    assert not out.extra["target"].requires_grad


def _guided(teacher, x, t, batch, null):
    cond = teacher(x, t, batch.tokens, batch.mask)[0]
    empty = teacher(x, t, null[0].expand(len(x), -1, -1), null[1].expand(len(x), -1))[0]
    return empty + 2.0 * (cond - empty)


def test_gradient_reaches_only_the_student(tiny, batches) -> None:
    told = ConditionedDenoiser(tiny(0), ScalarEmbedding(32))
    objective = MeanFlow(told, tiny(3), NULL, MeanFlowConfig(), 2.0)
    objective.loss("student", objective.prepare(batches(0), Randomness(0, 0, SLOTS))).total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert told.embedding.embed.weight.grad is not None


def test_shares_beyond_the_whole_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="exceed 1"):
        MeanFlowConfig(instant_share=0.7, whole_share=0.4)
