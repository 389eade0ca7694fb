"""Pictures that the demo's checkpoints drew (rows: pretrain-32, sft, dpo, distill-1, real renders) pass; spoilt ones never."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.evaluation.density_coverage import mode_share
from models.evaluation.gates import judge_collapse

SIDE, STAGES = 32, 4


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """uint8 [stages + real, prompts, 32, 32, 3]."""
    with Image.open(Path(__file__).parent / "demo_pictures.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    return pixels.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 1, 3, 4)


def test_no_sound_run_is_refused(drawn: np.ndarray) -> None:
    """20 runs: each of four real checkpoints on five choices of ten prompts."""
    verdicts = []
    for choice in range(5):
        rows = np.random.default_rng(choice).permutation(drawn.shape[1])[:10]
        verdicts += [judge_collapse(f"run-{s}-{choice}", drawn[s, rows], drawn[-1, rows]) for s in range(STAGES)]
    assert len(verdicts) == 20
    assert [v["reason"] for v in verdicts if not v["passed"]] == []


def spoilt(kind: str, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grain = rng.normal(0, 3, images.shape)
    match kind:
        case "black":
            return np.zeros_like(images)
        case "constant":
            return np.repeat(np.repeat(images[:, :1, :1], SIDE, 1), SIDE, 2)
        case "noise":
            return rng.integers(0, 256, images.shape, dtype=np.uint8)
        case "copies":
            return np.repeat(images[:1], len(images), 0)
        case "one mode":
            return np.clip(np.repeat(images[:1], len(images), 0) + grain, 0, 255).astype(np.uint8)
        case _:
            return np.clip(images[np.arange(len(images)) % 2] + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["black", "constant", "noise", "copies", "one mode", "two modes"])
def test_every_collapsed_run_is_refused(drawn: np.ndarray, kind: str) -> None:
    for stage in range(STAGES):
        images = spoilt(kind, drawn[stage], np.random.default_rng(stage))
        verdict = judge_collapse("dpo", images, drawn[-1])
        assert not verdict["passed"]
        assert verdict["reason"]


def test_mode_share_is_one_for_the_real_and_needs_the_same_prompts(drawn: np.ndarray) -> None:
    assert mode_share(drawn[-1], drawn[-1]) == pytest.approx(1)
    with pytest.raises(ValueError, match="same prompts"):
        mode_share(drawn[0, :3], drawn[-1])
