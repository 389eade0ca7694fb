"""DMD, ADD and their critics on worlds in closed form."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.distillation.add import AdversarialDistillation
from models.distillation.config import AddConfig, DmdConfig
from models.distillation.dmd import DistributionMatching
from models.engine.randomness import Randomness
from models.networks.denoiser import T_CLAMP, Denoiser
from models.networks.discriminator import Critic, CriticHead, hinge, positions, r1_penalty, text_vector
from models.networks.image_encoder import CHANNELS, ImageEncoder

NULL = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
SLOTS = (0, 1, 2, 3)
MEAN, STD = 0.7, 0.3


class Generator(Denoiser):
    """m + s z from pure noise z: a one-step student whose distribution is known at every moment."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.log_s = nn.Parameter(torch.tensor(-0.5)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x_t, t, tokens=None, mask=None):
        x = self.m + self.log_s.exp() * x_t
        self.last = x.detach()
        return x, None

    predict = forward


class FakeScore(Denoiser):
    """The exact score of the generator's present pictures; `zero`: the picture itself, so that nothing pushes back."""

    def __init__(self, generator, gaussian, zero=False) -> None:
        super().__init__()
        self.known = [generator, gaussian, zero]  # in a list: not a submodule

    def forward(self, x_t, t, tokens=None, mask=None, layer=None):
        generator, gaussian, zero = self.known
        t = t.view(-1, 1, 1, 1)
        if zero:
            return generator.last, None
        world = gaussian(generator.m.item(), generator.log_s.exp().item())
        return x_t - t.clamp_min(T_CLAMP) * world.velocity(x_t, t), None

    predict = forward


def distilled(gaussian, line, zero=False, sign=1.0, steps=500):
    student = Generator()
    fake = FakeScore(student, gaussian, zero)
    objective = DistributionMatching(student, gaussian(MEAN, STD), fake, NULL, DmdConfig(fake_steps=1), 1, 1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    batch = line(torch.zeros(128))
    for step in range(steps):
        loss = objective.loss("student", objective.prepare(batch, fast(step, batch.slots))).total
        optimizer.zero_grad()
        (sign * loss).backward()
        optimizer.step()
        schedule.step()
    return student.m.item(), student.log_s.exp().item()


class fast:  # noqa: N801 - stands for Randomness where its one generator a sample would be slow
    def __init__(self, step, slots) -> None:
        self.step, self.count = step, len(slots)
        self.generator = torch.Generator().manual_seed(step)

    def normal(self, stream, shape):
        return torch.randn((self.count, *shape), generator=self.generator)

    def uniform(self, stream, shape=()):
        return torch.rand((self.count, *shape), generator=self.generator)

    def stratified(self, stream):
        start = torch.rand((), generator=self.generator)
        return ((torch.arange(self.count) + start) / self.count).clamp_max(1 - 2**-24)[
            torch.randperm(self.count, generator=self.generator)
        ]

    def shared(self, stream):
        return self.generator


def test_dmd_finds_mean_and_spread_and_needs_its_fake_score(gaussian, line) -> None:
    """T14 and T15: without the fake score the generator falls onto the mode; with the wrong sign it runs away."""
    m, s = distilled(gaussian, line)
    assert m == pytest.approx(MEAN, abs=0.005)
    assert s == pytest.approx(STD, abs=0.005)
    _, collapsed = distilled(gaussian, line, zero=True)
    assert collapsed < 0.03
    away, _ = distilled(gaussian, line, sign=-1.0, steps=60)
    assert abs(away - MEAN) > abs(-0.5 - MEAN)


def test_the_score_difference_is_the_gradient_of_the_divergence(gaussian) -> None:
    """T13: E[(1 - t)(s_fake - s_real)] = d/dm KL(N(m, s)_t || N_real,t) = (1 - t)^2 (m - mean) / var_t when s = STD."""
    generator = torch.Generator().manual_seed(3)
    m, t = 1.3, torch.tensor(0.6, dtype=torch.float64)
    real, fake = gaussian(MEAN, STD), gaussian(m, STD)
    x = m + STD * torch.randn(400_000, generator=generator, dtype=torch.float64)
    x_t = (1 - t) * x + t * torch.randn(400_000, generator=generator, dtype=torch.float64)
    got = ((1 - t) * (fake.score(x_t, t) - real.score(x_t, t))).mean()
    expected = (1 - t) ** 2 * (m - MEAN) / real.spread(t) ** 2
    assert float(got) == pytest.approx(float(expected), rel=5e-3)
    assert float(-got) != pytest.approx(float(expected), rel=0.5)


def dmd(tiny, **settings):
    config = DmdConfig(fake_steps=5, **settings)
    head = CriticHead(32, 16) if config.gan_weight > 0 else None
    return DistributionMatching(tiny(0), tiny(3), tiny(3), NULL, config, 4, 2.0, head=head)


def test_dmd_gradients_stay_with_the_player_whose_turn_it_is(tiny, batches) -> None:
    """T16."""
    objective = dmd(tiny, gan_weight=0.1)
    batch = objective.prepare(batches(0), Randomness(0, 0, SLOTS))
    for parameter in objective.fake.parameters():
        parameter.requires_grad_(False)
    objective.loss("student", batch).total.backward()
    assert all(p.grad is None for p in (*objective.teacher.parameters(), *objective.fake.parameters()))
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())
    for parameter in objective.student.parameters():
        parameter.grad = None
    for parameter in objective.fake.parameters():
        parameter.requires_grad_(True)
    objective.loss("fake", batch).total.backward()
    assert all(p.grad is None for p in (*objective.teacher.parameters(), *objective.student.parameters()))
    assert any(p.grad is not None and p.grad.any() for p in objective.fake["head"].parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.fake["denoiser"].parameters())


