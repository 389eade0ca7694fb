"""The smoke lifecycle killed (SIGKILL of the whole process tree) at random moments and run again.

value: share of the killed runs whose every digest equals the undisturbed run's; bar: all of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import record

PRESET = Path(__file__).resolve().parents[1] / "presets" / "smoke.yaml"
T2I = Path(sys.executable).with_name("t2i")
KILLS = 20
SEED = 0


def start(root: Path) -> subprocess.Popen[str]:
    """A smoke run in a process group of its own."""
    command = [str(T2I), "run", str(PRESET), "--root", str(root), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def finish(root: Path) -> dict[str, str]:
    """Run to the end; stage -> digest (the report shows times, so its digest is not compared)."""
    process = start(root)
    text, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"t2i run in {root} ended with {process.returncode}; run it by hand to see why")
    stages = json.loads(text.strip().splitlines()[-1])["stages"]
    return {stage["name"]: stage["digest"] for stage in stages if stage["name"] != "report"}


def kill_after(seconds: float, root: Path) -> bool:
    """Kill a run `seconds` after its start; False when it had ended before."""
    process = start(root)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def main() -> dict[str, Any]:
    """Kill 20 times, each root as often as it takes to finish, and compare every root with the undisturbed one."""
    rng = random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        expected = finish(Path(folder, "undisturbed"))
        length = time.monotonic() - began
        kills: list[dict[str, Any]] = []
        roots: list[dict[str, str]] = []
        while len(kills) < KILLS:
            root = Path(folder, f"killed-{len(roots)}")
            while len(kills) < KILLS:
                after = rng.uniform(0.1, 0.9) * length
                if not kill_after(after, root):
                    break
                kills.append({"seconds": round(after, 2), "done": len(list(root.glob("*/*/artifact.json")))})
            roots.append(finish(root))
    equal = [found == expected for found in roots]
    different = sorted({name for found in roots for name in expected if found[name] != expected[name]})
    return record(
        "kill_resume", [SEED], sum(equal) / len(equal), 1.0, 1.0, all(equal),
        {"kills": kills, "roots": len(roots), "undisturbed_seconds": round(length, 1), "different_stages": different},
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
