"""Gloo workers with weights cut over them (FSDP2), with whole copies on each, and one worker, at equal global batches."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # once, not in every forked process

from models.distillation.build import Networks, build
from models.distillation.config import DistillConfig
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import Trainer, train
from models.engine.state import load_state
from models.engine.weights import with_weights
from models.pretraining.config import FlowMatchingConfig, RepaConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Projector, Repa

STEPS, SAMPLES = 4, 6
COPIES = 2e-5  # of AdamW in float32: the order of the sums alone
TURNS = 5e-4  # where gradients are all but zero at first AdamW makes steps of their rounding; a step is 1e-3
Run = Callable[[Path, dict], Trainer]


class KilledError(Exception):
    """Stands for a killed process."""


@pytest.fixture
def run(tiny, batches) -> Run:
    """Train on this process's part of batches of six; `kill` ends it before that step."""

    def once(folder: Path, settings: dict) -> Trainer:
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share, kill = SAMPLES // workers, settings.pop("kill", None)
        muon = settings.pop("muon_lr", 0.01)
        config = TrainConfig.model_validate({
            "steps": STEPS, "batch_size": SAMPLES, "log_every": 1, "checkpoint_every": 2, "ema_gamma": 3.0,
            "ema_snapshot_every": 2, "optimizer": OptimizerConfig(warmup_steps=2, muon_lr=muon, weight_decay=0.1, clip_norm=0.5),
            **settings,
        })  # fmt: skip

        def part(step: int):
            if step == kill:
                raise KilledError
            return batches(step, tuple(range(rank * share, (rank + 1) * share)))

        repa = Repa(RepaConfig(layer=1, until=0.5), Projector(32, 8, 10, 3), STEPS)
        return train(FlowMatching(tiny(0), TimestepConfig(base_tokens=4), repa), part, config, folder)

    return once