def test_two_time_scales(tiny) -> None:
    """T17: in 60 steps of ratio 5 the student moves 12 times, the fake score 60 times, whatever the start."""
    objective = dmd(tiny)
    turns = [objective.turns(step) for step in range(60)]
    assert sum("student" in turn for turn in turns) == 12
    assert sum("fake" in turn for turn in turns) == 60
    assert next(step for step in range(7, 60) if "student" in turns[step]) == 10


def test_backward_simulation_knows_no_data_and_one_index_for_all(tiny, batches) -> None:
    """T18: to the bit; and each worker's samples are where they would be in the whole batch."""
    objective, seen = dmd(tiny), set()
    for step in range(8):
        rng, batch = Randomness(0, step, SLOTS), batches(step)
        one = objective.prepare(batch, rng).extra
        batch.images = torch.rand_like(batch.images)
        other = objective.prepare(batch, rng).extra
        assert torch.equal(one["input"], other["input"])
        assert len(one["t_k"].unique()) == 1
        seen.add(float(one["t_k"][0]))
        part = objective.prepare(batches(step, (2, 3)), Randomness(0, step, (2, 3))).extra
        assert torch.equal(part["t_k"], one["t_k"][2:])
        torch.testing.assert_close(part["input"], one["input"][2:], atol=1e-5, rtol=1e-4)
    assert len(seen) > 1
    assert seen <= {1.0, 0.75, 0.5, 0.25}


def test_the_normaliser_is_each_samples_own(tiny, batches) -> None:
    objective = dmd(tiny)
    batch = objective.prepare(batches(0), Randomness(0, 0, SLOTS))
    x = batch.images.clone()
    before = objective._gradient(x, batch)
    x[0] *= 50  # one wild sample
    after = objective._gradient(x, batch)
    torch.testing.assert_close(after[1:], before[1:], atol=1e-5, rtol=1e-4)
    x[0] = float("nan")
    gradient = objective._gradient(x, batch)
    assert bool(torch.isfinite(gradient).all())
    assert not gradient[0].any()


def add(tiny, features="image_encoder", **settings):
    config = AddConfig(features=features, **settings)
    pixels = features == "image_encoder"
    critic = Critic(CHANNELS if pixels else (32,), 16, 0)
    return AdversarialDistillation(tiny(0), tiny(3), critic, ImageEncoder() if pixels else None, NULL, config, 2, 2.0)


@pytest.mark.parametrize("features", ["image_encoder", "teacher"])
def test_add_gradients_stay_with_the_player_whose_turn_it_is(tiny, batches, features) -> None:
    objective = add(tiny, features)
    batch = objective.prepare(batches(0), Randomness(0, 0, SLOTS))
    assert set(batch.extra["tau"].tolist()) <= {0.5, 1.0}
    for parameter in objective.critic.parameters():
        parameter.requires_grad_(False)
    objective.loss("student", batch).total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())
    for parameter in objective.student.parameters():
        parameter.grad = None
    for parameter in objective.critic.parameters():
        parameter.requires_grad_(True)
    objective.loss("critic", batch).total.backward()
    assert all(p.grad is None for p in (*objective.student.parameters(), *objective.teacher.parameters()))
    assert all(p.grad is not None for p in objective.critic.parameters())


