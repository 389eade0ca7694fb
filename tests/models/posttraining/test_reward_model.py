"""A planted utility with planted noise has a known ceiling; the reward model must come near it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import ArtifactCorrupted
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.engine.weights import put_weights
from models.posttraining.calibration import bayes_accuracy, calibration_error, kept_probability, temperature
from models.posttraining.reward_model import BradleyTerry, RewardModel, Scorer

D, N = 3, 1500
OPTIMIZER = OptimizerConfig(muon_lr=None, adamw_lr=5e-3, warmup_steps=5)


def planted(seed: int, count: int):
    """Plain pictures of a random colour each; the text names how much each channel is liked: u = 2 <colour, text>."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(count, 3, generator=generator) * 2 - 1 for _ in range(2))
    text = torch.randn(count, D, generator=generator)
    u, w = (2 * (colour * text).sum(1) for colour in (first, second))
    first, second = (colour[:, :, None, None].expand(-1, -1, 16, 16) for colour in (first, second))
    return first, second, text, u, w, generator


def pair_batch(winner, loser, text, **curated) -> Batch:
    count = len(text)
    extra = {"winner": winner, "loser": loser, "prompt": torch.arange(count), **curated}
    mask = torch.ones(count, 1, dtype=torch.bool)
    return Batch(text[:, None], text[:, None], mask, tuple(range(count)), extra=extra)


def scorer_of(seed: int = 0) -> Scorer:
    return Scorer(D, 8, 32, 16, seed)


def fitted(first, second, text, chosen, folder, steps=120) -> Scorer:
    """A scorer trained on these pairs, `chosen` saying where the first picture won."""
    swap = chosen[:, None, None, None]
    winner, loser = torch.where(swap, first, second), torch.where(swap, second, first)

    def batches(step: int) -> Batch:
        rows = torch.randint(N, (48,), generator=torch.Generator().manual_seed(step))
        return pair_batch(winner[rows], loser[rows], text[rows])

    config = TrainConfig(
        steps=steps, batch_size=48, log_every=40, checkpoint_every=steps, optimizer=OPTIMIZER, ema_gamma=6
    )
    scorer = scorer_of()
    scorer.standardise(text)
    trainer = train(BradleyTerry(scorer), batches, config, folder)
    put_weights(scorer, trainer.emas["scorer"].average)
    return scorer


