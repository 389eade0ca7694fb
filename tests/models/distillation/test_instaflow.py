"""Reflow and its end, and the trained students of the line's mixture against its exact map."""

import pytest
import torch

from models.distillation.config import ConsistencyConfig, InstaFlowConfig, MeanFlowConfig, ProgressiveConfig
from models.distillation.consistency import ConsistencyDistillation
from models.distillation.instaflow import InstaFlow, straightness
from models.distillation.meanflow import MeanFlow
from models.distillation.perceptual import FeatureDistance, distance_of, unit
from models.distillation.progressive import ProgressiveDistillation
from models.engine.randomness import Randomness
from models.sampling.euler import grid, integrate

NULL = (torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool))
SLOTS = (0, 1, 2, 3)
B = 192


class Fast:
    """Stands for Randomness where its one generator a sample would be slow."""

    def __init__(self, step) -> None:
        self.step, self.generator = step, torch.Generator().manual_seed(step)

    def normal(self, stream, shape):
        return torch.randn((B, *shape), generator=self.generator)

    def uniform(self, stream, shape=()):
        return torch.rand((B, *shape), generator=self.generator)

    def stratified(self, stream):
        even = (torch.arange(B) + torch.rand((), generator=self.generator)) / B
        return even.clamp_max(1 - 2**-24)[torch.randperm(B, generator=self.generator)]


