"""Old artifacts: what records, pointers and their lineage need stays; a dry run removes nothing; a running run is safe."""

import sys
from pathlib import Path

import numpy as np
import pytest

from flows.config import RunConfig
from flows.gc import garbage, gc_lines, sweep
from flows.run import Run
from infra.encode_cache import key_of, space
from infra.errors import ConfigError
from infra.pointers import move
from infra.storage import open_store

HERE = str(Path(__file__).parent)


@pytest.fixture
def toys():
    sys.path.insert(0, HERE)
    import toys

    yield toys
    sys.path.remove(HERE)


@pytest.fixture
def root(toys, tmp_path):
    """Two recorded runs that share source and judge."""
    for name, value in (("one", 1), ("two", 7)):
        specs = toys.toy_line(pretrain=toys.ToyConfig(value=value))
        Run(name, specs, RunConfig(root=str(tmp_path)), {"name": "toy"}, catalog=toys.toy_function).execute()
    return tmp_path


def stages(found):
    return sorted(artifact.stage for artifact, _, _ in found.artifacts)


def test_recorded_runs_keep_all_and_a_forgotten_one_frees_only_its_own(root):
    store = open_store(root)
    assert garbage(store, 0).artifacts == ()
    found = garbage(store, 0, ["one"])
    assert stages(found) == ["pretrain", "report", "sft"]
    assert found.num_bytes == sum(path.stat().st_size for a, k, _ in found.artifacts
                                  for path in (root / a.stage / k).iterdir() if path.name != "artifact.json")  # fmt: skip
    assert len(list(store.list())) == 8  # a dry run
    assert "nothing was removed" in gc_lines(found, False)[-1]
    sweep(store, 0, ["one"])
    assert len(list(store.list())) == 5
    assert [run["run"] for run in store.list_runs()] == ["two"]
    assert garbage(store, 0).artifacts == ()


def test_a_pointer_keeps_its_model_and_the_whole_lineage_of_it(root):
    store = open_store(root)
    key = next(entry["key"] for entry in store.read_run("one")["stages"] if entry["name"] == "sft")
    move(store, "toy-champion", 0, store.find("sft", key), "one", "first")
    assert stages(garbage(store, 0, ["one"])) == ["report"]
    assert stages(garbage(store, 0, ["one", "two"])) == [
        "pretrain",
        "report",
        "report",
        "sft",
    ]  # the toy judge has the bytes of the source


def test_grace_period_and_unknown_runs(root):
    store = open_store(root)
    found = garbage(store, 1, ["one"])
    assert (found.artifacts, found.young) == ((), 3)
    with pytest.raises(ConfigError, match="no run 'three'"):
        garbage(store, 1, ["three"])


def test_a_running_run_is_safe(root, toys):
    store = open_store(root)
    store.scratch("pretrain", "f" * 64)
    with store.lock(), pytest.raises(ConfigError, match="in use by another run"):
        sweep(open_store(root), 0)
    assert [Path(folder).name for folder, _ in sweep(store, 0).scratch] == ["pretrain-" + "f" * 16]
    assert not list((root / ".scratch").iterdir())


def test_encodings_that_no_run_opened_lately_go_and_the_others_stay(root):
    store = open_store(root)
    kept = space(str(root), "text", "float16", model="m")
    kept.write({key_of("a"): np.ones((2, 3), np.float16)})
    index = kept.index()
    assert garbage(store, 1).encoded == ()
    assert len(list(store.list())) == 8  # no artifact among them
    found = sweep(store, 0)
    assert found.encoded == (kept.name,)
    assert any("encodings that no run opened lately" in line for line in gc_lines(found, True))
    assert kept.read(index) == {}
    assert garbage(store, 0).encoded == ()
