"""The smoke lifecycle on s3://, one answer in twenty spoiled: it ends with the digests of an undisturbed local run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

HERE = Path(__file__).parent
SMOKE = HERE.parents[1] / "presets" / "smoke.yaml"


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A bucket behind the proxy, and the proxy."""
    from moto.server import ThreadedMotoServer

    monkeypatch.syspath_prepend(str(HERE))
    from faulty_s3 import FaultyS3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    direct = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                        "T2I_CACHE": str(tmp_path / "cache"), "AWS_ENDPOINT_URL": direct}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="lifecycle")
    proxy = FaultyS3(direct, share=0.05)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()
    server.stop()


def run(root: str) -> dict[str, str]:
    command = [sys.executable, "-m", "flows.cli", "run", str(SMOKE), "--root", root, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        stage["name"]: stage["digest"]
        for stage in result["stages"]
        if stage["name"] not in ("report", "compare", "export")
    }


@pytest.mark.lifecycle
@pytest.mark.prefect
@pytest.mark.timeout(900)
def test_the_smoke_lifecycle_survives_a_bad_bucket(faulty, tmp_path):
    expected = run(str(tmp_path / "root"))
    assert run("s3://lifecycle/smoke") == expected
    assert faulty.requests > 500
    assert min(faulty.faults.values()) > 3


def test_pointers_and_locks_of_a_very_bad_bucket_are_exact(faulty, monkeypatch):
    from infra.artifacts import Artifact
    from infra.pointers import move, moves
    from infra.storage import open_store

    faulty.share, faulty.random = 0.2, type(faulty.random)(1)
    monkeypatch.setattr("faulty_s3.SLOW_SECONDS", 0.02)
    store = open_store("s3://lifecycle/pointers")
    for number in range(12):
        with store.lock():
            artifact = Artifact(kind="checkpoint", uri="s3://lifecycle/x", digest=str(number), stage="nightly")
            move(store, "champion", number, artifact, f"night-{number}", "better")
    assert [each.artifact.digest for each in moves(store, "champion")] == [str(number) for number in range(12)]
    assert sum(faulty.faults.values()) > 10
