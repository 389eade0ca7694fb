"""Every training technique through its stage on a device that is not the CPU: the same weights, up to rounding."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra.artifacts import Artifact
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.device import compute_device
from models.distillation.config import DistillConfig, PairStoreConfig
from models.engine.distribute import one_thread
from models.personalization.config import DreamBoothConfig
from models.posttraining.config import (
    DpoConfig,
    GrpoConfig,
    NftConfig,
    PairsConfig,
    ReflConfig,
    RewardModelConfig,
)
from models.pretraining.autoencoder_config import AutoencoderConfig
from models.pretraining.config import FlowMatchingConfig
from models.sampling.generate import load_generator
from tasks.autoencoder import autoencoder
from tasks.distill import distill
from tasks.online import grpo, nft, refl
from tasks.personalize import dreambooth
from tasks.preference import dpo, make_pairs
from tasks.reward_model import reward_model
from tasks.teacher_pairs import teacher_pairs
from tasks.training import flow_matching

TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "ema_gamma": 0.0, "loader_threads": 1}
NETWORK = {"hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
GUARD = {"every": 1, "prompts": 1, "seeds": 2}
ONLINE = {"train": TRAIN, "prompts": {"count": 6}, "steps": 2, "guard": GUARD}


def _flow(**more: Any) -> FlowMatchingConfig:
    return FlowMatchingConfig.model_validate({"name": "flow", "network": NETWORK, "train": TRAIN, "repa": None, **more})


def _distilled(**method: Any) -> DistillConfig:
    return DistillConfig.model_validate({"method": method, "train": TRAIN})


FLOW: dict[str, FlowMatchingConfig] = {
    "beta": _flow(timesteps={"density": "beta"}, train={**TRAIN, "sample_every": 1}),
    "repa": _flow(repa={"teacher": "packaged", "layer": 0, "hidden": 16}),
    "dispersive": _flow(repa={"kind": "dispersive", "layer": 0}),
    "self": _flow(repa={"kind": "self", "layer": 0, "hidden": 16}),
    "tread": _flow(tread={"share": 0.5, "first": 0, "last": 0}),
    "lora": _flow(lora={"rank": 2}),
    "int8": _flow(lora={"rank": 2, "base": "int8"}),
    "bf16": _flow(train={**TRAIN, "precision": "bf16", "compile": True}),
}
REAL_ONLY = ("scm", "bf16")  # no forward-mode derivative, no autocast of tensors that only pretend
DISTILLED = {
    "progressive": _distilled(kind="progressive", teacher_steps=4),
    "instaflow": _distilled(kind="instaflow", perceptual_share=0.5),
    "reflow": _distilled(kind="instaflow", reflow_share=1.0, perceptual_share=0.0),
    "consistency": _distilled(kind="consistency", teacher_steps=4),
    "lcm": _distilled(kind="consistency", guidance_range=[1.0, 3.0]),
    "lcm-lora": _distilled(kind="consistency", lora={"rank": 2}, target_decay=0.0),
    "scm": _distilled(kind="scm"),
    "dmd": _distilled(kind="dmd", fake_steps=2, gan_weight=0.05, gan_layer=0, regression_weight=0.2),
    "add": _distilled(kind="add", layer=0),
    "ladd": _distilled(kind="add", features="teacher", layer=0),
    "meanflow": _distilled(kind="meanflow"),
}

ONLINE_STAGES: dict[str, tuple[Callable[[Any, StageContext], Any], Any]] = {
    "grpo": (grpo, GrpoConfig.model_validate({**ONLINE, "group": 2, "window": 1, "kl": 0.1})),
    "nft": (nft, NftConfig.model_validate({**ONLINE, "group": 2})),
    "refl": (refl, ReflConfig.model_validate(ONLINE)),
}
CASES = (*FLOW, *DISTILLED, *ONLINE_STAGES, "dpo", "reward-model", "dreambooth", "autoencoder")

# a CUDA device rounds otherwise, Muon iterates in bfloat16 there, and Adam's first steps amplify the sign of what is near 0
ROUNDING = {"lazy": 1e-4, "cuda": 2e-3}

WEIGHTS = "diffusion_pytorch_model.safetensors"
Stage = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_core():
    with one_thread():
        yield


@pytest.fixture
def stage(inputs: dict[str, Path], tmp_path: Path) -> Stage:
    """Run a stage function in a folder of its own; the folder it wrote."""

    def run(function: Callable[[Any, StageContext], Any], config: Any, **more: Path) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        ctx = context(function.__name__, {**inputs, **more}, folder)
        function(config, ctx)
        return ctx.out

    return run


def context(name: str, inputs: dict[str, Path], folder: Path) -> StageContext:
    """The context of a stage whose inputs have digests, by which pairs know their teacher."""
    out, scratch = folder / name, folder / f"{name}-scratch"
    out.mkdir()
    scratch.mkdir()
    parents = {role: Artifact(kind="x", uri=f"file://{path}", digest=path.name, stage=role, parents=())
               for role, path in inputs.items()}  # fmt: skip
    return StageContext(name, inputs, parents, out, scratch, Resources(), no_progress, fan_out_here)


def made(case: str, stage: Stage, pairs: Path, store: Path) -> Path:
    """The folder of a case's stage."""
    if case in FLOW:
        init = {} if case not in ("lora", "int8") else {"init": stage(flow_matching, FLOW["beta"])}
        return stage(flow_matching, FLOW[case], **init)
    if case in DISTILLED:
        return stage(distill, DISTILLED[case], pairs=store)
    if case in ONLINE_STAGES:
        return stage(*ONLINE_STAGES[case])
    match case:
        case "dpo":
            return stage(dpo, DpoConfig.model_validate({"train": TRAIN, "guard": GUARD}), pairs=pairs)
        case "reward-model":
            settings = {"train": TRAIN, "validation": 0.5}
            return stage(reward_model, RewardModelConfig.model_validate(settings), pairs=pairs)
        case "dreambooth":
            settings = {"subject": "robot", "token": "eels", "class_pictures": 4, "lora": {"rank": 2}, "train": TRAIN}
            return stage(dreambooth, DreamBoothConfig.model_validate(settings))
        case _:
            small = {"channels": (8, 16), "norm_groups": 4, "train": TRAIN}
            return stage(autoencoder, AutoencoderConfig.model_validate(small))


