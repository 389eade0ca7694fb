"""An artifact: an immutable folder known by the sha256 of everything in it, and where it came from."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from infra.config import digest_of
from infra.errors import LifecycleError

EVENTS = "tensorboard"  # folder of event files in a working folder; they hold times, so no artifact has them
RECORD = "artifact.json"


class Artifact(BaseModel):
    """What stages hand to each other: a place and a digest, never the bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(description="manifest, checkpoint, adapter, judge, scores, report, ...")
    uri: str = Field(description="file:// or s3:// folder with the data")
    digest: str = Field(description="sha256 over the listing of (path, size, sha256)")
    stage: str = Field(description="name of the stage that made it")
    parents: tuple[str, ...] = Field(default=(), description="digests of the inputs, in the order of their roles")
    facts: dict[str, Any] = Field(
        default_factory=dict, description="counts, metrics, configuration, code version, seconds"
    )


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    sha256: str


def files_under(folder: Path) -> Iterator[Path]:
    """Every plain file below `folder`; a link or device is refused, because its bytes are not the artifact's own."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from files_under(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        else:
            raise LifecycleError(
                f"{entry.path} is a link or special file; artifacts hold plain files only, write a copy"
            )


def file_entry(path: Path, folder: Path) -> FileEntry:
    """Size and full sha256 of one file, named relative to `folder`."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.tell()
    return FileEntry(path=path.relative_to(folder).as_posix(), size=size, sha256=sha256)


def listing_digest(entries: list[FileEntry]) -> str:
    """The digest of a listing, whatever order it is in."""
    return digest_of(sorted((entry.path, entry.size, entry.sha256) for entry in entries))


def folder_digest(folder: Path) -> tuple[str, list[FileEntry]]:
    """Digest and listing of a folder's files, its own `artifact.json` excepted."""
    paths = [path for path in files_under(folder) if path != folder / RECORD]
    entries = sorted((file_entry(path, folder) for path in paths), key=lambda entry: entry.path)
    return listing_digest(entries), entries


def difference(folder: Path, recorded: list[FileEntry], found: list[FileEntry]) -> str | None:
    """The first file in which a folder differs from its recorded listing, in words."""
    there = {entry.path: entry for entry in found}
    for entry in sorted(recorded, key=lambda item: item.path):
        now = there.pop(entry.path, None)
        if now is None:
            return f"{folder / entry.path} is missing"
        if now.size != entry.size:
            return f"{folder / entry.path} has {now.size} bytes, recorded were {entry.size}"
        if now.sha256 != entry.sha256:
            return f"{folder / entry.path} has sha256 {now.sha256[:12]}, recorded was {entry.sha256[:12]}"
    return f"{folder / min(there)} does not belong to the artifact" if there else None
