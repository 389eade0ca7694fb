from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import ArtifactCorrupted
from models.evaluation.config import JudgeConfig
from models.evaluation.judge import Judge, Vocabulary, area_average, shape_channel
from models.evaluation.judge_training import train_judge


@dataclass(frozen=True)
class Toy:
    layout: str
    objects: tuple[str, ...]
    background: str


COLOURS = {"black": 20, "white": 235}


def draw(count: int, seed: int) -> tuple[np.ndarray, list[Toy]]:
    """Bars and discs on the left or beside each other, on two backgrounds."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    images, scenes = np.empty((count, 32, 32, 3), np.uint8), []
    for i in range(count):
        layout, background = ("big", "beside")[rng.integers(2)], ("black", "white")[rng.integers(2)]
        names = tuple(("bar", "disc")[k] for k in rng.integers(2, size=1 if layout == "big" else 2))
        canvas = np.full((32, 32, 3), COLOURS[background], np.uint8)
        centres = [16] if layout == "big" else [8, 24]
        for name, centre in zip(names, centres, strict=True):
            inside = (
                (x - centre) ** 2 + (y - 16) ** 2 < 36 if name == "disc" else (abs(x - centre) < 2) & (abs(y - 16) < 8)
            )
            canvas[inside] = (200, 60, 60)
        images[i] = canvas
        scenes.append(Toy(layout, names, background))
    return images, scenes


@pytest.fixture(scope="module")
def judge() -> Judge:
    config = JudgeConfig(
        pictures=96, calibration_pictures=12, updates=40, batch_size=32, width=6, feature_size=24, learning_rate=1e-2
    )
    return train_judge(draw, config, 0, lambda done, total, metrics: None)


def test_a_trained_judge_knows_the_toy_scenes(judge: Judge) -> None:
    images, scenes = draw(64, 9)
    verdict = judge.score(images, scenes)
    assert verdict["layout"].mean() > 0.9
    assert verdict["object"].mean() > 0.9
    wrong = [
        Toy(s.layout, tuple("bar" if name == "disc" else "disc" for name in s.objects), s.background) for s in scenes
    ]
    assert verdict["all"].sum() > judge.score(images, wrong)["all"].sum()


def test_all_is_the_conjunction_of_every_head(judge: Judge) -> None:
    verdict = judge.score(*draw(32, 5))
    heads = np.stack([verdict[name] for name in ("layout", "object", "background", "shape", "accepted")])
    assert np.array_equal(verdict["all"], heads.all(0))


def test_saved_and_loaded_judge_gives_the_same_answers(judge: Judge, tmp_path: Path) -> None:
    images, scenes = draw(16, 3)
    judge.save(tmp_path)
    again = Judge.load(tmp_path)
    assert np.array_equal(judge.features(images), again.features(images))
    assert again.vocabulary == judge.vocabulary
    assert all(np.array_equal(a, b) for a, b in zip(judge.score(images, scenes).values(),
                                                    again.score(images, scenes).values(), strict=True))  # fmt: skip
    (tmp_path / "judge.json").write_text("{")
    with pytest.raises(ArtifactCorrupted, match="run the judge stage again"):
        Judge.load(tmp_path)


def test_the_second_object_counts_only_where_there_are_two() -> None:
    vocabulary = Vocabulary(("bar", "disc"), ("beside", "big"), ("black", "white"))
    labels = vocabulary.labels(
        [Toy("big", ("disc",), "white"), Toy("beside", ("bar", "disc"), "black"), Toy("big", ("cat",), "black")]
    )
    assert labels["object_2"].tolist() == [-1, 1, -1]
    assert labels["object_1"].tolist() == [1, 0, -1]


def test_training_twice_gives_the_same_weights() -> None:
    config = JudgeConfig(pictures=64, calibration_pictures=8, updates=2, batch_size=8, width=4, feature_size=8)
    first, second = (train_judge(draw, config, 4, lambda done, total, metrics: None) for _ in range(2))
    pairs = zip(first.colour.state_dict().values(), second.colour.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_area_average_is_exact_for_any_ratio() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3), dtype=np.uint8)
    fine = image.repeat(4, 1).repeat(4, 2).reshape(1, 32, 5, 32, 5, 3).mean((2, 4))
    assert np.abs(area_average(image, 32) - fine).max() <= 0.5
    assert area_average(image, 40) is image
    with pytest.raises(ValueError, match="40x20"):
        area_average(image[:, :20], 32)


def test_the_shape_channel_forgets_brightness_and_contrast() -> None:
    picture = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    mix = torch.tensor([[0.3, 0.6, 0.1]])
    plain = shape_channel(picture, mix)
    assert torch.allclose(plain, shape_channel(picture + 0.2, mix), atol=1e-4)
    assert torch.allclose(plain, shape_channel(picture * 0.5, mix), rtol=0.12, atol=1e-3)
