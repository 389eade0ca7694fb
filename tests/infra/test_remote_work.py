"""Working folders of training stages in a bucket: another machine goes on where the first one was."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from flows.gc import garbage, gc_lines, sweep
from infra.config import Config
from infra.errors import LifecycleError
from infra.remote_work import PLACE, RemoteWork
from infra.s3_objects import S3Objects
from infra.stages import Resources, StageContext, StageSpec
from infra.storage import open_store
from models.engine.state import load_state, save_state
from tasks.catalog import StageFunction
from tasks.stage import Job, perform

KEY = "b" * 64


def state(folder: Path, step: int) -> None:
    save_state(folder / "checkpoints", step, {"model": {"w": torch.full((3,), float(step))}}, {})
    (folder / "grids").mkdir(exist_ok=True)
    (folder / "grids" / f"{step}.png").write_bytes(str(step).encode())


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def objects(s3_root: str) -> S3Objects:
    return S3Objects(s3_root, create=True)


def test_another_machine_gets_the_newest_checkpoint_and_what_lies_beside_it(objects: S3Objects, tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "work", tmp_path / "there" / "work"
    state(here, 1)
    (here / "tensorboard").mkdir()
    (here / "tensorboard" / "events").write_text("times")
    keeper = RemoteWork(objects, "train-b", here)
    assert keeper.save()
    assert not keeper.save()  # nothing new
    state(here, 2)
    assert keeper.save()
    RemoteWork(objects, "train-b", there).restore(own_may_stay=True)
    left = {
        path: data for path, data in tree(here).items() if "tensorboard" not in path and "step-00000001" not in path
    }
    assert tree(there) == left
    assert len(list(objects.names(f"{PLACE}/train-b"))) == len(set(left.values()))  # the first step's bytes are gone
    keeper.forget()
    assert objects.names(PLACE) == []


def test_a_worker_alone_may_be_further_but_several_agree(objects: S3Objects, tmp_path: Path) -> None:
    here = tmp_path / "here" / "work"
    state(here, 1)
    RemoteWork(objects, "train-b", here).save()
    state(here, 2)
    RemoteWork(objects, "train-b", here).restore(own_may_stay=True)
    assert (here / "checkpoints" / "step-00000002").is_dir()
    RemoteWork(objects, "train-b", here).restore(own_may_stay=False)
    assert [path.name for path in (here / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (here / "grids" / "2.png").exists()


def test_without_a_kept_checkpoint_several_begin_anew(objects: S3Objects, tmp_path: Path) -> None:
    state(tmp_path / "work", 1)
    RemoteWork(objects, "train-b", tmp_path / "work").restore(own_may_stay=False)
    assert tree(tmp_path / "work") == {}


def test_damaged_bytes_are_refused(objects: S3Objects, tmp_path: Path) -> None:
    state(tmp_path / "work", 1)
    RemoteWork(objects, "train-b", tmp_path / "work").save()
    listing = json.loads(objects.read(f"{PLACE}/train-b.json") or b"")
    objects.write(f"{PLACE}/train-b/{listing['files']['grids/1.png']}", b"other")
    with pytest.raises(LifecycleError, match="grids/1.png of the working folder came damaged"):
        RemoteWork(objects, "train-b", tmp_path / "elsewhere" / "work").restore(own_may_stay=True)
    assert not (tmp_path / "elsewhere" / "work").exists()  # half a checkpoint is no newest one


def test_what_dead_runs_left_is_garbage(s3_root: str, tmp_path: Path) -> None:
    store = open_store(s3_root)
    state(tmp_path / "work", 1)
    kept = store.remote_work("train", KEY, tmp_path / "work")
    assert kept is not None
    kept.save()
    name = f"train-{KEY[:16]}"
    assert garbage(store, grace_days=1).remote == ()
    found = sweep(store, grace_days=0)
    assert found.remote == (name,)
    assert f"{name} (checkpoints of a dead run" in gc_lines(found, True)[0]
    assert store.remote_works() == {}
    assert S3Objects(s3_root, create=False).names(PLACE) == []


class Steps(Config):
    until: int


def test_a_stage_that_died_goes_on_elsewhere(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []

    def train(config: Steps, ctx: StageContext) -> dict[str, int]:
        found = load_state(ctx.scratch / "checkpoints")
        began.append(0 if found is None else found[0])
        for step in range(began[-1] + 1, 5):
            if len(began) == 1 and step == config.until:
                store = open_store(s3_root)
                kept = store.remote_work("train", KEY, tmp_path / "look")
                assert kept is not None
                for _ in range(100):  # until the background has it
                    if f"step-{step - 1:08d}" in str(kept._listed()):
                        raise LifecycleError("the machine is gone")
                    time.sleep(0.1)
            state(ctx.scratch, step)
        (ctx.out / "w").write_bytes((ctx.scratch / "grids" / "1.png").read_bytes())
        return {}

    job = Job(
        spec=StageSpec(name="train", function="x", kind="toy", config={"until": 3}, runs="train"),
        key=KEY, root=s3_root, resources=Resources(),
    )  # fmt: skip

    def catalog(_: str) -> StageFunction:
        return StageFunction(run=train, config=Steps)

    with pytest.raises(LifecycleError, match="the machine is gone"):
        perform(job, open_store(s3_root), catalog)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "another-machine"))
    store = open_store(s3_root)
    artifact = perform(job, store, catalog)
    assert began == [0, 2]
    assert artifact is not None
    assert (store.local(artifact) / "w").read_bytes() == b"1"  # made before the first machine died
    assert S3Objects(s3_root, create=False).names(PLACE) == []
