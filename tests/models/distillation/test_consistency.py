import math
from itertools import pairwise

import pytest
import torch

from models.distillation.conditioning import ConditionedDenoiser, ScalarEmbedding, folded
from models.distillation.config import ConsistencyConfig
from models.distillation.consistency import ConsistencyDistillation, consistency_function
from models.distillation.scm import ContinuousConsistency, ScmConfig, tangent, to_flow, to_trig, trig_velocity
from models.engine.randomness import Randomness
from models.networks.config import LoraConfig
from models.networks.denoiser import T_CLAMP, Denoiser
from models.personalization.lora import add_lora, merge
from models.sampling.euler import euler_step

NULL = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
SLOTS = (0, 1, 2, 3)


def test_f_at_zero_is_its_input_to_the_bit() -> None:
    """T5: whatever the network says."""
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(consistency_function(1e3 * torch.randn(5, 3, 2, 2), x, torch.zeros(5)), x)
    answer = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(consistency_function(answer, x, torch.full((5,), 0.7)), answer)


class Oracle(Denoiser):
    """The exact consistency function of a normal, as a student."""

    def __init__(self, world) -> None:
        super().__init__()
        self.world = world
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, tokens=None, mask=None):
        t = t.view(-1, 1, 1, 1).to(x_t.dtype)
        velocity = (x_t - self.world.end(x_t, t)) / t.clamp_min(1e-9)
        return x_t - t.clamp_min(T_CLAMP) * velocity, None

    predict = forward


def loss_of_oracle(gaussian, line, steps, skip=1, flip=False):
    config = ConsistencyConfig(teacher_steps=steps, skip=skip, noise_share=0.0, huber=1e-9)
    teacher, student = gaussian(), Oracle(gaussian())
    if flip:  # negative control: a teacher that walks the wrong way
        teacher.velocity = lambda x, t: -gaussian().velocity(x, t)
    objective = ConsistencyDistillation(student, teacher, NULL, config)
    batch = line(torch.linspace(-0.2, 1.6, 256, dtype=torch.float64))
    return (
        float(objective.loss("student", objective.prepare(batch, Randomness(0, 0, batch.slots))).total) * steps / skip
    )


def test_the_exact_consistency_function_has_no_loss_but_the_solvers(gaussian, line) -> None:
    """T6: per unit of time the loss falls at order 1 with Euler; with the wrong sign it does not fall."""
    losses = [loss_of_oracle(gaussian, line, n) for n in (16, 32, 64)]
    for coarse, fine in pairwise(losses):
        assert 0.8 < math.log2(coarse / fine) < 1.2
    assert loss_of_oracle(gaussian, line, 64, skip=4) > 3 * losses[2]
    wrong = [loss_of_oracle(gaussian, line, n, flip=True) for n in (32, 64)]
    assert wrong[1] > 0.8 * wrong[0]


def test_boundary_target_is_the_teachers_end_point(tiny, batches) -> None:
    objective = ConsistencyDistillation(
        tiny(0), tiny(3), NULL, ConsistencyConfig(teacher_steps=2, noise_share=0.0), 2.0
    )
    seen = set()
    for step in range(6):
        batch = objective.prepare(batches(step), Randomness(0, step, SLOTS))
        for i, t in enumerate(batch.extra["t"].tolist()):
            seen.add(t)
            if t == 0.5:
                one = slice(i, i + 1)
                end = euler_step(objective.teacher, batch.extra["x_t"][one], torch.tensor([0.5]), torch.tensor([0.0]),
                                 batch.tokens[one], batch.mask[one], NULL, 2.0)  # fmt: skip
                torch.testing.assert_close(batch.extra["target"][one], end, atol=2e-5, rtol=1e-4)
    assert seen == {0.5, 1.0}


def test_gradient_reaches_only_the_student_and_the_target_follows(tiny, batches) -> None:
    config = ConsistencyConfig(teacher_steps=4, target_decay=0.75)
    objective = ConsistencyDistillation(tiny(0), tiny(3), NULL, config, 2.0)
    prepared = objective.prepare(batches(0), Randomness(0, 0, SLOTS))
    assert not prepared.extra["target"].requires_grad
    objective.loss("student", prepared).total.backward()
    assert all(p.grad is None for net in (objective.teacher, objective.target) for p in net.parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())
    weight = objective.student.transformer.img_in.weight
    before = objective.target.transformer.img_in.weight.clone()
    with torch.no_grad():
        weight.add_(1.0)
    objective.after_step(0)
    torch.testing.assert_close(objective.target.transformer.img_in.weight - before, torch.full_like(before, 0.25))


