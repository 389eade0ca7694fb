"""Subjects of one's own at toy size, with the real text encoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from data_curation.config import SubjectFolder
from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from data_curation.scenes import Scene, draw_batch
from data_curation.subject import read_subject
from infra.artifacts import Artifact
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.engine.distribute import one_thread
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig
from models.personalization.config import DreamBoothConfig
from tasks.personalize import dreambooth

CAPTIONS = ["", "a big apple on a blue background", "two cats side by side on a white background"]
SHORT = {
    "class_word": "toy", "class_pictures": 4, "lora": {"rank": 2},
    "train": {"steps": 2, "batch_size": 4, "ema_gamma": 0.0,
              "optimizer": {"muon_lr": None, "adamw_lr": 0.05, "warmup_steps": 0}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_core():
    with one_thread():
        yield


@pytest.fixture
def places(tmp_path) -> dict[str, Path]:
    """A random base, a training set's text part, and a folder with four pictures, two of them captioned."""
    denoiser = prx.build(PrxConfig(hidden_size=32, depth=1, num_heads=2), torch.zeros(384), torch.ones(384), 0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    write_checkpoint(tmp_path / "init", denoiser, SamplingCard(steps=2))
    data = tmp_path / "data"
    data.mkdir()
    write_table([], INDEX_SCHEMA, data / "index.parquet")
    write_table(
        [{"id": i, "text": text} for i, text in enumerate(CAPTIONS)], CAPTIONS_SCHEMA, data / "captions.parquet"
    )
    text = {"tokens": np.ones((3, 384), np.float16), "offsets": np.arange(4), "mean": np.zeros(384, np.float32)}
    save_file(text | {"std": np.ones(384, np.float32)}, data / "text.safetensors")
    own = tmp_path / "own"
    own.mkdir()
    scenes = [Scene("big", ("octopus",), color) for color in ("white", "pink", "blue", "green")]
    for i, image in enumerate(draw_batch(scenes, 64, 0)):
        Image.fromarray(image[: 64 - 8 * i]).save(own / f"{i}.png")
    (own / "0.txt").write_text("a big {subject} on a white background")
    (own / "1.txt").write_text("one {subject}")
    return {"init": tmp_path / "init", "data": data, "own": own, "root": tmp_path}


def _context(places, name: str, **inputs: Path) -> StageContext:
    out, scratch = places["root"] / name, places["root"] / f"{name}-scratch"
    out.mkdir()
    scratch.mkdir()
    parents = {role: Artifact(kind="x", uri=f"file://{path}", digest=f"digest of {path.name}", stage=role, parents=())
               for role, path in inputs.items()}  # fmt: skip
    return StageContext(name, inputs, parents, out, scratch, Resources(), no_progress, fan_out_here)


def _pictures_of(places, name: str = "pictures") -> Path:
    ctx = _context(places, name)
    read_subject(SubjectFolder(path=places["own"]), ctx)
    return ctx.out


def _learn(places, name: str, subject: Path, **settings) -> tuple[dict, Path]:
    config = DreamBoothConfig.model_validate({**SHORT, "name": name, "subject": f"{places['own']}/", **settings})
    ctx = _context(places, name, init=places["init"], data=places["data"], subject=subject)
    return dreambooth(config, ctx), ctx.out


@pytest.fixture
def context(places) -> Callable[..., StageContext]:
    """The context of a stage of that name on these inputs."""
    return partial(_context, places)


@pytest.fixture
def pictures_of(places) -> Callable[..., Path]:
    """A folder of pictures of a subject."""
    return partial(_pictures_of, places)


@pytest.fixture
def learn(places) -> Callable[..., tuple[dict, Path]]:
    """Learn a subject; facts and the folder of the result."""
    return partial(_learn, places)


@pytest.fixture
def captions() -> list[str]:
    """The training set's."""
    return CAPTIONS


@pytest.fixture
def short() -> dict[str, Any]:
    """Settings of a DreamBooth of two steps."""
    return SHORT
