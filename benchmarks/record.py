"""What every benchmark ends with: one JSON file of the form docs and tools read, and one line for a person."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from infra.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """What this ran on, in words."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def record(
    name: str, seeds: list[int], value: float, peer: float, bar: float, met: bool, detail: dict[str, Any]
) -> dict[str, Any]:
    """Write results/<name>.json; `ratio` is value over peer, both measured in this run."""
    code = provenance()["code"]
    result = {
        "name": name, "commit": code["commit"] + ("+changes" if code["changed"] else ""), "machine": machine(),
        "seeds": seeds, "value": round(value, 6), "peer": round(peer, 6), "ratio": round(value / peer, 4) if peer else None,
        "bar": bar, "met": met, "detail": detail,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return result
