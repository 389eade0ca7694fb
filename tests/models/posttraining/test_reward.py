import numpy as np
import pytest
import torch

from data_curation.scenes import Scene, all_scenes, draw_batch
from models.engine.objective import Batch
from models.evaluation.judge import Judge, Vocabulary
from models.posttraining.reward import (
    Composite,
    JudgeReward,
    Measured,
    RewardCard,
    Sharpness,
    Weighted,
    judge_reward,
    score,
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge.build(Vocabulary.of(all_scenes("full")), 4, 16, 0.5)


SCENES = [Scene("big", ("cat",), "white"), Scene("beside", ("car", "fish"), "blue"), Scene("three", ("star",), "pink")]


def asked(rows: torch.Tensor) -> Batch:
    n = len(rows)
    return Batch(torch.zeros(n, 3, 32, 32), torch.zeros(n, 1, 4), torch.ones(n, 1, dtype=torch.bool), tuple(range(n)),
                 extra={"scene": rows})  # fmt: skip


def test_the_tensor_reward_is_that_of_stored_pictures_and_has_a_gradient(judge) -> None:
    rows = torch.tensor([2, 0, 1, 1])
    images = draw_batch([SCENES[i] for i in rows], 32, 0)
    pictures = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).requires_grad_(True)
    reward = JudgeReward(judge, SCENES)
    values = reward(pictures, asked(rows))
    stored = judge_reward(judge, images, [SCENES[i] for i in rows])
    np.testing.assert_allclose(values.detach().numpy(), stored, atol=1e-5)
    values.sum().backward()
    assert pictures.grad.abs().sum() > 0


def test_the_held_out_reward_reads_another_network_and_no_colour(judge) -> None:
    held_out = JudgeReward(judge, SCENES, "shape")
    assert held_out.card.role == "held_out"
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    gray = (pictures * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    rows = torch.arange(3)
    torch.testing.assert_close(held_out(pictures, asked(rows)), held_out(gray, asked(rows)), atol=1e-3, rtol=1e-3)
    colour = JudgeReward(judge, SCENES)
    assert (colour(pictures, asked(rows)) - colour(gray, asked(rows))).abs().max() > 1e-4
    with pytest.raises(ValueError, match="held out"):
        Weighted(held_out)


def test_a_composite_sums_in_sigmas_and_declares_its_range(brightness) -> None:
    pictures = torch.rand(5, 3, 8, 8)
    both = Composite((Weighted(brightness, 2.0), Weighted(Sharpness(), 0.5)))
    bright, sharp = score(both.terms, pictures, asked(torch.arange(5)))
    expected = 2.0 * bright / 0.1 + 0.5 * (sharp - 0.1) / 0.05
    torch.testing.assert_close(both(pictures, asked(torch.arange(5))), expected)
    assert both.card.low == pytest.approx(-20 - 1)
    assert both.card.high == pytest.approx(20 + 19)


def test_sharpness_of_a_chessboard_and_of_a_flat_picture() -> None:
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 3, 4, 4)
    values = Sharpness()(torch.cat([board, torch.zeros_like(board)]), asked(torch.arange(2)))
    assert values.tolist() == [2.0, 0.0]


def test_measured_spread_and_a_reward_that_ranks_nothing(brightness, same) -> None:
    pictures = torch.rand(64, 3, 4, 4)
    card = Measured.on(brightness, pictures, asked(torch.arange(64))).card
    assert card.mean == pytest.approx(float(pictures.mean()), abs=1e-5)
    assert card.sigma == pytest.approx(float(pictures.mean((1, 2, 3)).std()), abs=1e-5)
    with pytest.raises(ValueError, match="same"):
        Measured.on(same, pictures, asked(torch.arange(64)))


def test_a_reward_that_answers_too_little_is_refused() -> None:
    class Short:
        card = RewardCard("short", 0, 1, "trained")

        def __call__(self, pictures, asked):
            return pictures.mean((1, 2, 3))[:1]

    with pytest.raises(ValueError, match="one number a picture"):
        score([Weighted(Short())], torch.zeros(3, 3, 4, 4), asked(torch.arange(3)))
