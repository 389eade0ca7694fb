"""A process killed by SIGKILL while it writes a checkpoint, twice, leaves a run that ends with the undisturbed bits."""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_curation.dataset import Selection
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.pretraining.config import RepaConfig, TimestepConfig
from models.pretraining.curriculum import Phase
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Projector, Repa

STEPS = 8  # epochs of 3: two buckets of 3 and 2 rows, batches of 2
CONFIG = TrainConfig(
    steps=STEPS, batch_size=2, log_every=1, checkpoint_every=1, ema_gamma=3.0, optimizer=OptimizerConfig(warmup_steps=2)
)
EDGES = {"mid-epoch": 2, "epoch edge": 3, "curriculum edge": 4, "later epoch": 5, "REPA's stop": 6, "late": 7}
PAIRS = [("mid-epoch", "later epoch"), ("epoch edge", "REPA's stop"), ("curriculum edge", "late")]


def epochs(step: int) -> Batch:
    """The batch of a step: rows of one bucket, in the order in which the sampler of real training sets gives them."""
    whole = Selection({(8, 8): np.arange(3), (12, 8): np.arange(3, 5)}, np.arange(5))
    chosen = whole.batch(step, CONFIG.batch_size, CONFIG.seed)
    rng = Randomness(7, 0, tuple(chosen.rows.tolist()))  # a picture is a function of its row
    width, height = chosen.bucket
    return Batch(
        rng.uniform("images", (3, height, width)) * 2 - 1, rng.normal("tokens", (6, 16)), torch.ones(2, 6).bool(), (0, 1),
        rng.normal("teacher", (height // 4, width // 4, 10)), rows=tuple(chosen.rows.tolist()),
    )  # fmt: skip


def objective(tiny) -> FlowMatching:
    """Flow matching with another shift from step 4 on, and REPA up to step 6."""
    phases = (Phase(TimestepConfig(base_tokens=4)), Phase(TimestepConfig(shift="none"), first_step=4))
    repa = Repa(RepaConfig(layer=0, until=0.75), Projector(32, 8, 10, 3), STEPS)
    return FlowMatching(tiny(0), TimestepConfig(base_tokens=4), repa, phases=phases)


def child(
    tiny, folder: Path, told: Path | None = None, kill_in: int | None = None, at: int = 0, wait_after: int | None = None
) -> int:
    """Train in a process of its own, which kills itself at the `at`-th file operation of the save after step `kill_in`.

    Or waits to be killed once the save after step `wait_after` is done, if it was not killed in it.
    """
    pid = os.fork()
    if pid:
        return pid
    seen: Counter[int] = Counter()

    def operation(event: str, args: tuple[object, ...]) -> None:
        if args and event in ("open", "os.mkdir", "os.rename", "shutil.rmtree", "os.remove", "os.rmdir"):
            path = str(args[0])
            if path.startswith(str(folder)) and f"{current[0]:08d}" in path:
                if current[0] == kill_in and seen[current[0]] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[current[0]] += 1

    current = [-1]

    def batches(step: int) -> Batch:
        if step == wait_after:
            time.sleep(120)
        current[0] = step + 1  # the save after this step
        return epochs(step)

    try:
        torch.set_num_threads(1)
        sys.addaudithook(operation)
        train(objective(tiny), batches, CONFIG, folder)
        if told is not None:
            told.write_text(json.dumps(seen))
        os._exit(0)
    finally:
        os._exit(1)


def ended(pid: int) -> int:
    """Exit status, negative when killed by a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> str:
    """Hashes of all weights, averages and optimizer state, and the log."""
    return (folder / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text()


@pytest.fixture
def straight(tiny, tmp_path: Path) -> tuple[str, dict[int, int]]:
    train(objective(tiny), epochs, CONFIG.model_copy(update={"steps": 1}), tmp_path / "warm")  # imports, once for all
    assert ended(child(tiny, tmp_path / "straight", tmp_path / "told.json")) == 0
    operations = {int(step): count for step, count in json.loads((tmp_path / "told.json").read_text()).items()}
    assert min(operations[step] for step in EDGES.values()) >= 10  # hooks see the whole save
    return outcome(tmp_path / "straight"), operations


def test_killed_at_random_file_operations_of_two_saves(tiny, straight, tmp_path: Path) -> None:
    expected, operations = straight
    rng = random.Random(0)
    for case, pair in enumerate(PAIRS):
        folder = tmp_path / str(case)
        for edge in pair:
            step = EDGES[edge]
            killed = ended(child(tiny, folder, kill_in=step, at=rng.randrange(operations[step])))
            assert killed == -signal.SIGKILL, edge
        assert ended(child(tiny, folder)) == 0
        assert outcome(folder) == expected, pair


def test_killed_from_outside_while_files_are_written(tiny, straight, tmp_path: Path) -> None:
    expected, rng, kills = straight[0], random.Random(1), 0
    for step in (3, 5, 7):
        pid = child(tiny, tmp_path / "broken", wait_after=step)
        checkpoints = tmp_path / "broken" / "checkpoints"
        partial, final = checkpoints / f".partial-{step:08d}", checkpoints / f"step-{step:08d}"
        until = time.monotonic() + 60
        while not (partial.exists() or final.exists()) and time.monotonic() < until:
            pass
        time.sleep(rng.random() * 0.002)
        os.kill(pid, signal.SIGKILL)
        kills += ended(pid) == -signal.SIGKILL
    assert kills == 3
    assert ended(child(tiny, tmp_path / "broken")) == 0
    assert outcome(tmp_path / "broken") == expected
