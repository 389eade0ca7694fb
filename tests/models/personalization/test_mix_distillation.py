"""A mix taught by several models: each row has its own teacher's target, and the student can become all of them."""

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.distribute import one_thread
from models.engine.loop import train
from models.engine.randomness import Randomness
from models.networks.config import LoraConfig
from models.personalization.dreambooth import Pictures
from models.personalization.lora import add_lora, with_changes
from models.personalization.mix_distillation import MixDistillation, lesson_batches
from models.pretraining.config import TimestepConfig

SLOTS = tuple(range(6))
NULL = (torch.full((1, 6, 16), 9.0), torch.tensor([[True, True, False, False, False, False]]))


@pytest.fixture(autouse=True)
def one_core():
    with one_thread():
        yield


def changed(denoiser, seed: int):
    """The base with random changes of rank 2 on its linear layers."""
    g = torch.Generator().manual_seed(seed)
    sides = {n: m.weight.shape for n, m in denoiser.transformer.named_modules() if n.endswith(("up_proj", "to_out.0"))}
    return with_changes(denoiser, {
        n: 0.05 * torch.randn(o, 2, generator=g) @ torch.randn(2, i, generator=g) for n, (o, i) in sides.items()
    })  # fmt: skip


def lesson(seed: int, prompt: float, length: int = 3) -> Pictures:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(6) < length).expand(4, 6)
    return Pictures(torch.rand(4, 3, 8, 8, generator=g) * 2 - 1, torch.full((4, 6, 16), prompt), mask)


def test_each_row_aims_at_its_own_teacher(tiny) -> None:
    teachers = [tiny(0), changed(tiny(0), 1), changed(tiny(0), 2)]
    batch = lesson_batches([lesson(1, 0.0), lesson(2, 1.0), lesson(3, -1.0)], NULL, 0.0, SLOTS, 0)(5)
    assert batch.extra["teacher"].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.tokens[:, 0, 0].tolist() == [0.0, 1.0, -1.0, 0.0, 1.0, -1.0]
    prepared = MixDistillation(tiny(0), TimestepConfig(), teachers, NULL, 1.0).prepare(batch, Randomness(0, 5, SLOTS))
    for row, number in enumerate(batch.extra["teacher"].tolist()):
        given = [each[row : row + 1] for each in (prepared.extra["x_t"], prepared.extra["t"], batch.tokens, batch.mask)]
        with torch.no_grad():
            wanted = teachers[number](*given)[0][0]
        torch.testing.assert_close(prepared.images[row], wanted, atol=1e-5, rtol=1e-5)
        other = teachers[(number + 1) % 3](*given)[0][0]
        assert float((prepared.images[row] - other).abs().max()) > 1e-3


def test_the_guided_target_is_the_guided_teacher_and_empty_prompts_are_the_base_s(tiny) -> None:
    """g s(c) - (g - 1) s("") with s("") the base's answer is g v(c) - (g - 1) v("") of the teacher."""
    teachers, g = [tiny(0), changed(tiny(0), 1)], 2.5
    objective = MixDistillation(tiny(0), TimestepConfig(), teachers, NULL, g)
    batch = lesson_batches([lesson(1, 0.0), lesson(2, 1.0)], NULL, 0.4, SLOTS, 0)(2)
    prepared = objective.prepare(batch, Randomness(0, 2, SLOTS))
    empty = [each.expand(6, *each.shape[1:]) for each in NULL]
    with torch.no_grad():
        given = prepared.extra["x_t"], prepared.extra["t"]
        base, own = (teacher(*given, *empty)[0] for teacher in teachers)
        taught = teachers[1](*given, batch.tokens, batch.mask)[0]
    cut, subject = batch.extra["empty"], (batch.extra["teacher"] == 1) & ~batch.extra["empty"]
    assert cut.any()
    assert subject.any()
    torch.testing.assert_close(prepared.images[cut], base[cut], atol=1e-5, rtol=1e-5)
    guided = g * prepared.images - (g - 1) * base
    torch.testing.assert_close(guided[subject], (g * taught - (g - 1) * own)[subject], atol=1e-4, rtol=1e-4)
    assert float((prepared.images - taught)[subject].abs().max()) > 1e-3


def test_the_loss_of_a_teacher_is_0_and_no_gradient_reaches_it(tiny) -> None:
    teacher = changed(tiny(0), 1)
    lessons = [lesson(1, 0.0), lesson(2, 1.0)]
    batch = lesson_batches(lessons, NULL, 0.0, SLOTS, 0)(0)

    def loss(student):
        objective = MixDistillation(student, TimestepConfig(), [teacher, teacher], NULL, 2.0)
        return objective.loss("denoiser", objective.prepare(batch, Randomness(0, 0, SLOTS))).total

    assert float(loss(changed(tiny(0), 1)).detach()) < 1e-9
    student = tiny(0)
    add_lora(student, LoraConfig(rank=2), 0)
    far = loss(student)
    far.backward()
    assert float(far.detach()) > 1e-3
    assert all(p.grad is None for p in teacher.parameters())
    reached = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and all(".lora_" in name for name in reached)


def test_text_is_cut_where_the_longest_prompt_ends(tiny) -> None:
    batch = lesson_batches([lesson(1, 0.5, length=2), lesson(2, 0.5, length=4)], NULL, 0.0, SLOTS, 0)(0)
    assert batch.tokens.shape == (6, 4, 16)
    assert batch.mask.sum(1).tolist() == [2, 4] * 3


def test_a_share_of_the_rows_has_the_empty_prompt_and_keeps_picture_and_teacher() -> None:
    lessons = [lesson(1, 0.0), lesson(2, 1.0)]
    full, cut = lesson_batches(lessons, NULL, 0.0, SLOTS, 0), lesson_batches(lessons, NULL, 0.25, SLOTS, 0)
    empty = torch.stack([cut(step).tokens[:, 0, 0] == 9.0 for step in range(200)])
    assert float(empty.float().mean()) == pytest.approx(0.25, abs=0.05)
    for step in range(3):
        one, two = full(step), cut(step)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.extra["teacher"], two.extra["teacher"])
        assert torch.equal(one.tokens[~empty[step]], two.tokens[~empty[step]])
        assert (two.mask.sum(1) == torch.where(empty[step], 2, 3)).all()


def test_one_model_learns_what_two_teachers_do_for_their_prompts(tiny, tmp_path) -> None:
    """Both teachers' losses fall well below what the base, which knows neither, starts from."""
    teachers = [changed(tiny(0), 1), changed(tiny(0), 2)]
    lessons = [lesson(1, 1.0), lesson(2, -1.0)]
    student = tiny(0)
    add_lora(student, LoraConfig(rank=8), 0)
    objective = MixDistillation(student, TimestepConfig(), teachers, NULL, 1.0)
    config = TrainConfig(
        steps=120, batch_size=6, log_every=20, checkpoint_every=120, ema_gamma=0.0,
        optimizer=OptimizerConfig(muon_lr=None, adamw_lr=0.01, warmup_steps=0),
    )  # fmt: skip
    trainer = train(objective, lesson_batches(lessons, NULL, 0.0, SLOTS, 0), config, tmp_path)
    assert trainer.rows[-1]["loss"] < 0.3 * trainer.rows[0]["loss"]