def rank_correlation(margin, truth) -> float:
    ranks = torch.stack([margin.argsort().argsort(), truth.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def test_a_planted_utility_without_noise_is_recovered_in_its_order(tmp_path) -> None:
    first, second, text, u, w, _ = planted(0, N)
    scorer = fitted(first, second, text, u > w, tmp_path, 240)
    first, second, text, u, w, _ = planted(1, N)
    with torch.no_grad():
        margin = scorer(first, text) - scorer(second, text)
    assert rank_correlation(margin, u - w) > 0.95
    assert ((margin > 0) == (u > w)).float().mean() > 0.9


def test_a_planted_utility_is_recovered_within_the_bayes_limit_of_its_noise(tmp_path) -> None:
    first, second, text, u, w, generator = planted(0, N)
    chosen = torch.rand(N, generator=generator) < torch.sigmoid(u - w)  # labels drawn by Bradley-Terry itself
    scorer = fitted(first, second, text, chosen, tmp_path)

    first, second, text, u, w, generator = planted(1, N)
    chosen = torch.rand(N, generator=generator) < torch.sigmoid(u - w)
    with torch.no_grad():
        margin = scorer(first, text) - scorer(second, text)
    limit = bayes_accuracy((u - w).numpy())
    accuracy = ((margin > 0) == chosen).float().mean().item()
    assert 0.6 < limit < 0.9
    assert accuracy > 0.95 * limit
    assert accuracy < limit + 3 * math.sqrt(limit * (1 - limit) / N)
    assert rank_correlation(margin, u - w) > 0.9
    signed = torch.where(chosen, margin, -margin).numpy()
    assert calibration_error(signed, temperature(signed)) < 0.05


def test_loss_is_ln_2_at_the_start_and_swapping_flips_the_gradient() -> None:
    first, second, text, *_ = planted(2, 8)
    objective = BradleyTerry(scorer_of())
    assert objective.loss("scorer", pair_batch(first, second, text)).total.item() == pytest.approx(math.log(2))
    gradients = []
    for winner, loser in ((first, second), (second, first)):
        objective.scorer.zero_grad()
        objective.loss("scorer", pair_batch(winner, loser, text)).total.backward()
        gradients.append(objective.scorer.text[-1].weight.grad.clone())
    torch.testing.assert_close(gradients[0], -gradients[1])
    assert gradients[0].any()


def curated_batch(step: int) -> Batch:
    first, second, text, *_ = planted(step, 8)
    pictures, _, captions, *_ = planted(step + 1000, 8)
    return pair_batch(first, second, text, curated=pictures, captions=captions, caption=torch.arange(8) // 2)


def test_the_score_of_a_pair_is_the_same_in_the_table_and_alone_and_alignment_adds_its_three_terms() -> None:
    torch.manual_seed(0)
    scorer = scorer_of()
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = BradleyTerry(scorer, 0.5).prepare(curated_batch(0), Randomness(0, 0, tuple(range(8))))
    loss = BradleyTerry(scorer, 0.5).loss("scorer", batch)
    text = batch.tokens[:, 0]
    margin = scorer(batch.extra["winner"], text) - scorer(batch.extra["loser"], text)
    torch.testing.assert_close(loss.parts["preference"], torch.nn.functional.softplus(-margin).mean().detach())
    added = sum(loss.parts[name] for name in ("curated", "drawn", "spoilt"))
    torch.testing.assert_close(loss.total.detach(), loss.parts["preference"] + 0.5 * added)


def test_preferences_wait_until_pictures_can_be_told_apart() -> None:
    objective = BradleyTerry(scorer_of(), 1.0, after=3)
    for step, counts in ((2, False), (3, True)):
        batch = objective.prepare(curated_batch(0), Randomness(0, step, tuple(range(8))))
        turned = replace(batch, extra={**batch.extra, "winner": batch.extra["loser"], "loser": batch.extra["winner"]})
        gradients = []
        for side in (batch, turned):
            objective.scorer.zero_grad()
            loss = objective.loss("scorer", side)
            (loss.total - loss.parts["drawn"]).backward()
            gradients.append(objective.scorer.alone.weight.grad.clone())
        assert torch.equal(*gradients) != counts


class KilledError(Exception):
    """Stands for a killed process."""


def test_training_resumes_to_the_bit(tmp_path: Path) -> None:
    config = TrainConfig(steps=6, batch_size=8, log_every=1, checkpoint_every=2, optimizer=OPTIMIZER, ema_gamma=6)

    def dying_at(limit: int) -> Callable[[int], Batch]:
        def batch(step: int) -> Batch:
            if step == limit:
                raise KilledError
            return curated_batch(step)

        return batch

    straight = train(BradleyTerry(scorer_of(), 1.0, 3), curated_batch, config, tmp_path / "straight")
    with pytest.raises(KilledError):
        train(BradleyTerry(scorer_of(), 1.0, 3), dying_at(3), config, tmp_path / "broken")
    resumed = train(BradleyTerry(scorer_of(), 1.0, 3), curated_batch, config, tmp_path / "broken")
    assert straight.rows == resumed.rows
    own, other = (t.players["scorer"].state_dict() for t in (straight, resumed))
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert not torch.equal(own["text.2.weight"], scorer_of().state_dict()["text.2.weight"])


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


def test_the_limit_of_planted_noise_is_the_agreement_of_whoever_knows_the_utility() -> None:
    rng = np.random.default_rng(0)
    strengths = rng.exponential(0.3, 40_000)
    kept = kept_probability(strengths, 0.1, 0.2)
    stays = rng.random(len(kept)) < kept
    assert stays.mean() == pytest.approx(np.maximum(kept, 1 - kept).mean(), abs=0.01)
    assert np.array_equal(kept_probability(strengths, 0.0, None), np.ones(len(kept)))
    assert kept_probability(strengths, 0.2, None) == pytest.approx(np.full(len(kept), 0.8))
    assert kept_probability(strengths, 0.0, 0.2).mean() == pytest.approx(bayes_accuracy(strengths / 0.2))


def test_a_saved_model_scores_the_same_and_is_differentiable_at_any_size(tmp_path, batches) -> None:
    torch.manual_seed(0)
    scorer = Scorer(16, 8, 8, 16, 0)
    for last in (scorer.text[-1], scorer.alone):
        torch.nn.init.normal_(last.weight)
    model, asked = RewardModel(scorer, 0.3, 2.0), batches(0)
    model.save(tmp_path)
    text = asked.tokens.mul(asked.mask[..., None]).sum(1) / asked.mask.sum(1, keepdim=True)
    for side in (16, 40):
        pictures = torch.rand(4, 3, side, side, requires_grad=True)
        scores = model(pictures, asked)
        assert torch.equal(RewardModel.load(tmp_path)(pictures, asked), scores)
        torch.testing.assert_close(scores, (scorer(pictures, text) - 0.3) / 2)
        scores.sum().backward()
        assert pictures.grad.abs().flatten(1).sum(1).gt(0).all()


def test_a_folder_of_another_form_is_refused(tmp_path) -> None:
    RewardModel(scorer_of(), 0.0, 1.0).save(tmp_path)
    (tmp_path / "reward.json").write_text('{"mean": 0.0, "sigma": 1.0}')
    with pytest.raises(ArtifactCorrupted, match="run its stage again"):
        RewardModel.load(tmp_path)