def together(workers: int, folder: Path, work: Callable[[], None]) -> None:
    """Run `work` in so many processes joined by gloo; a failure in one is a failure here."""
    folder.mkdir(exist_ok=True)
    pids = []
    for rank in range(workers):
        pid = os.fork()
        if pid == 0:
            try:
                warnings.simplefilter("ignore")
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
                work()
                dist.barrier()
                os._exit(0)
            except BaseException:
                import traceback

                (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
                os._exit(1)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * workers, "\n".join(path.read_text() for path in folder.glob("error-*.txt"))


def checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """All tensors of the last checkpoint and the log."""
    found = load_state(folder / "checkpoints")
    assert found is not None
    assert found[0] == STEPS
    return {f"{group}/{name}": value for group, named in found[1].items() for name, value in named.items()}, found[2]["rows"]  # fmt: skip


def same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """The two folders end with the same weights, averages, optimizer states and log."""
    (mine, rows), (theirs, their_rows) = checkpoint(one), checkpoint(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    for row, their in zip(rows, their_rows, strict=True):
        assert row == pytest.approx(their, rel=max(tolerance, 1e-12))


@pytest.mark.parametrize("muon_lr", [0.01, None], ids=["muon", "adamw"])
def test_two_workers_with_parts_train_as_two_with_copies_and_as_one(muon_lr, run, tmp_path: Path) -> None:
    settings = {"muon_lr": muon_lr}
    others = {"thirds": {"accumulate": 3}, "half": {"precision": "bf16", "recompute": True}} if muon_lr is None else {}

    def work() -> None:
        run(tmp_path / "copies", {**settings})
        trainer = run(tmp_path / "parts", {**settings, "shard": True})
        for name, more in others.items():
            run(tmp_path / name, {**settings, **more, "shard": True})
        blocks = [p for name, p in trainer.players["denoiser"].named_parameters() if ".blocks." in name]
        held = sum(p.to_local().numel() for p in blocks)  # type: ignore[attr-defined]
        assert held == sum(p.numel() for p in blocks) / 2
        if dist.get_rank() == 0:
            average = trainer.average("denoiser")
            rebuilt = with_weights(trainer.uncut["denoiser"], average)
            assert all(torch.equal(p, average[name]) for name, p in rebuilt.named_parameters())

    run(tmp_path / "one", {**settings})
    together(2, tmp_path / "group", work)
    same(tmp_path / "parts", tmp_path / "copies", 2e-5)
    same(tmp_path / "parts", tmp_path / "one", 2e-4)  # Newton-Schulz magnifies the order of the sums
    same(tmp_path / "copies", tmp_path / "one", COPIES if muon_lr is None else 2e-4)
    if others:
        same(tmp_path / "parts", tmp_path / "thirds", 2e-4)
        half, rows = checkpoint(tmp_path / "half")
        assert {value.dtype for value in half.values()} == {torch.float32}
        full = [row["loss"] for row in checkpoint(tmp_path / "parts")[1]]
        assert [row["loss"] for row in rows] == pytest.approx(full, rel=0.02)
        assert [row["loss"] for row in rows] != full


def test_a_run_on_two_workers_goes_on_with_the_same_bits_or_on_one_or_three(run, tmp_path: Path) -> None:
    def two() -> None:
        run(tmp_path / "straight", {"shard": True})
        with pytest.raises(KilledError):
            run(tmp_path / "two", {"shard": True, "kill": 3})
        if dist.get_rank() == 0:
            for folder in ("one", "three"):
                shutil.copytree(tmp_path / "two", tmp_path / folder)
        dist.barrier()
        run(tmp_path / "two", {"shard": True})

    together(2, tmp_path / "first", two)
    run(tmp_path / "one", {"shard": True})
    together(3, tmp_path / "second", lambda: run(tmp_path / "three", {"shard": True}))  # 32 rows in parts of 11, 11, 10
    same(tmp_path / "two", tmp_path / "straight")
    same(tmp_path / "one", tmp_path / "straight", 2e-4)
    same(tmp_path / "three", tmp_path / "straight", 2e-4)


def test_copies_on_two_workers_go_on_with_the_same_bits_or_on_one(run, tmp_path: Path) -> None:
    def two() -> None:
        run(tmp_path / "straight", {"muon_lr": None})
        with pytest.raises(KilledError):
            run(tmp_path / "two", {"muon_lr": None, "kill": 3})
        if dist.get_rank() == 0:
            shutil.copytree(tmp_path / "two", tmp_path / "one")
        dist.barrier()
        run(tmp_path / "two", {"muon_lr": None})

    together(2, tmp_path / "group", two)
    run(tmp_path / "one", {"muon_lr": None})
    same(tmp_path / "two", tmp_path / "straight")
    same(tmp_path / "one", tmp_path / "straight", COPIES)


def test_players_that_take_turns_train_on_two_workers_as_on_one(tiny, batches, tmp_path: Path) -> None:
    """DMD: the student moves in every second step, the fake score with its critic in each; gradients only of who moves."""
    method = {"kind": "dmd", "fake_steps": 2, "gan_weight": 0.05}
    optimizer = OptimizerConfig(warmup_steps=2, muon_lr=None)
    config = TrainConfig(
        steps=STEPS, batch_size=SAMPLES, log_every=1, checkpoint_every=2, ema_gamma=3.0, optimizer=optimizer
    )
    null = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))

    def once(folder: Path) -> None:
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = SAMPLES // workers
        slots = tuple(range(rank * share, (rank + 1) * share))
        asked = DistillConfig.model_validate({"method": method, "train": config.model_dump(), "student_steps": 2})
        objective = build(asked, Networks(tiny(0), tiny(3), tiny(3), null)).objective
        train(objective, lambda step: batches(step, slots), config, folder)

    once(tmp_path / "one")
    together(2, tmp_path / "group", lambda: once(tmp_path / "two"))
    same(tmp_path / "two", tmp_path / "one", TURNS)
    moved = [[name for name in ("student", "fake") if f"{name}/loss" in row] for row in checkpoint(tmp_path / "two")[1]]
    assert moved == [["student", "fake"], ["fake"]] * 2


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    for wrong in ({"lora": {"rank": 4}}, {"repa": {"kind": "self", "layer": 1}}):
        with pytest.raises(ValueError, match="with lora, validation.patience or repa.kind=self set it to false"):
            FlowMatchingConfig.model_validate({"train": {"shard": True}, **wrong})

    class Copying(FlowMatching):
        shardable = False

    def work() -> None:
        from models.networks import prx
        from models.networks.config import PrxConfig

        network = PrxConfig(hidden_size=32, depth=2, num_heads=2, patch_size=4, text_dim=16, mlp_ratio=2.0)
        objective = Copying(prx.build(network, torch.zeros(16), torch.ones(16), 0), TimestepConfig())
        with pytest.raises(ValueError, match="shard=true cannot train Copying"):
            Trainer(objective, TrainConfig(shard=True), tmp_path / "scratch")

    together(2, tmp_path / "group", work)
