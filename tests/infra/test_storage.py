"""One store, two places: what is committed is found, verified on every byte, never overwritten, and can be discarded."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra import storage
from infra.artifacts import Artifact, folder_digest
from infra.disk import require_disk
from infra.errors import ArtifactCorrupted, ConfigError, LifecycleError
from infra.storage import Store, open_store

KEY = "0" * 64
Commit = Callable[..., Artifact]


def _forget() -> None:
    """Verify again, as a new process would."""
    storage._verified.clear()


def test_commit_find_local(store: Store, commit: Commit, folder: Callable[..., Path]) -> None:
    assert store.find("encode", KEY) is None
    expected, _ = folder_digest(folder("again"))
    artifact = commit(store)
    assert (artifact.digest, artifact.stage, artifact.parents) == (expected, "encode", ("p" * 64,))
    assert store.find("encode", KEY) == artifact and artifact.facts == {"rows": 3}
    _forget()
    local = store.local(artifact)
    assert (local / "a").read_bytes() == b"alpha" and (local / "inner" / "c.bin").stat().st_size == 1000
    assert list(store.list()) == [artifact]


def test_a_second_opening_finds_it(store: Store, commit: Commit) -> None:
    artifact = commit(store)
    assert open_store(store.root, create=False).find("encode", KEY) == artifact


def test_loser_of_a_race_gets_the_winner(store: Store, commit: Commit, caplog: pytest.LogCaptureFixture) -> None:
    first = commit(store, name="one", a=b"first")
    second = commit(store, name="two", a=b"second")
    assert second == first and "first one" in caplog.text
    _forget()
    assert (store.local(second) / "a").read_bytes() == b"first"


def test_many_writers_at_once_agree(store: Store, folder: Callable[..., Path]) -> None:
    outs = [folder(f"out{index}", a=str(index % 2).encode()) for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda out: store.commit("dedup", KEY, "manifest", out, [], {}), outs))
    assert len({artifact.digest for artifact in made}) == 1
    _forget()
    assert store.local(made[0]).is_dir()


def test_discard_lets_the_next_run_build_again(store: Store, commit: Commit) -> None:
    artifact = commit(store, name="one", a=b"first")
    store.local(artifact)
    store.discard(artifact)
    assert store.find("encode", KEY) is None and list(store.list()) == []
    assert commit(store, name="two", a=b"second").digest != artifact.digest
    with pytest.raises(ArtifactCorrupted, match="now has digest"):
        store.local(artifact)


def test_an_empty_or_linked_output_is_refused(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LifecycleError, match="wrote no file"):
        store.commit("encode", KEY, "manifest", out, [], {})
    (out / "link").symlink_to("/etc/hostname")
    with pytest.raises(LifecycleError, match="link or special file"):
        store.commit("encode", KEY, "manifest", out, [], {})


def test_a_stage_may_not_write_the_record(store: Store, folder: Callable[..., Path]) -> None:
    out = folder()
    (out / "artifact.json").write_text("{}")
    with pytest.raises(LifecycleError, match="keeps for itself"):
        store.commit("encode", KEY, "manifest", out, [], {})


@pytest.mark.parametrize("bad", ["../x", "", "a/b", ".hidden", "runs"])
def test_names_cannot_leave_the_root(store: Store, folder: Callable[..., Path], bad: str) -> None:
    with pytest.raises(ConfigError):
        store.commit(bad, KEY, "manifest", folder(), [], {})


def test_scratch_is_kept_and_is_per_key(store: Store) -> None:
    one = store.scratch("encode", KEY)
    (one / "x").write_text("kept")
    assert store.scratch("encode", KEY) == one and (one / "x").exists()
    assert store.scratch("encode", "1" * 64) != one


def test_runs(store: Store) -> None:
    with pytest.raises(ConfigError, match="there is no run under"):
        store.read_run("latest")
    store.write_run("first", {"outcome": "running"})
    started = store.read_run("first")["started"]
    store.write_run("second", {"outcome": "ok"})
    store.write_run("first", {"outcome": "ok", "stages": []})
    assert store.read_run("first") == {"run": "first", "started": started, "outcome": "ok", "stages": []}
    assert store.read_run("latest")["run"] == "second"
    assert [run["run"] for run in store.list_runs()] == ["second", "first"]
    with pytest.raises(ConfigError, match="no run 'thrid'.*latest runs: second, first"):
        store.read_run("thrid")


def test_one_run_per_root(store: Store) -> None:
    with store.lock(), pytest.raises(ConfigError, match="in use by another run: process .* on "), store.lock():
        pass
    with store.lock():
        pass


def test_an_artifact_of_another_root_is_refused(store: Store, commit: Commit) -> None:
    artifact = commit(store).model_copy(update={"uri": "file:///elsewhere/encode/" + KEY})
    with pytest.raises(LifecycleError, match="does not lie under root"):
        store.local(artifact)


@pytest.mark.parametrize("bad", ["ftp://host/x", "file://host/x", "s3:///x"])
def test_roots_that_cannot_be(bad: str) -> None:
    with pytest.raises(ConfigError):
        open_store(bad)


def test_too_little_disk_is_refused(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(ConfigError, match="GB free, the run needs 1000000000.0 GB"):
        require_disk(tmp_path, 10**18)
