"""The whole lifecycle at toy size through the command line: killed, resumed, reused, changed, nothing asked outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PRESET = Path(__file__).resolve().parents[2] / "presets" / "smoke.yaml"
T2I = [str(Path(sys.executable).with_name("t2i"))]


TRACED = Path(__file__).parent / "traced"
HERE = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "None", socket.gethostname()}


def command(*arguments: str, root: Path) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(TRACED), "NETWORK_TRACE": str(root.parent / "hosts.txt")}
    done = subprocess.run(
        [*T2I, *arguments, "--set", f"run.root={root}", "--json"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def kill_when(stages_done: int, root: Path) -> None:
    """SIGKILL the whole process tree once that many results exist, wherever the next stage then is."""
    process = subprocess.Popen(
        [*T2I, "run", str(PRESET), "--set", f"run.root={root}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while len(list(root.glob("*/*/artifact.json"))) < stages_done and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.1)
    time.sleep(0.4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outside_hosts(root: Path) -> set[str]:
    """What any process of the traced commands looked up or connected to beyond this machine."""
    hosts = (root.parent / "hosts.txt").read_text().split()
    assert "127.0.0.1" in hosts  # the trace sees the demo web and Prefect
    return set(hosts) - HERE


def digests(run: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["digest"] for stage in run["stages"] if stage["name"] not in ("report",)}


@pytest.mark.lifecycle
@pytest.mark.prefect
@pytest.mark.timeout(900)
def test_killed_and_resumed_equals_undisturbed_and_a_second_run_reuses_all(tmp_path: Path) -> None:
    straight = command("run", str(PRESET), root=tmp_path / "straight")
    assert straight["outcome"] == "ok"
    assert {stage["status"] for stage in straight["stages"]} == {"ran"}
    assert not outside_hosts(tmp_path / "straight")
    assert Path(straight["report"]).stat().st_size > 10_000
    assert {"teacher", "student-4", "student-1", "lora-robot"} <= set(straight["exports"])
    funnel = straight["funnel"]
    assert funnel["kept"] + funnel["errored"] + sum(funnel["dropped"].values()) == funnel["received"] == 160

    for stages_done in (2, 7, 11):
        kill_when(stages_done, tmp_path / "broken")
    resumed = command("run", str(PRESET), root=tmp_path / "broken")
    assert "reused" in {stage["status"] for stage in resumed["stages"]}
    assert digests(resumed) == digests(straight)

    again = command("run", str(PRESET), root=tmp_path / "straight")
    assert {stage["status"] for stage in again["stages"]} == {"reused"}

    plan = command("plan", str(PRESET), "--set", "posttrain.dpo.beta_per_element=0.7", root=tmp_path / "straight")
    untouched = {row["stage"] for row in plan if row["state"] == "HIT"}
    assert untouched == {"source", "download", "dedup", "quality", "buckets", "encode", "judge", "pretrain-32",
                         "pretrain-40", "sft", "pairs", "grpo"}  # fmt: skip
