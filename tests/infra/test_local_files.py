"""The store on a disk: damage is named, and a kill at any moment leaves nothing readable but wrong."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import storage
from infra.artifacts import Artifact, folder_digest
from infra.errors import ArtifactCorrupted, ConfigError
from infra.storage import open_store

KEY = "0" * 64
Commit = Callable[..., Artifact]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda entry: _flip(entry / "inner" / "c.bin"), "inner/c.bin has sha256"),
        (lambda entry: (entry / "a").write_bytes(b"al"), "/a has 2 bytes, recorded were 5"),
        (lambda entry: (entry / "a").unlink(), "/a is missing"),
        (lambda entry: (entry / "rows-9.parquet").write_bytes(b"x"), "rows-9.parquet does not belong"),
        (lambda entry: _flip(entry / "artifact.json"), "artifact.json is damaged"),
        (lambda entry: (entry / "artifact.json").write_bytes(b"{"), "artifact.json is damaged"),
    ],
)
def test_damage_is_named_refused_and_rebuilt(
    tmp_path: Path, commit: Commit, damage: Callable[[Path], None], says: str
) -> None:
    store = open_store(tmp_path / "root")
    artifact = commit(store)
    damage(tmp_path / "root" / "encode" / KEY)
    storage._verified.clear()
    with pytest.raises(ArtifactCorrupted, match=says) as caught:
        store.local(artifact)
    assert (caught.value.stage, caught.value.key) == ("encode", KEY)
    store.discard_entry(caught.value.stage, caught.value.key)
    assert commit(store) == artifact
    assert (store.local(artifact) / "a").read_bytes() == b"alpha"


def test_every_part_of_the_record_counts(tmp_path: Path, commit: Commit) -> None:
    store = open_store(tmp_path / "root")
    artifact = commit(store)
    record = tmp_path / "root" / "encode" / KEY / "artifact.json"
    whole = record.read_bytes()
    for position in range(0, len(whole) - 1, 4):
        record.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ArtifactCorrupted):
            store.find("encode", KEY)
    record.write_bytes(whole)
    assert store.find("encode", KEY) == artifact


class _Kill:
    """Stands for os.fsync, os.rename and the like; at the chosen call the process is killed, before or after it."""

    def __init__(self, at: int, after: bool) -> None:
        self.left, self.after = at, after

    def wrap(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0 and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call


def _commit_in_child(root: Path, out: Path, at: int, after: bool) -> bool:
    """Commit in a forked process that is killed at its `at`-th system call; True when it came through."""
    child = os.fork()
    if child == 0:
        kill = _Kill(at, after)
        for name in ("fsync", "rename", "replace", "mkdir", "open", "unlink", "rmdir"):
            setattr(os, name, kill.wrap(getattr(os, name)))
        code = 1
        try:
            open_store(root).commit("encode", KEY, "manifest", out, [], {})
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("debris", [False, True])
def test_a_kill_at_any_moment_leaves_all_or_nothing(
    tmp_path: Path, folder: Callable[..., Path], after: bool, debris: bool
) -> None:
    expected, _ = folder_digest(folder())
    for at in range(1, 200):
        root = tmp_path / f"root{at}"
        if debris:
            (root / "encode" / KEY / "old").mkdir(parents=True)
        came_through = _commit_in_child(root, folder(), at, after)
        store = open_store(root)
        storage._verified.clear()
        found = store.find("encode", KEY)
        if found is not None:
            assert folder_digest(store.local(found))[0] == expected
        again = store.commit("encode", KEY, "manifest", folder(), [], {})  # the rerun; leftovers must not hinder it
        assert again.digest == expected and store.local(again).is_dir()
        shutil.rmtree(root)
        if came_through:
            assert at > 10
            return
    pytest.fail("the commit never came through")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    root = tmp_path / "root"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with open_store(root).lock():
            os.write(tell, b"x")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(ConfigError, match=f"process {child} on "), open_store(root).lock():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open_store(root).lock():
        pass
    os.close(ready)
    os.close(tell)


def test_a_root_can_be_moved(tmp_path: Path, commit: Commit) -> None:
    artifact = commit(open_store(tmp_path / "root"))
    os.rename(tmp_path / "root", tmp_path / "a new root")
    moved = open_store((tmp_path / "a new root").as_uri())
    found = moved.find("encode", KEY)
    assert found is not None and found.digest == artifact.digest and found.uri != artifact.uri
    assert (moved.local(found) / "a").exists()


def test_an_unwritable_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: .*--root"):
        open_store(tmp_path / "file" / "root")
    assert not (tmp_path / "reading").exists()
    open_store(tmp_path / "reading", create=False)
    assert not (tmp_path / "reading").exists()
