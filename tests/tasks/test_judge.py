from pathlib import Path

import numpy as np
import pytest

from data_curation.scenes import LAYOUTS, OBJECTS, SUBJECT_OBJECTS
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.evaluation.config import JudgeConfig
from models.evaluation.judge import Judge
from tasks.judge import draw_random, random_scenes, train_judge


def context(out: Path) -> StageContext:
    out.mkdir(parents=True, exist_ok=True)
    return StageContext("judge", {}, {}, out, out, Resources(), no_progress, fan_out_here)


def test_random_scenes_cover_the_vocabulary_and_the_subjects() -> None:
    scenes = random_scenes(600, np.random.default_rng(0))
    assert {scene.layout for scene in scenes} == set(LAYOUTS)
    assert {name for scene in scenes for name in scene.objects} == set(OBJECTS | SUBJECT_OBJECTS)


def test_draws_repeat_for_a_seed_and_differ_between_seeds() -> None:
    images, scenes = draw_random(6, 3)
    again, _ = draw_random(6, 3)
    assert images.shape == (6, 32, 32, 3)
    assert len(scenes) == 6
    assert np.array_equal(images, again)
    assert not np.array_equal(images, draw_random(6, 4)[0])


def test_the_stage_writes_a_judge_that_loads(tmp_path: Path) -> None:
    config = JudgeConfig(pictures=64, calibration_pictures=8, updates=1, batch_size=8, width=4, feature_size=8)
    facts = train_judge(config, context(tmp_path))
    judge = Judge.load(tmp_path)
    assert judge.calibration == facts["calibration"]
    assert set(judge.score(*draw_random(4, 1))) == {"layout", "object", "background", "shape", "accepted", "all"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_judge_keeps_its_bars(tmp_path: Path) -> None:
    figures = train_judge(JudgeConfig(calibration_pictures=1500), context(tmp_path))["calibration"]
    assert figures["real"] >= 0.98
    for spoilt in ("shuffled_4x4", "shuffled_8x8", "blurred_4x", "displaced_3px", "displaced_2px", "blended"):
        assert figures[spoilt] <= 0.05, (spoilt, figures)
