import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models.evaluation.frequencies import high_frequency_energy
from models.evaluation.precision_recall import precision_recall
from models.networks.checkpoint import SamplingCard
from tasks.compare import Row, against, against_teacher, best_students, rows_of, share
from tasks.compare_scores import Measured
from tasks.config import CompareConfig
from tasks.export import wanted


def measured(share_right: float, distance: float = 0.1) -> Measured:
    right = (np.arange(100) < 100 * share_right).astype(float)
    value = {name: {"value": share_right} for name in ("prompt_accuracy", "prompt_accuracy_full", "diversity")}
    return Measured(value | {"kernel_distance": {"value": distance}}, right)


def row(stage: str, steps: int, own: bool = True) -> Row:
    return Row(stage, steps, Path(), 2.0 if stage == "teacher" else 1.0, own)


def test_a_student_must_beat_its_teacher_at_the_same_number_of_steps() -> None:
    rows = [row("teacher", 1), row("teacher", 4), row("good", 1), row("equal", 4), row("far", 4), row("bad", 1)]
    values = [measured(0.5), measured(0.8, 0.2), measured(0.7), measured(0.8, 0.1), measured(0.8, 0.3), measured(0.4)]
    table = {r.label: m for r, m in zip(rows, values, strict=True)}
    verdicts = {v["row"]: v for v in against_teacher(rows, table)}
    assert {name: v["passed"] for name, v in verdicts.items()} == {
        "good@1": True, "equal@4": True, "far@4": False, "bad@1": False,
    }  # fmt: skip
    assert verdicts["good@1"]["difference"]["value"] == pytest.approx(0.2)
    assert verdicts["bad@1"]["reason"] == "0.400 against 0.500 of the teacher at 1 step(s)"
    best = best_students(rows, table, list(verdicts.values()))
    assert {steps: found["stage"] for steps, found in best.items()} == {"1": "good", "4": "equal"}
    nobody = best_students(rows, table, [{**v, "passed": False} for v in verdicts.values()])
    assert {steps: found["passed"] for steps, found in nobody.items()} == {"1": False, "4": False}
    assert all(v["passed"] for v in against_teacher(rows, table, tolerance=0.15))


def test_shares_of_the_reference() -> None:
    ratios = against(measured(0.45, 0.3), measured(0.9, -0.01))
    assert ratios["basic"] == 0.5
    assert ratios["distance"] is None  # an unbiased distance below zero has no ratio
    assert share(1.0, 4.0) == 0.25


def test_rows_are_what_each_student_was_trained_for(tmp_path) -> None:
    for name, steps, trained in (("a", 4, (4,)), ("b", 1, (1, 2, 4)), ("c", 4, None)):
        (tmp_path / name).mkdir()
        card = SamplingCard(steps=steps, guidance=1.0, distilled=True, trained_steps=trained)
        (tmp_path / name / "sampling.json").write_text(card.model_dump_json())
    inputs = {"judge": tmp_path, "teacher": tmp_path, **{name: tmp_path / name for name in "abc"}}
    rows = rows_of(CompareConfig(teacher_steps=(1, 50)), SimpleNamespace(inputs=inputs))
    assert [r.label for r in rows] == [
        "teacher@1", "teacher@50", "a@4", "b@1", "b@2", "b@4", "c@1", "c@2", "c@4",
    ]  # fmt: skip
    assert [r.label for r in rows if r.own] == ["a@4", "b@1", "c@4"]
    assert rows[1].calls == 100 and rows[2].calls == 4


def test_export_gives_the_best_student_of_each_step_count_away(tmp_path) -> None:
    (tmp_path / "best.json").write_text(json.dumps({"1": {"stage": "distill-dmd"}, "2": {"stage": "distill-cm"}}))
    roles = {"teacher": "dpo", "student-distill-cm": "distill-cm", "student-distill-dmd": "distill-dmd"}
    ctx = SimpleNamespace(
        inputs=dict.fromkeys(roles, tmp_path) | {"compare": tmp_path},
        parents={role: SimpleNamespace(stage=stage) for role, stage in roles.items()} | {"compare": SimpleNamespace(stage="compare")},
    )  # fmt: skip
    folders = wanted(ctx)
    assert folders["student-1"] == ("student-distill-dmd", 1)
    assert folders["student-2"] == ("student-distill-cm", 2)
    assert folders["teacher"] == ("teacher", None)
    assert "compare" not in folders


def test_precision_and_recall_know_blur_and_collapse() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 2))
    precision, recall = precision_recall(rng.normal(size=(300, 2)), real)
    assert precision > 0.9 and recall > 0.9
    collapsed = precision_recall(0.05 * rng.normal(size=(300, 2)), real)
    assert collapsed[0] > 0.95 and collapsed[1] < 0.1
    strange = precision_recall(20 + rng.normal(size=(300, 2)), real)
    assert strange == (0.0, 0.0)
    with pytest.raises(ValueError, match="3 pictures have no 3 neighbours"):
        precision_recall(real, real[:3])


def test_blur_takes_high_frequencies_away() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    smooth = images.astype(float)
    smooth = sum(np.roll(smooth, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 9
    assert high_frequency_energy(smooth.astype(np.uint8)) < 0.1 * high_frequency_energy(images)
    wave = np.cos(2 * np.pi * np.arange(32) / 16)  # 1/16 of a cycle a pixel is no high frequency
    low = np.broadcast_to((128 + 100 * wave)[None, None, :, None], (1, 32, 32, 3))
    assert high_frequency_energy(low) < 1e-9