def trained(objective, batches, steps, lr=4e-3):
    parameters = list(objective.student.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    span = getattr(objective, "schedule_steps", steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.99 * (step % span) / span)
        loss = objective.loss("student", objective.prepare(batches(step), Fast(step))).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(step)
    return objective.student


@pytest.fixture
def world(mixture, mlp, line):
    """Batches of data and batches of exact pairs, by step."""
    end = mixture.table()

    def data(step):
        return line(mixture.draw(B, torch.Generator().manual_seed(10_000 + step)).flatten())

    def pairs(step):
        z = torch.randn(B, generator=torch.Generator().manual_seed(20_000 + step))
        return line(end(z), noise=z.view(-1, 1, 1, 1))

    return data, pairs


def error_of(student, mixture, steps=1, told=False):
    z = torch.linspace(-2.3, 2.3, 201).view(-1, 1, 1, 1)
    with torch.no_grad():
        if told:
            got = student(z, torch.ones(201), None, None, torch.ones(201))[0]
        else:
            got = integrate(student, z, grid(steps), None, None, NULL, 1.0)
    weight = torch.exp(-(z**2) / 2)
    return float(((got - mixture.end(z.double()).float()).square() * weight).sum().div(weight.sum()).sqrt())


def test_the_teacher_is_far_from_its_own_map_in_one_step(mixture) -> None:
    assert error_of(mixture, mixture) > 1.2
    assert error_of(mixture, mixture, 50) < 0.1


def test_consistency_reaches_the_exact_map(mixture, mlp, world) -> None:
    """T7 on the line."""
    config = ConsistencyConfig(teacher_steps=8, target_decay=0.8, huber=1.0)
    objective = ConsistencyDistillation(mlp(), mixture, NULL, config)
    assert error_of(trained(objective, world[0], 600), mixture) < 0.45


def test_reflow_straightens_and_its_one_step_student_reaches_the_exact_map(mixture, mlp, world) -> None:
    """T8, T9 and T10."""
    before = straightness(mixture, world[1](0), Fast(0))
    reflow = InstaFlow(mlp(), InstaFlowConfig(reflow_share=1.0, perceptual_share=0.0), 1, 600, None)
    straight = trained(reflow, world[1], 600)
    assert straightness(straight, world[1](0), Fast(0)) < before / 5
    two_rectified = error_of(straight, mixture)
    one_step = InstaFlow(straight, InstaFlowConfig(reflow_share=0.0, perceptual_share=0.0), 1, 300, None)
    last = error_of(trained(one_step, world[1], 300, 2e-3), mixture)
    assert last < 0.25
    assert last < two_rectified


def test_progressive_halvings_reach_the_exact_map(mixture, mlp, world) -> None:
    """T11: 8 -> 1 in three halvings."""
    student = mlp()
    start = ProgressiveDistillation(student, mixture, NULL, ProgressiveConfig(teacher_steps=16), 8, 1.0, 300)
    trained(start, world[0], 300)
    teacher = mlp()
    teacher.load_state_dict(student.state_dict())
    chain = ProgressiveDistillation(student, teacher, NULL, ProgressiveConfig(teacher_steps=8), 1, 1.0, 600)
    assert error_of(trained(chain, world[0], 600), mixture) < 0.45


def test_meanflow_reaches_the_exact_map(mixture, mlp, world) -> None:
    objective = MeanFlow(mlp(inputs=3), mixture, NULL, MeanFlowConfig(power=0.0), 1.0)
    assert error_of(trained(objective, world[0], 600), mixture, told=True) < 0.5


def test_phases_and_times(tiny, batches) -> None:
    config = InstaFlowConfig(reflow_share=0.5, perceptual_share=0.25)
    objective = InstaFlow(tiny(0), config, 2, 8, lambda x, y: (x - y).abs().mean((1, 2, 3)))
    for step in range(8):
        batch = batches(step)
        batch.extra["noise"] = torch.randn(4, 3, 8, 12)
        out = objective.prepare(batch, Randomness(0, step, SLOTS))
        t = out.extra["t"].view(-1, 1, 1, 1)
        torch.testing.assert_close(out.extra["x_t"], (1 - t) * batch.images + t * batch.extra["noise"])
        on_grid = set(out.extra["t"].tolist()) <= {0.5, 1.0}
        assert on_grid == (step >= 4)  # the student's own times, never others
        assert ("perceptual" in objective.loss("student", out).parts) == (step >= 6)


def test_the_velocity_of_a_pair_is_its_difference(tiny, batches) -> None:
    """The obvious formula; a batch whose noise belongs to another picture has another loss."""
    objective = InstaFlow(tiny(0), InstaFlowConfig(perceptual_share=0.0, reflow_share=1.0), 1, 4, None)
    batch = batches(0)
    batch.extra["noise"] = torch.randn(4, 3, 8, 12)
    out = objective.prepare(batch, Randomness(0, 0, SLOTS))
    with torch.no_grad():
        x_0, _ = objective.student(out.extra["x_t"], out.extra["t"], batch.tokens, batch.mask)
        v = (out.extra["x_t"] - x_0) / out.extra["t"].clamp_min(0.05).view(-1, 1, 1, 1)
        expected = (v - (batch.extra["noise"] - batch.images)).square().mean((1, 2, 3))
    ok = out.extra["t"] > 0.05
    loss = objective.loss("student", out)
    if bool(ok.all()):
        torch.testing.assert_close(loss.total.detach(), expected.mean(), atol=1e-4, rtol=1e-3)
    loss.total.backward()
    assert objective.student.transformer.img_in.weight.grad is not None


def test_perceptual_distance_is_lpips_formula() -> None:
    class Maps(torch.nn.Module):
        def forward(self, x):
            return [x, 2 * x[:, :2, ::2, ::2]]

    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    expected = torch.zeros(2)
    for a, b in zip(Maps()(x), Maps()(y), strict=True):
        for i in range(2):
            for h in range(a.shape[2]):
                for w in range(a.shape[3]):
                    p, q = a[i, :, h, w], b[i, :, h, w]
                    part = (p / p.norm() - q / q.norm()).square().sum()
                    expected[i] += part / (a.shape[2] * a.shape[3])
    torch.testing.assert_close(FeatureDistance(Maps())(x, y), expected)
    assert not FeatureDistance(Maps())(x, x).any()
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(2, 4, 4))


def test_missing_lpips_is_an_error_and_never_another_loss() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install lpips, or choose efficientnet_lite0"):
        distance_of("lpips")
    with pytest.raises(ValueError, match=r"perceptual_share=0\.2 needs a perceptual distance"):
        InstaFlow(torch.nn.Linear(1, 1), InstaFlowConfig(), 1, 10, None)
