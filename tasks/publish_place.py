"""The folder a publication is written to: new, empty, or holding an earlier publication whose files may go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from infra.artifacts import files_under
from infra.errors import ConfigError

LINEAGE = "lineage.json"
MAKER = "t2i-lifecycle"  # stands in lineage.json of what `publish` wrote, and of nothing else


def earlier_files(place: Path) -> set[str]:
    """Files of an earlier publication that may be replaced; anything else that is not empty is refused."""
    if not place.exists():
        return set()
    if place.is_dir() and not any(place.iterdir()):
        return set()
    try:
        about = json.loads((place / LINEAGE).read_text())
    except (OSError, ValueError):
        about = {}
    if about.get("published_by") != MAKER:
        raise ConfigError(f"{place} is not empty and was not written by `t2i publish`; give a new or empty folder")
    files = {str(entry[0]) for entry in about["files"]}
    outside = [name for name in sorted(files) if not (place / name).resolve().is_relative_to(place.resolve())]
    if outside:
        raise ConfigError(f"{place / LINEAGE} names {outside[0]}, which is not in that folder; give a new folder")
    return {LINEAGE, *files}


def move_in(staged: Path, place: Path, earlier: set[str]) -> str:
    """Put the staged files into place, lineage.json last; other files there stay, none is written over."""
    if not place.exists():
        staged.rename(place)
        return str(place)
    new = sorted(
        (path.relative_to(staged).as_posix() for path in files_under(staged)), key=lambda name: (name == LINEAGE, name)
    )
    taken = [name for name in new if name not in earlier and (place / name).exists()]
    if taken:
        raise ConfigError(
            f"{place / taken[0]} is not from an earlier publication and would be written over; move it away"
        )
    for name in sorted(earlier):
        if name != LINEAGE:
            (place / name).unlink(missing_ok=True)
    for name in new:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staged / name, place / name)
    return str(place)