def test_share_of_pure_noise_is_what_was_asked_for(tiny, batches) -> None:
    objective = ConsistencyDistillation(tiny(0), tiny(0), NULL, ConsistencyConfig(teacher_steps=8, noise_share=0.5))
    slots = tuple(range(64))
    t = objective.prepare(batches(0, slots), Randomness(0, 0, slots)).extra["t"]
    assert 0.35 < float((t == 1).float().mean()) < 0.8


def test_training_without_teacher_stays_on_the_datas_path(tiny, batches) -> None:
    config = ConsistencyConfig(teacher_steps=4, use_teacher=False, noise_share=0.0)
    objective = ConsistencyDistillation(tiny(0), None, NULL, config)
    batch = objective.prepare(batches(0), Randomness(0, 0, SLOTS))
    t = batch.extra["t"].view(-1, 1, 1, 1)
    eps = (batch.extra["x_t"] - (1 - t) * batch.images) / t
    x_s = (1 - (t - 0.25)) * batch.images + (t - 0.25) * eps
    expected, _ = objective.target(x_s, (t - 0.25).flatten(), batch.tokens, batch.mask)
    last = t.flatten() == 0.25
    torch.testing.assert_close(batch.extra["target"][~last], expected[~last], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.extra["target"][last], batch.images[last], atol=1e-5, rtol=1e-4)


def test_embedded_guidance_starts_at_the_teacher_and_folds_into_the_stock_network(tiny, batches) -> None:
    batch, t, w = batches(0), torch.tensor([0.2, 0.5, 0.7, 1.0]), torch.tensor([1.0, 2.0, 3.0, 7.5])
    told = ConditionedDenoiser(tiny(0), ScalarEmbedding(32))
    plain = tiny(0)(batch.images, t, batch.tokens, batch.mask)[0]
    assert torch.equal(told(batch.images, t, batch.tokens, batch.mask, w)[0], plain)
    torch.nn.init.normal_(told.embedding.embed.weight, std=0.3)
    moved = told(batch.images, t, batch.tokens, batch.mask, w)[0]
    assert float((moved - plain).detach().abs().max()) > 1e-3
    for i in range(4):
        fixed = folded(told.denoiser, told.embedding, float(w[i]))
        alone = fixed(batch.images, t, batch.tokens, batch.mask)[0][i]
        torch.testing.assert_close(alone, moved[i], atol=1e-5, rtol=1e-4)


def test_the_teachers_step_uses_each_samples_guidance(tiny, batches) -> None:
    told = ConditionedDenoiser(tiny(0), ScalarEmbedding(32))
    config = ConsistencyConfig(teacher_steps=2, noise_share=0.0, guidance_range=(1.5, 4.0))
    objective = ConsistencyDistillation(told, tiny(3), NULL, config)
    for step in range(4):
        batch = objective.prepare(batches(step), Randomness(0, step, SLOTS))
        w, t = batch.extra["guidance"], batch.extra["t"]
        assert bool(((w >= 1.5) & (w <= 4.0)).all())
        for i in (i for i in range(4) if t[i] == 0.5):
            one = slice(i, i + 1)
            end = euler_step(objective.teacher, batch.extra["x_t"][one], t[one], torch.tensor([0.0]),
                             batch.tokens[one], batch.mask[one], NULL, float(w[i]))  # fmt: skip
            torch.testing.assert_close(batch.extra["target"][one], end, atol=2e-5, rtol=1e-4)


