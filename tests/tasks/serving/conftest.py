"""A store with one run of real tiny checkpoints: a teacher, a one-and-four-step student, and a subject's LoRA."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI

from infra.artifacts import Artifact
from infra.storage import Store, open_store
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import LoraConfig, PrxConfig
from models.networks.denoiser import Denoiser
from models.personalization import lora_files
from models.personalization.lora import add_lora, merge, save_forms
from tasks.serving.app import create_app
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Engine
from tasks.serving.models import models_of

TINY = PrxConfig(hidden_size=32, depth=2, num_heads=2, patch_size=4, text_dim=384, mlp_ratio=2.0, prompt_max_tokens=32)
CARD = SamplingCard(steps=3, guidance=2.0, side=16, prompt_max_tokens=32)
STUDENT = CARD.model_copy(update={"steps": 1, "guidance": 1.0, "distilled": True, "trained_steps": (1, 4),
                                  "sampler": "renoise", "method": "dmd", "distilled_guidance": 2.0})  # fmt: skip


def network(seed: int) -> Denoiser:
    """A denoiser none of whose layers is zero."""
    made = prx.build(TINY, torch.zeros(384), torch.ones(384), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def commit(store: Store, folder: Path, stage: str, init: Artifact | None, write: Callable[[Path], None]) -> Artifact:
    out = folder / f"out-{stage}-{len(list(store.list()))}"
    out.mkdir()
    write(out)
    inputs = {} if init is None else {"init": init.digest}
    key = json.dumps([stage, out.name]).encode().hex().ljust(64, "0")[:64]
    return store.commit(stage, key, "checkpoint", out, inputs.values(), {"function": "toy", "inputs": inputs})


def write_lora(out: Path, base: Artifact, trigger: str, seed: int) -> None:
    adapted = network(0)
    add_lora(adapted, LoraConfig(rank=2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapter = lora_files.from_module(adapted.transformer, {"base": base.digest, "trigger": trigger})
    save_forms(adapter, out / "adapter", "lora")
    write_checkpoint(out, merge(adapted), CARD.model_copy(update={"trigger": trigger}))


@pytest.fixture
def committed(tmp_path: Path) -> tuple[Store, Callable[..., Artifact]]:
    """A store, and commit(stage, init, write) into it."""
    store = open_store(tmp_path / "root")
    return store, partial(commit, store, tmp_path)


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[str, int], Store]:
    """Write one more run, with a student of its own, into the store."""
    store = open_store(tmp_path / "root")

    def make(name: str, seed: int) -> Store:
        teacher = commit(store, tmp_path, "teacher", None, lambda out: write_checkpoint(out, network(0), CARD))
        card = STUDENT.model_copy(update={"teacher": teacher.digest})
        student = commit(store, tmp_path, "fast", teacher, lambda out: write_checkpoint(out, network(seed), card))
        robot = commit(store, tmp_path, "robot", teacher, lambda out: write_lora(out, teacher, "zwx", 1))
        cup = commit(store, tmp_path, "cup", teacher, lambda out: write_lora(out, teacher, "qrt", 2))
        stages = [
            {"name": each.stage, "key": each.uri.rstrip("/").rsplit("/", 1)[-1], "digest": each.digest}
            for each in (teacher, student, robot, cup)
        ]
        store.write_run(name, {"name": "demo", "stages": stages, "outcome": "ok"})
        return store

    return make


@pytest.fixture
def serving(new_run: Callable[[str, int], Store]) -> Iterator[Callable[..., tuple[FastAPI, Engine]]]:
    """An application over the run, with settings of one's own."""
    engines: list[Engine] = []

    def make(key: str | None = None, **settings: object) -> tuple[FastAPI, Engine]:
        config = ServeConfig.model_validate({"threads": 1, "drain_seconds": 5, **settings})
        engine = Engine(models_of(new_run("toy", 7), "toy"), config)
        engines.append(engine)
        return create_app(engine, config, key), engine

    yield make
    for engine in engines:
        engine.end()
