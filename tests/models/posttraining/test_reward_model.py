"""A planted utility with planted noise has a known ceiling; the reward model must come near it."""

import math

import numpy as np
import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.networks.image_encoder import ImageEncoder
from models.posttraining.calibration import bayes_accuracy, calibration_error, temperature
from models.posttraining.reward_model import IMAGE_DIM, BradleyTerry, RewardModel, Scorer, image_features

F, D, N = 12, 6, 4000


def planted(seed: int, count: int):
    """Features of pairs, text, and utilities u(x, text) = x.a + x.(B text) of both pictures."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    a, b = torch.randn(F, generator=fixed), torch.randn(F, D, generator=fixed) / D**0.5
    first, second = (torch.randn(count, F, generator=generator) for _ in range(2))
    text = torch.randn(count, D, generator=generator)

    def utility(x):
        return 0.4 * (x @ a + (x * (text @ b.T)).sum(1))

    return first, second, text, utility(first), utility(second), generator


def pair_batch(winner, loser, text) -> Batch:
    count = len(text)
    extra = {"winner": winner, "loser": loser}
    mask = torch.ones(count, 1, dtype=torch.bool)
    return Batch(text[:, None], text[:, None], mask, tuple(range(count)), extra=extra)


def test_a_planted_utility_is_recovered_within_the_bayes_limit_of_its_noise(tmp_path) -> None:
    first, second, text, u, w, generator = planted(0, N)
    chosen = torch.rand(N, generator=generator) < torch.sigmoid(u - w)  # labels drawn by Bradley-Terry itself
    winner, loser = (torch.where(chosen[:, None], *pair) for pair in ((first, second), (second, first)))

    def batches(step: int) -> Batch:
        rows = torch.randint(N, (128,), generator=torch.Generator().manual_seed(step))
        return pair_batch(winner[rows], loser[rows], text[rows])

    optimizer = OptimizerConfig(muon_lr=None, adamw_lr=5e-3, warmup_steps=5)
    config = TrainConfig(
        steps=400, batch_size=128, log_every=50, checkpoint_every=400, optimizer=optimizer, ema_gamma=6
    )
    scorer = Scorer(F, D, 64, 0)
    scorer.standardise(torch.cat([first, second]), text)
    train(BradleyTerry(scorer), batches, config, tmp_path)

    first, second, text, u, w, generator = planted(1, N)
    chosen = torch.rand(N, generator=generator) < torch.sigmoid(u - w)
    with torch.no_grad():
        margin = scorer(first, text) - scorer(second, text)
        scores = scorer(first, text)
    limit = bayes_accuracy((u - w).numpy())
    accuracy = ((margin > 0) == chosen).float().mean().item()
    assert 0.6 < limit < 0.9
    assert accuracy > 0.97 * limit
    assert accuracy < limit + 3 * math.sqrt(limit * (1 - limit) / N)
    ranks = torch.stack([scores.argsort().argsort(), u.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    signed = torch.where(chosen, margin, -margin).numpy()
    assert calibration_error(signed, temperature(signed)) < 0.03


def test_loss_is_ln_2_at_the_start_and_swapping_flips_the_gradient() -> None:
    first, second, text, *_ = planted(2, 8)
    objective = BradleyTerry(Scorer(F, D, 8, 0))
    assert objective.loss("scorer", pair_batch(first, second, text)).total.item() == pytest.approx(math.log(2))
    gradients = []
    for winner, loser in ((first, second), (second, first)):
        objective.scorer.zero_grad()
        objective.loss("scorer", pair_batch(winner, loser, text)).total.backward()
        gradients.append(objective.scorer.head.weight.grad.clone())
    torch.testing.assert_close(gradients[0], -gradients[1])
    assert gradients[0].any()


def test_calibration_of_known_probabilities() -> None:
    rng = np.random.default_rng(0)
    gaps = np.abs(rng.normal(0, 2, 20_000))
    agreed = rng.random(20_000) < 1 / (1 + np.exp(-gaps))
    margins = np.where(agreed, gaps, -gaps)
    assert temperature(margins) == pytest.approx(1.0, rel=0.1)
    assert temperature(3 * margins) == pytest.approx(3.0, rel=0.1)
    assert calibration_error(margins, 1.0) < 0.01
    assert calibration_error(margins, 0.2) > 0.1
    assert agreed.mean() == pytest.approx(bayes_accuracy(gaps), abs=0.01)


def test_a_saved_model_scores_the_same_and_is_differentiable(tmp_path, batches) -> None:
    torch.manual_seed(0)
    scorer = Scorer(IMAGE_DIM, 16, 8, 0)
    torch.nn.init.normal_(scorer.head.weight)
    model, asked = RewardModel(scorer, ImageEncoder(), 0.3, 2.0), batches(0)
    pictures = torch.rand(4, 3, 32, 32, requires_grad=True)
    model.save(tmp_path)
    scores = model(pictures, asked)
    assert torch.equal(RewardModel.load(tmp_path)(pictures, asked), scores)
    raw = scorer(
        image_features(ImageEncoder(), pictures),
        asked.tokens.mul(asked.mask[..., None]).sum(1) / asked.mask.sum(1, keepdim=True),
    )
    torch.testing.assert_close(scores, (raw - 0.3) / 2)
    scores.sum().backward()
    assert pictures.grad.abs().flatten(1).sum(1).gt(0).all()
