"""The whole lifecycle at toy size through the command line: killed, resumed, reused, changed, nothing asked outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from data_curation.scenes import Scene, draw_batch

PRESET = Path(__file__).resolve().parents[2] / "presets" / "smoke.yaml"
T2I = [str(Path(sys.executable).with_name("t2i"))]


TRACED = Path(__file__).parent / "traced"
HERE = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "None", socket.gethostname()}


def command(*arguments: str, root: Path) -> Any:
    path = os.pathsep.join([str(TRACED), str(PRESET.parents[1])])  # this tree, wherever t2i is installed from
    environment = {**os.environ, "PYTHONPATH": path, "NETWORK_TRACE": str(root.parent / "hosts.txt")}
    process = subprocess.Popen(
        [*T2I, *arguments, "--set", f"run.root={root}", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        doors = pool.submit(open_doors, process)
        out, err = process.communicate()
    assert process.returncode == 0, out[-1000:] + err[-3000:]
    assert doors.result() <= {"127.0.0.1", "::ffff:127.0.0.1"}
    return json.loads(out.strip().splitlines()[-1])


def open_doors(process: "subprocess.Popen[str]") -> set[str]:
    """Addresses that a command, or anything it started, listened on while it ran."""
    found = set()
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    found |= {at.laddr.ip for at in each.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
        time.sleep(0.5)
    return found


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


def own_subject(root: Path, folder: Path) -> None:
    """A subject of one's own on the finished run: twice the same, sampled from, and one picture is too few."""
    folder.mkdir()
    scenes = [Scene("big", ("octopus",), color) for color in ("white", "pink", "blue")]
    for i, image in enumerate(draw_batch(scenes, 64, 0)):
        Image.fromarray(image).save(folder / f"{i}.png")

    def personalize() -> subprocess.CompletedProcess[str]:
        arguments = ["personalize", str(folder), "--name", "my-pet", "--class-word", "octopus", "--root", str(root)]
        return subprocess.run([*T2I, *arguments, "--json"], capture_output=True, text=True, check=False)

    first, again = (json.loads(personalize().stdout.splitlines()[-1]) for _ in range(2))
    assert {name: first[name] for name in first if name != "run"} == {n: again[n] for n in again if n != "run"}
    assert all(Path(first[name]).exists() for name in ("adapter", "checkpoint", "grid", "pipeline"))
    assert len([path for path in Path(first["adapter"]).iterdir() if path.suffix == ".safetensors"]) == 3
    drawn = subprocess.run([*T2I, "sample", "latest", f"a {first['token']} octopus", "--root", str(root), "--out",
                            str(folder.parent / "drawn"), "--json"], capture_output=True, text=True, check=True)  # fmt: skip
    assert Path(json.loads(drawn.stdout)[0]).exists()
    (folder / "0.png").unlink()
    refused = personalize()
    assert refused.returncode == 3
    assert "has 2 pictures, not 3 to 30" in refused.stderr


@pytest.mark.lifecycle
@pytest.mark.prefect
@pytest.mark.timeout(1800)
def test_killed_and_resumed_equals_undisturbed_and_a_second_run_reuses_all(
    tmp_path: Path, browser: Any, barriers: Any
) -> None:
    straight = command("run", str(PRESET), root=tmp_path / "straight")
    assert straight["outcome"] == "ok"
    assert {stage["status"] for stage in straight["stages"]} == {"ran"}
    assert not outside_hosts(tmp_path / "straight")
    assert Path(straight["report"]).stat().st_size > 10_000
    page = browser.new_page()
    page.goto(Path(straight["report"]).as_uri())
    assert barriers(page) == []
    assert {"teacher", "student-4", "student-1", "lora-robot", "lora-octopus", "lora-mix-subjects"} <= set(
        straight["exports"]
    )
    funnel = straight["funnel"]
    assert funnel["kept"] + funnel["errored"] + sum(funnel["dropped"].values()) == funnel["received"] == 160

    for stages_done in (2, 7, 11):
        kill_when(stages_done, tmp_path / "broken")
    resumed = command("run", str(PRESET), root=tmp_path / "broken")
    assert "reused" in {stage["status"] for stage in resumed["stages"]}
    assert digests(resumed) == digests(straight)

    again = command("run", str(PRESET), root=tmp_path / "straight")
    assert {stage["status"] for stage in again["stages"]} == {"reused"}

    own_subject(tmp_path / "straight", tmp_path / "own")

    plan = command("plan", str(PRESET), "--set", "posttrain.dpo.beta_per_element=0.7", root=tmp_path / "straight")
    untouched = {row["stage"] for row in plan if row["state"] == "HIT"}
    assert untouched == {"source", "download", "dedup", "quality", "buckets", "encode", "judge", "pretrain-32",
                         "pretrain-40", "sft", "pairs", "grpo", "prompt-enhancer"}  # fmt: skip
