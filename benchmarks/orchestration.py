"""What the demo costs beside its stages' own work, and what commands cost that make nothing.

value: seconds of the whole run that no stage's function spent, its start included; peer: seconds inside the functions;
bar: their ratio at most 0.1. Figures: the demo again with every stage reused (15 s), `t2i plan` (3 s), `t2i --help` (0.5 s).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lifecycle_runs import PRESET, lifecycle
from benchmarks.record import record
from infra.storage import open_store

T2I = str(Path(sys.executable).with_name("t2i"))
BAR, BAR_REUSED, BAR_PLAN, BAR_HELP = 0.1, 15.0, 3.0, 0.5
TRIES = 3


def seconds_of(*arguments: str) -> float:
    """Shortest of a few times of a command that makes nothing."""
    times = []
    for _ in range(TRIES):
        began = time.monotonic()
        subprocess.run([T2I, *arguments], stdout=subprocess.DEVNULL, check=True)
        times.append(time.monotonic() - began)
    return min(times)


def start_seconds() -> float:
    """From the command to its first stage: imports, the plan, Prefect's server."""
    with tempfile.TemporaryDirectory() as root:
        began = time.monotonic()
        process = subprocess.Popen([T2I, "run", str(PRESET), "--root", root], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "] source: starts" in line:
                    return time.monotonic() - began
            raise RuntimeError(f"t2i run ended with {process.wait()} before its first stage; run it by hand to see why")
        finally:
            process.terminate()
            process.stderr.close()
            process.wait()


def whole_run(root: str) -> tuple[dict[str, Any], float]:
    """The newest run under a root that made every stage itself, and the seconds inside its stages' functions."""
    store = open_store(root, create=False)
    for run in store.list_runs():
        if run["name"] == "demo" and run["stages"] and {stage["status"] for stage in run["stages"]} == {"ran"}:
            made = [store.find(stage["name"], stage["key"]) for stage in run["stages"]]
            return run, sum(artifact.facts["seconds"] for artifact in made if artifact is not None)
    raise RuntimeError(f"no run under {root} made every stage itself; move {root} away and measure again")


def figure(name: str, value: float, bar: float) -> dict[str, Any]:
    """One more measured time against its bar."""
    return {"name": name, "value": round(value, 3), "peer": None, "ratio": None, "bar": bar, "met": value <= bar}


def main() -> dict[str, Any]:
    """Run (or find) the demo, then run it again."""
    root = lifecycle(0)["root"]
    lifecycle.cache_clear()
    began = time.monotonic()
    again = lifecycle(0)
    figures = [
        figure("reused_seconds", time.monotonic() - began, BAR_REUSED),
        figure("plan_seconds", seconds_of("plan", str(PRESET)), BAR_PLAN),
        figure("help_seconds", seconds_of("--help"), BAR_HELP),
    ]
    reused = all(stage["status"] == "reused" for stage in again["stages"])
    (run, inside), start = whole_run(root), start_seconds()
    beside = start + run["wall_seconds"] - inside
    met = reused and beside <= BAR * inside and all(each["met"] for each in figures)
    return record("orchestration", [0], beside, inside, BAR, met,
                  {"figures": figures, "start_seconds": round(start, 2), "wall_seconds": run["wall_seconds"],
                   "stages": len(run["stages"]), "all_reused": reused})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
