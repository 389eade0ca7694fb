"""The store in a bucket: a kill between any two requests leaves all or nothing, damage is found, dead locks end."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from infra import s3_objects, storage
from infra.artifacts import Artifact, folder_digest
from infra.errors import ArtifactCorrupted, ConfigError
from infra.storage import Store, open_store

KEY = "0" * 64
Commit = Callable[..., Artifact]


class _Killed(BaseException):
    """The process is gone."""


class _DyingClient:
    """Passes calls on until the `at`-th one, then nothing works any more."""

    def __init__(self, real: Any, at: int) -> None:
        self.real, self.left = real, at

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                raise _Killed
            return getattr(self.real, name)(*args, **kwargs)

        return call


def _object(store: Store, artifact: Artifact, name: str) -> dict[str, str]:
    return {"Bucket": "lifecycle", "Key": artifact.uri.removeprefix("s3://lifecycle/") + "/" + name}


def _new_machine() -> None:
    """Forget what was verified and downloaded."""
    storage._verified.clear()


def test_a_kill_between_any_two_requests_leaves_all_or_nothing(
    s3_root: str, tmp_path: Path, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = folder_digest(folder())
    for at in range(1, 20):
        store = open_store(f"{s3_root}/{at}")
        backend: Any = store._backend
        real = backend._client
        backend._client = _DyingClient(real, at)
        try:
            store.commit("encode", KEY, "manifest", folder(), [], {})
            came_through = True
        except _Killed:
            came_through = False
        backend._client = real
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        _new_machine()
        found = store.find("encode", KEY)
        if found is not None:
            assert folder_digest(store.local(found))[0] == expected
        again = store.commit("encode", KEY, "manifest", folder(), [], {})
        assert again.digest == expected and store.local(again).is_dir()
        if came_through:
            assert at > 4
            return
    pytest.fail("the commit never came through")


def test_another_machine_downloads(
    s3_root: str, commit: Commit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = commit(open_store(s3_root))
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "other"))
    _new_machine()
    local = open_store(s3_root).local(artifact)
    assert local.is_relative_to(tmp_path / "other") and (local / "b").read_bytes() == b"beta"


def test_a_damaged_local_copy_is_downloaded_again(s3_root: str, commit: Commit) -> None:
    store = open_store(s3_root)
    artifact = commit(store)
    (store.local(artifact) / "a").write_bytes(b"alphA")
    _new_machine()
    assert (store.local(artifact) / "a").read_bytes() == b"alpha"


def test_damaged_and_missing_objects_are_named(s3_root: str, commit: Commit, tmp_path: Path) -> None:
    client, store = boto3.client("s3"), open_store(s3_root)
    artifact = commit(store)
    client.put_object(**_object(store, artifact, "a"), Body=b"alphA")
    shutil.rmtree(tmp_path / "cache")
    _new_machine()
    with pytest.raises(ArtifactCorrupted, match="/a has sha256"):
        store.local(artifact)
    assert store.find(artifact.stage, store.key_of(artifact)) is None  # its record was set aside
    assert commit(store) == artifact
    client.delete_object(**_object(store, artifact, "b"))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ArtifactCorrupted, match="object under .* is missing"):
        store.local(artifact)
    store.discard(artifact)
    assert commit(store) == artifact
    assert (store.local(artifact) / "b").exists()


def test_discard_leaves_nothing_behind(s3_root: str, commit: Commit) -> None:
    store = open_store(s3_root)
    store.discard(commit(store))
    listed = boto3.client("s3").list_objects_v2(
        Bucket="lifecycle", Prefix=s3_root.removeprefix("s3://lifecycle/") + "/encode"
    )
    assert listed["KeyCount"] == 0


def test_the_lock_of_a_dead_run_is_taken_over(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_root)
    dead = open_store(s3_root).lock()
    monkeypatch.setattr(s3_objects.S3Objects, "_renew", lambda *_: None)
    dead.__enter__()
    with pytest.raises(ConfigError, match="a dead one is given up after 90 s"), store.lock():
        pass
    monkeypatch.setattr(s3_objects, "LOCK_SECONDS", -1.0)
    with store.lock():
        dead.__exit__(None, None, None)  # comes back to life late: must not take the new holder's lock away
        monkeypatch.setattr(s3_objects, "LOCK_SECONDS", 90.0)
        with pytest.raises(ConfigError, match="in use"), open_store(s3_root).lock():
            pass


def test_a_living_lock_is_renewed(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_objects, "LOCK_SECONDS", 0.2)
    store: Any = open_store(s3_root)
    with store.lock():
        first = store._backend._read(".lock")[1]["ETag"]
        deadline = time.monotonic() + 5
        while store._backend._read(".lock")[1]["ETag"] == first:
            assert time.monotonic() < deadline
    assert store._backend._read(".lock")[0] is None


def test_an_unknown_bucket_is_refused(s3_root: str) -> None:
    with pytest.raises(ConfigError, match="s3://nobody/x cannot be written.*bucket"):
        open_store("s3://nobody/x")