@pytest.mark.parametrize("case", CASES)
def test_a_stage_trains_there_what_it_trains_on_the_cpu(case: str, stage: Stage, away) -> None:
    """Everything of a stage: batches, frozen networks, looks of guards, grids, the checkpoint it writes."""
    if case in REAL_ONLY and not torch.cuda.is_available():
        pytest.skip("needs a real device")
    pairs = stage(make_pairs, PairsConfig(prompts=60, group=2, steps=1, min_gap=0.0))
    store = stage(teacher_pairs, PairStoreConfig(count=8, steps=2, shard_rows=4))
    here = made(case, stage, pairs, store)
    with away():
        where = compute_device().type
        assert where != "cpu"
        there = made(case, stage, pairs, store)
    files = sorted(path.relative_to(here) for path in here.rglob("*.safetensors"))
    assert files
    for name in files:
        own, other = load_file(here / name), load_file(there / name)
        assert own.keys() == other.keys()
        for key, value in own.items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=ROUNDING[where])


def test_a_run_killed_there_goes_on_to_the_bit(inputs: dict[str, Path], tmp_path: Path, away) -> None:
    config = _flow(train={**TRAIN, "steps": 4, "ema_gamma": 3.0}, repa={"kind": "self", "layer": 0, "hidden": 16})
    straight, broken = (tmp_path / name for name in ("straight", "broken"))
    for folder in (straight, broken):
        folder.mkdir()
    with away():
        whole = context("flow", inputs, straight)
        flow_matching(config, whole)
        ctx = context("flow", inputs, broken)
        for step in (1, 3):
            with pytest.raises(KeyboardInterrupt):
                flow_matching(config, replace(ctx, progress=partial(stop_at, step)))
        flow_matching(config, ctx)
    own, other = (load_file(out / "transformer" / WEIGHTS) for out in (whole.out, ctx.out))
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert (whole.out / "metrics.jsonl").read_bytes() == (ctx.out / "metrics.jsonl").read_bytes()


def stop_at(step: int, done: int, total: int, metrics: Mapping[str, float]) -> None:
    """Kill a run at its report of a step."""
    if done == step + 1:
        raise KeyboardInterrupt


def test_pictures_drawn_there_are_the_cpus(inputs: dict[str, Path], stage: Stage, away) -> None:
    trained = stage(flow_matching, FLOW["beta"])
    here = load_generator(trained).draw(["a cat", "two dogs"], [0, 1])
    with away():
        generator = load_generator(trained)
        assert generator.device.type != "cpu"
        there = generator.draw(["a cat", "two dogs"], [0, 1])
    torch.testing.assert_close(torch.from_numpy(there), torch.from_numpy(here), rtol=0, atol=1e-3)


def test_what_is_left_on_the_cpu_is_found(away) -> None:
    """The check itself: a device that forgave what CUDA does not would prove nothing."""
    with away():
        x = torch.zeros(3, device=compute_device())
        with pytest.raises(RuntimeError):
            x + torch.ones(3)
        with pytest.raises(RuntimeError):
            torch.randn(3, generator=torch.Generator(), device=compute_device())
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
        assert (x + 1).cpu().tolist() == [1, 1, 1]