def test_adds_distillation_pulls_to_a_fixed_target_less_at_more_noise(tiny, batches) -> None:
    """c(t) = 1 - t, by the obvious formula; the teacher's answer is no path for the gradient."""
    objective = add(tiny, "teacher", adversarial_weight=0.0)
    batch = objective.prepare(batches(0), Randomness(0, 0, SLOTS))
    loss = objective.loss("student", batch)
    with torch.no_grad():
        x, t = batch.extra["generated"], batch.extra["t"]
        mixed = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * batch.extra["eps"]
        cond = objective.teacher(mixed, t, batch.tokens, batch.mask)[0]
        empty = objective.teacher(mixed, t, NULL[0].expand(4, -1, -1), NULL[1].expand(4, -1))[0]
        target = empty + 2.0 * (cond - empty)
        expected = ((1 - t) * (x - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(loss.total.detach(), expected, atol=1e-5, rtol=1e-4)


def test_the_logistic_critic_learns_the_log_ratio() -> None:
    """T19: two normals; the best logit is log p / q."""
    torch.manual_seed(0)
    head = CriticHead(1, 1)
    text = torch.zeros(512, 1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(300):
        real, made = 1.0 + torch.randn(512, 1, 1), -0.5 + 0.7 * torch.randn(512, 1, 1)
        loss = (F.softplus(-head(real, text)) + F.softplus(head(made, text))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.linspace(-2, 2.5, 46)
    best = -((x - 1) ** 2) / 2 + (x + 0.5) ** 2 / (2 * 0.49) + math.log(0.7)
    with torch.no_grad():
        learnt = head(x.view(-1, 1, 1), torch.zeros(46, 1)).flatten()
    assert float(torch.corrcoef(torch.stack([learnt, best]))[0, 1]) > 0.98


def test_hinge_and_r1_are_their_formulas() -> None:
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-2.0, 0.5]])
    assert hinge(real, fake).tolist() == [0.25 + 0.75]
    head = nn.Linear(3, 1)

    def linear(features, text):
        return head(features[0])[..., 0]

    penalty = r1_penalty(linear, [torch.randn(2, 4, 3)], torch.zeros(2, 1))
    expected = head.weight.square().sum() / 4  # the mean over four positions: each has w / 4, four of them
    torch.testing.assert_close(penalty, expected.expand(2))
    penalty.mean().backward()
    torch.testing.assert_close(head.weight.grad, head.weight.detach() / 2)


def test_every_feature_map_counts_the_same() -> None:
    critic = Critic((4, 6), 16, 0)
    features = [torch.randn(2, 8, 4), torch.randn(2, 2, 6)]
    text = torch.randn(2, 16)
    logits = critic(features, text)
    means = torch.stack([head(f, text).mean(1) for head, f in zip(critic.heads, features, strict=True)]).mean(0)
    torch.testing.assert_close(logits.mean(1), means)


def test_text_vector_is_the_mean_of_real_tokens() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert text_vector(tokens, torch.tensor([[True, True, False]])).tolist() == [[2.0]]


def test_the_image_encoder_is_frozen_differentiable_and_what_repa_reads() -> None:
    from data_curation.encoders import teacher_features

    encoder = ImageEncoder()
    pixels = torch.randint(0, 256, (2, 3, 16, 16)).float()
    images = (pixels / 127.5 - 1).requires_grad_(True)
    maps = encoder(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 16), (24, 8, 8), (40, 4, 4)]
    assert [p.shape[1] for p in positions(maps)] == [256, 64, 16]
    maps[-1].sum().backward()
    assert images.grad is not None and bool(images.grad.any())
    assert not any(p.requires_grad for p in encoder.train().parameters())
    assert not encoder.training
    doubled = F.interpolate(pixels, scale_factor=2, mode="bilinear").permute(0, 2, 3, 1).numpy()
    theirs = torch.from_numpy(teacher_features(doubled)).float().permute(0, 3, 1, 2)
    assert float((maps[-1].detach() - theirs).abs().mean() / theirs.abs().mean()) < 0.05
