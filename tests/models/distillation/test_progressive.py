import pytest
import torch

from models.distillation.config import DistillConfig, ProgressiveConfig
from models.distillation.grid import Schedule
from models.distillation.progressive import ProgressiveDistillation
from models.engine.randomness import Randomness
from models.networks.denoiser import T_CLAMP, Denoiser
from models.pretraining.config import TimestepConfig
from models.sampling.euler import grid, integrate

NULL = (torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool))
SHIFTED = Schedule(TimestepConfig(shift="sqrt_tokens", base_tokens=4), 1)  # one-pixel pictures: k = 1/2


def made(student, teacher, teacher_steps, student_steps, steps=1, guidance=1.0, schedule=Schedule()):
    config = ProgressiveConfig(teacher_steps=teacher_steps)
    return ProgressiveDistillation(student, teacher, NULL, config, student_steps, guidance, steps, schedule)


@pytest.mark.parametrize("schedule", [Schedule(), SHIFTED])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 25])
def test_the_target_is_the_teachers_two_steps(mixture, mlp, line, n, schedule) -> None:
    """T3 on a non-linear field: following the targets from noise is the teacher's own 2n-step path."""
    objective = made(mlp(), mixture, 2 * n, n, schedule=schedule)
    batch = line(torch.zeros(64, dtype=torch.float64))
    out = objective.prepare(batch, Randomness(0, 0, batch.slots)).extra
    times = [float(t) for t in schedule.at(torch.arange(2 * n, -1, -1), 2 * n, batch.images)]
    seen = set()
    for i in range(64):
        place = times.index(float(out["t"][i]))
        assert place % 2 == 0  # never off the student's grid
        seen.add(place)
        one = slice(i, i + 1)
        path = integrate(mixture, out["x_t"][one], times[place : place + 3], None, None, NULL, 1.0)
        landed = out["x_t"][one] - (out["t"][i] - times[place + 2]) * out["velocity"][one]
        assert float((landed - path).abs().max()) < 1e-12
    assert len(seen) == min(n, len(seen))
    assert n > 8 or len(seen) == n


class Affine(Denoiser):
    """v(x, t) = a_t x + b_t at a few times: the class that holds every student of a linear field exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[float, tuple[float, float]] = {}

    def forward(self, x_t, t, tokens=None, mask=None, *told):
        rows = [self.table[round(float(v), 6)] for v in t]
        a, b = (torch.tensor(c, dtype=x_t.dtype).view(-1, 1, 1, 1) for c in zip(*rows, strict=True))
        clamp = t.clamp_min(T_CLAMP).view(-1, 1, 1, 1).to(x_t.dtype)
        return x_t - clamp * (a * x_t + b), None

    predict = forward


def test_a_chain_of_exact_halvings_is_the_teachers_whole_path(gaussian, line) -> None:
    """T4: least squares reaches zero loss in each halving, and 16 -> 1 is the teacher's 16-step map."""
    teacher = world = gaussian()
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    for n in (8, 4, 2, 1):
        objective = made(Affine(), teacher, 2 * n, n)
        batch = line(torch.linspace(-1, 2, 64, dtype=torch.float64))
        batch = objective.prepare(batch, Randomness(1, 0, batch.slots))
        for t in batch.extra["t"].unique():
            at = batch.extra["t"] == t
            x, v = batch.extra["x_t"][at].flatten(), batch.extra["velocity"][at].flatten()
            found = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), v[:, None]).solution
            objective.student.table[round(float(t), 6)] = (float(found[0]), float(found[1]))
        assert float(objective.loss("student", batch).total) < 1e-20
        teacher = objective.student
    expected = integrate(world, z, grid(16), None, None, NULL, 1.0)
    assert float((integrate(teacher, z, [1.0, 0.0], None, None, NULL, 1.0) - expected).abs().max()) < 1e-6


def test_the_student_becomes_the_teacher_and_guidance_is_used_once(tiny, batches) -> None:
    """T17's kin: three halvings of two steps; the second one's targets are the student's own unguided steps."""
    null = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
    config = ProgressiveConfig(teacher_steps=8)
    objective = ProgressiveDistillation(tiny(0), tiny(3), null, config, 1, 3.0, 6)
    assert objective.targets == [4, 2, 1]
    first = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    objective.after_step(0)
    assert all(torch.equal(p, first[name]) for name, p in objective.teacher.named_parameters())
    objective.after_step(1)
    assert not torch.equal(objective.teacher.transformer.img_in.weight, first["transformer.img_in.weight"])
    student = dict(objective.student.named_parameters())
    assert all(torch.equal(p, student[name]) for name, p in objective.teacher.named_parameters())
    assert set(objective.finished) == {4}
    batch = objective.prepare(batches(2), Randomness(0, 2, (0, 1, 2, 3)))
    t = batch.extra["t"]
    assert set(t.tolist()) <= {0.5, 1.0}
    landed = batch.extra["x_t"] - 0.5 * batch.extra["velocity"]
    for i, at in enumerate(t.tolist()):
        one, times = slice(i, i + 1), [at, at - 0.25, at - 0.5]
        ends = [
            integrate(objective.student, batch.extra["x_t"][one], times, batch.tokens[one], batch.mask[one], null, g)
            for g in (1.0, 3.0)
        ]
        torch.testing.assert_close(landed[one], ends[0], atol=2e-5, rtol=1e-4)
        assert float((landed[one] - ends[1]).abs().max()) > 1e-4  # guidance would have compounded


def test_the_rate_falls_once_a_halving(tiny) -> None:
    null = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
    objective = ProgressiveDistillation(tiny(0), tiny(0), null, ProgressiveConfig(teacher_steps=8), 1, 1.0, 30)
    assert objective.schedule_steps == 10
    with pytest.raises(ValueError, match="cannot be shared by 3 halvings"):
        ProgressiveDistillation(tiny(0), tiny(0), null, ProgressiveConfig(teacher_steps=8), 1, 1.0, 31)


@pytest.mark.parametrize(("teacher_steps", "student_steps"), [(4, 3), (4, 4), (12, 2), (2, 4)])
def test_grids_that_do_not_halve_are_refused(teacher_steps, student_steps) -> None:
    with pytest.raises(
        ValueError, match=f"teacher_steps={teacher_steps} must be student_steps={student_steps} times 2"
    ):
        DistillConfig(method={"kind": "progressive", "teacher_steps": teacher_steps}, student_steps=student_steps)
