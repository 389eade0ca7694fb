"""Another average made of a stage's snapshots is the one that training with it would have kept."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from flows.cli import app
from infra.errors import ConfigError
from infra.storage import open_store
from models.pretraining.config import FlowMatchingConfig
from models.sampling.generate import load_generator
from tasks.averages import FOLDER, TEXT, other_average
from tasks.training import flow_matching

STEPS = 24
SETTINGS = {
    "network": {"hidden_size": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}, "repa": {"kind": "dispersive", "layer": 0},
    "train": {"steps": STEPS, "batch_size": 4, "log_every": 12, "checkpoint_every": 12, "ema_snapshot_every": 4,
              "optimizer": {"warmup_steps": 2}},
    "sampling": {"steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(inputs, context, tmp_path_factory):
    """The same stage with the average of gamma 10, and with that of gamma 0 and snapshots."""
    folder = tmp_path_factory.mktemp("averages")

    def run(name: str, **train: object):
        config = FlowMatchingConfig.model_validate({**SETTINGS, "train": {**SETTINGS["train"], **train}})
        ctx = context(name, {"data": inputs["data"]}, folder)
        flow_matching(config, ctx)
        return ctx.out

    return run("wanted", ema_gamma=10.0), run("snapshots", ema_gamma=0.0)


def weights(checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")


def test_it_is_the_average_that_was_not_kept(trained, tmp_path) -> None:
    wanted, stored = trained
    made = other_average(stored, tmp_path / "made", 10.0)
    assert (made.step, made.snapshots) == (STEPS, 2 * STEPS // 4)
    assert made.misfit < 0.05
    want, last, got = weights(wanted), weights(stored), weights(tmp_path / "made")
    assert want.keys() == got.keys()
    off = max(float((got[name] - want[name]).abs().max()) for name in want)
    far = max(float((last[name] - want[name]).abs().max()) for name in want)
    assert off < 0.1 * far
    assert (tmp_path / "made" / "sampling.json").read_text() == (stored / "sampling.json").read_text()
    assert load_generator(tmp_path / "made").sample(["a cat"], [0]).shape == (1, 32, 32, 3)


def test_what_cannot_be_made_is_refused(trained, tmp_path) -> None:
    _, stored = trained
    with pytest.raises(ConfigError, match="step 25 lies outside the snapshots of snapshots-out, which end at step 24"):
        other_average(stored, tmp_path / "a", 10.0, at=25)
    with pytest.raises(ConfigError, match=r"gamma 90 at step 21 misses its profile by \d+% with 12 snapshots"):
        other_average(stored, tmp_path / "b", 90.0, at=21)
    with pytest.raises(
        ConfigError, match="has no ema-snapshots of a flow-matching stage; set train.ema_snapshot_every"
    ):
        other_average(tmp_path, tmp_path / "c", 10.0)
    scale = stored / FOLDER / TEXT
    scale.rename(tmp_path / TEXT)
    try:
        with pytest.raises(ConfigError, match="keeps snapshots without text.safetensors.*run its stage again"):
            other_average(stored, tmp_path / "d", 10.0)
    finally:
        (tmp_path / TEXT).rename(scale)
    file = next((stored / FOLDER / "24").rglob("denoiser.power0.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\xff\xff\xff\xff")
    try:
        with pytest.raises(ConfigError, match="24 is damaged; run its stage again"):
            other_average(stored, tmp_path / "e", 10.0)
    finally:
        file.write_bytes(whole)


def test_the_command_finds_the_stage_and_writes_the_checkpoint(trained, tmp_path) -> None:
    store = open_store(tmp_path / "root")
    folder = shutil.copytree(trained[1], store.scratch("pretrain", "a" * 64) / "out")
    artifact = store.commit("pretrain", "a" * 64, "checkpoint", folder, (), {})
    command = ["average", artifact.digest, str(tmp_path / "made"), "--gamma", "9", "--at", "20", "--root", str(store.root)]  # fmt: skip
    answer = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    told = json.loads(answer.stdout)
    assert (told["gamma"], told["step"], told["snapshots"]) == (9.0, 20, 12)
    assert weights(tmp_path / "made").keys() == weights(trained[0]).keys()
    again = CliRunner().invoke(app, command)
    assert "is not empty; name a new folder" in str(again.exception)
