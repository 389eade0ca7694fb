"""What made a result: our code, its git commit, the packages, the machine and the seeds; all of it goes into facts."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = ("flows", "tasks", "models", "data_curation", "infra")
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "pyarrow",
    "pillow",
    "ImageHash",
    "img2dataset",
    "prefect",
    "ray",
    "pydantic",
)


def provenance(seeds: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Code version, packages, machine and seeds as JSON-able facts (no host name, no path)."""
    return {"code": dict(code()), "packages": dict(packages()), "machine": dict(machine()), "seeds": dict(seeds or {})}


@cache
def code() -> Mapping[str, str | bool | None]:
    """Our version, a digest of our source files, and the git commit where there is one."""
    digest = hashlib.sha256()
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    commit = _git("rev-parse", "HEAD")
    dirty = _git("status", "--porcelain", "--", *OURS)
    return {
        "version": version_of("t2i-lifecycle"),
        "digest": digest.hexdigest(),
        "commit": commit,
        "changed": bool(dirty) if commit else None,
    }


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def version_of(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def packages() -> Mapping[str, str]:
    """Versions of what results can depend on."""
    found = {name: version_of(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


def machine() -> Mapping[str, Any]:
    """Python, system, cores, memory, and the GPU when torch is loaded and sees one."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def usable_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
