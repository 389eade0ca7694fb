import pytest
import torch

from models.distillation.config import DistillConfig
from models.distillation.consistency import ConsistencyDistillation
from models.distillation.progressive import ProgressiveDistillation
from models.engine.randomness import Randomness
from models.sampling.euler import euler_step, grid, integrate

NULL = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
SLOTS = (0, 1, 2, 3)


def test_progressive_target_lands_where_two_teacher_steps_land(tiny, batches) -> None:
    """Oracle: one Euler step with the target velocity equals the teacher's 2N-step path on its non-linear field."""
    config = DistillConfig(method="progressive", student_steps=2, teacher_steps=4, guidance=2.0)
    objective = ProgressiveDistillation(tiny(0), tiny(3), NULL, config)
    batch = objective.prepare(batches(0), Randomness(0, 0, SLOTS))
    t, x_t = batch.extra["t"], batch.extra["x_t"]
    assert set(t.tolist()) <= {0.5, 1.0}
    landed = x_t - 0.5 * batch.extra["velocity"]
    for i in range(4):
        times = [float(t[i]), float(t[i]) - 0.25, float(t[i]) - 0.5]
        one = slice(i, i + 1)
        path = integrate(objective.teacher, x_t[one], times, batch.tokens[one], batch.mask[one], NULL, 2.0)
        torch.testing.assert_close(landed[one], path, atol=2e-5, rtol=1e-4)


def test_progressive_refuses_grids_that_do_not_halve(tiny) -> None:
    config = DistillConfig(method="progressive", student_steps=3, teacher_steps=4)
    with pytest.raises(ValueError, match="teacher_steps=4 must be twice student_steps=3"):
        ProgressiveDistillation(tiny(0), tiny(0), NULL, config)


def test_consistency_boundary_target_is_the_point_itself(tiny, batches) -> None:
    config = DistillConfig(teacher_steps=1 + 1, noise_share=0.0)
    objective = ConsistencyDistillation(tiny(0), tiny(3), NULL, config)
    seen = set()
    for step in range(6):
        batch = objective.prepare(batches(step), Randomness(0, step, SLOTS))
        for i, t in enumerate(batch.extra["t"].tolist()):
            seen.add(t)
            if t == 0.5:  # the last grid time: its target is the teacher's end point, whatever the networks are
                one = slice(i, i + 1)
                end = euler_step(objective.teacher, batch.extra["x_t"][one], torch.tensor([0.5]), torch.tensor([0.0]),
                                 batch.tokens[one], batch.mask[one], NULL, config.guidance)  # fmt: skip
                torch.testing.assert_close(batch.extra["target"][one], end, atol=2e-5, rtol=1e-4)
    assert seen == {0.5, 1.0}


def test_consistency_gradient_reaches_only_the_student_and_the_target_follows(tiny, batches) -> None:
    objective = ConsistencyDistillation(tiny(0), tiny(3), NULL, DistillConfig(teacher_steps=4, target_decay=0.75))
    objective.loss("student", objective.prepare(batches(0), Randomness(0, 0, SLOTS))).total.backward()
    assert all(p.grad is None for net in (objective.teacher, objective.target) for p in net.parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())
    weight = objective.student.transformer.img_in.weight
    before = objective.target.transformer.img_in.weight.clone()
    with torch.no_grad():
        weight.add_(1.0)
    objective.after_step(0)
    torch.testing.assert_close(objective.target.transformer.img_in.weight - before, torch.full_like(before, 0.25))


def test_share_of_pure_noise_is_what_was_asked_for(tiny, batches) -> None:
    objective = ConsistencyDistillation(tiny(0), tiny(0), NULL, DistillConfig(teacher_steps=8, noise_share=0.5))
    slots = tuple(range(64))
    t = objective.prepare(batches(0, slots), Randomness(0, 0, slots)).extra["t"]
    assert 0.35 < float((t == 1).float().mean()) < 0.8


def test_grid_is_even_shifted_and_ends_at_data() -> None:
    assert grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert grid(1) == [1.0, 0.0]
    assert grid(4, 3.0)[:4] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    with pytest.raises(ValueError, match="steps=0 is below 1"):
        grid(0)