def test_lcm_lora_leaves_the_base_alone_and_combines_with_a_style(tiny, batches) -> None:
    """T22."""
    base = {name: p.clone() for name, p in tiny(0).named_parameters()}
    batch, t = batches(0), torch.full((4,), 0.6)
    student = tiny(0)
    add_lora(student, LoraConfig(rank=4), 0)
    teacher_says = tiny(0)(batch.images, t, batch.tokens, batch.mask)[0]
    assert torch.equal(student(batch.images, t, batch.tokens, batch.mask)[0], teacher_says)  # scale 0 at the start
    objective = ConsistencyDistillation(
        student, tiny(3), NULL, ConsistencyConfig(teacher_steps=4, target_decay=0.0), 2.0
    )
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        objective.loss("student", objective.prepare(batches(step), Randomness(0, step, SLOTS))).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step)
    after = {name.replace(".base_layer", ""): p for name, p in student.named_parameters() if ".lora_" not in name}
    assert all(torch.equal(after[name], p) for name, p in base.items())
    adapted = student(batch.images, t, batch.tokens, batch.mask)[0]
    assert float((adapted - teacher_says).detach().abs().max()) > 1e-3
    fused = merge(student)
    torch.testing.assert_close(fused(batch.images, t, batch.tokens, batch.mask)[0], adapted, atol=1e-5, rtol=1e-4)

    style = tiny(0)
    add_lora(style, LoraConfig(rank=2), 1)
    for parameter in style.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    styled = dict(merge(style).named_parameters())
    on_top = merge(student)  # the style put on the merged student adds its own delta to the student's
    add_lora(on_top, LoraConfig(rank=2), 1)
    parts = dict(style.named_parameters())
    with torch.no_grad():
        for name, parameter in on_top.named_parameters():
            if ".lora_" in name:
                parameter.copy_(parts[name])
    both, distilled = dict(merge(on_top).named_parameters()), dict(fused.named_parameters())
    for name, p in base.items():
        torch.testing.assert_close(both[name] - p, (styled[name] - p) + (distilled[name] - p), atol=1e-5, rtol=1e-4)


def test_trigflow_is_a_change_of_variables(gaussian) -> None:
    """T21: back and forth, and the same noise and data at the same place."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    t = torch.rand(64, generator=generator, dtype=torch.float64)
    x, angle = to_trig(x_t, t)
    again, time = to_flow(x, angle)
    assert float((again - x_t).abs().max()) < 1e-10
    assert float((time - t).abs().max()) < 1e-10
    x_0, z = torch.randn(2, 64, 1, 1, 1, generator=generator, dtype=torch.float64)
    a, s = angle.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    torch.testing.assert_close(to_trig((1 - s) * x_0 + s * z, t)[0], a.cos() * x_0 + a.sin() * z)


def test_the_exact_consistency_function_has_no_tangent(gaussian) -> None:
    """T21: dF/da by central differences along the exact path; the wrong sign of dx/da is seen."""
    world = gaussian()
    angle = torch.linspace(0.2, 1.4, 25, dtype=torch.float64)
    x = torch.linspace(-1, 2, 25, dtype=torch.float64).view(-1, 1, 1, 1)

    def field(point, at):
        x_t, t = to_flow(point, at)
        return trig_velocity(world.end(x_t, t.view(-1, 1, 1, 1)), point, at)

    x_t, t = to_flow(x, angle)
    velocity = trig_velocity(world.denoised(x_t, t.view(-1, 1, 1, 1)), x, angle)
    for sign, small in ((1.0, True), (-1.0, False)):
        _, derivative = torch.func.jvp(field, (x, angle), (sign * velocity, torch.ones_like(angle)))
        g = tangent(sign * velocity, field(x, angle), derivative, x, angle, 1.0)
        assert (float(g.abs().max()) < 1e-10) == small


def test_scm_moves_only_the_student_and_its_target_is_fixed(tiny, batches) -> None:
    objective = ContinuousConsistency(tiny(0), tiny(3), NULL, ScmConfig(), 2.0, 10)
    batch = objective.prepare(batches(0), Randomness(0, 5, SLOTS))
    assert not batch.extra["target"].requires_grad
    objective.loss("student", batch).total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": 17}, "skip=17 is more than teacher_steps=16"), ({"guidance_range": (0.5, 2)}, "rising numbers from 1"),
        ({"guidance_range": (2, 3), "use_teacher": False}, "needs a teacher"), ({"target_decay": 1.0}, "less than 1"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**settings)
