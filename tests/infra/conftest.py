"""Fixtures of the infrastructure tests: a store on disk and one behind a real HTTP S3 server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.artifacts import Artifact
from infra.storage import Store, open_store


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server that lives as long as the test session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_root(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix in a bucket, with the environment that reaches it."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    boto3.client("s3").create_bucket(Bucket="lifecycle")
    return f"s3://lifecycle/{tmp_path.name}"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The same tests run on a folder and on a bucket."""
    if request.param == "local":
        return open_store(tmp_path / "root")
    return open_store(request.getfixturevalue("s3_root"))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a small stage output and say where it is."""

    def write(name: str = "out", **files: bytes) -> Path:
        out = tmp_path / name
        (out / "inner").mkdir(parents=True, exist_ok=True)
        for key, data in (files or {"a": b"alpha", "b": b"beta"}).items():
            (out / key).write_bytes(data)
        (out / "inner" / "c.bin").write_bytes(b"\x00" * 1000)
        return out

    return write


@pytest.fixture
def commit(folder: Callable[..., Path]) -> Callable[..., Artifact]:
    """Commit a small artifact under a key."""

    def run(store: Store, key: str = "0" * 64, name: str = "out", stage: str = "encode", **files: bytes) -> Artifact:
        return store.commit(stage, key, "manifest", folder(name, **files), ["p" * 64], {"rows": 3})

    return run
