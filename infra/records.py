"""Checks of what a store holds: names, records, and the files that a record lists."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra.artifacts import FileEntry, difference, folder_digest
from infra.errors import ConfigError, LifecycleError

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


def wrong_in(folder: Path, digest: str, files: list[FileEntry]) -> str | None:
    """What is wrong with a folder against its recorded digest, in words."""
    if not folder.is_dir():
        return f"{folder} is missing"
    found_digest, found = folder_digest(folder)
    return None if found_digest == digest else difference(folder, files, found)


def is_record(path: Path) -> bool:
    """True for a record that a killed commit left in the folder it was about to move."""
    try:
        body = json.loads(path.read_bytes())
    except ValueError:
        return True  # cut short
    return isinstance(body, dict) and {"seal", "format", "files"} <= body.keys()


def checked(name: str) -> str:
    """A name that may be part of a path."""
    if not NAME.match(name):
        raise ConfigError(f"{name!r} cannot be part of a path; use letters, digits, dot, dash and underscore")
    return name


def run_record(data: bytes, name: str) -> dict[str, Any]:
    """The record of a run from its bytes."""
    try:
        record: dict[str, Any] = json.loads(data)
        return {"run": record["run"], "started": record["started"], **record}
    except (ValueError, KeyError, TypeError) as error:
        raise LifecycleError(f"run record {name} is damaged ({error}); remove that file under runs/") from error


def lifecycles(runs: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Finished whole runs of a lifecycle's name, in the order given; nights, subjects and reruns are none."""
    return [
        run for run in runs
        if run.get("name") == name and run.get("outcome") == "ok" and not {"flow", "rerun_of"} & run.keys()
    ]  # fmt: skip
