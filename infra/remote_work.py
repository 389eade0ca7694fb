"""The working folder of a training stage, kept in the bucket too: whoever goes on with it need not be on the same machine.

Objects are named after their bytes, so that a snapshot uploads what is new; the listing is put last, so that it is always whole.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from infra.artifacts import EVENTS, file_entry
from infra.errors import LifecycleError

log = logging.getLogger(__name__)

PLACE = ".work"
POLL_SECONDS = 1.0
Listing = dict[str, str]  # path in the folder -> sha256


class Objects(Protocol):
    """What it needs of a bucket."""

    def read(self, path: str) -> bytes | None: ...
    def write(self, path: str, data: bytes) -> None: ...
    def upload(self, source: Path, path: str) -> None: ...
    def download(self, path: str, target: Path) -> None: ...
    def remove(self, entry: str) -> None: ...
    def erase(self, path: str) -> None: ...


class RemoteWork:
    """One stage key's working folder in a bucket. `folder` has `checkpoints/step-*`, and what was made beside them."""

    def __init__(self, objects: Objects, name: str, folder: Path) -> None:
        self.objects, self.folder = objects, folder
        self.place, self.record = f"{PLACE}/{name}", f"{PLACE}/{name}.json"
        self.sent: set[str] = set()
        self.newest = ""

    def restore(self, own_may_stay: bool) -> None:
        """Make the folder what the bucket has; `own_may_stay` keeps a local one that is further, for a worker alone.

        Workers on several machines must agree on where they go on, so with several only the bucket counts.
        """
        with _alone(self.folder.with_suffix(".lock")):
            wanted = self._listed()
            if own_may_stay and _newest(self.folder) >= max((_step(path) for path in wanted), default=""):
                return
            if self._here() == wanted:
                return
            partial = self.folder.with_suffix(".part")  # a kill must not leave half a checkpoint for the newest
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for path, sha256 in wanted.items():
                target = partial / path
                target.parent.mkdir(parents=True, exist_ok=True)
                self.objects.download(f"{self.place}/{sha256}", target)
                if file_entry(target, partial).sha256 != sha256:
                    raise LifecycleError(f"{path} of the working folder came damaged from the bucket; run again")
            shutil.rmtree(self.folder, ignore_errors=True)
            partial.rename(self.folder)
            if wanted:
                log.info("goes on from %s, kept in the bucket", _newest(self.folder))

    def save(self) -> bool:
        """Upload what is new since the last checkpoint that was kept; False when there is none."""
        newest = _newest(self.folder)
        if newest == self.newest:
            return False
        listing = self._here()
        if not any(_step(path) == newest for path in listing):
            return False
        for path, sha256 in listing.items():
            if sha256 not in self.sent:
                self.objects.upload(self.folder / path, f"{self.place}/{sha256}")
                self.sent.add(sha256)
        self.objects.write(self.record, json.dumps({"time": time.time(), "files": listing}, sort_keys=True).encode())
        for gone in self.sent - set(listing.values()):
            self.objects.erase(f"{self.place}/{gone}")
        self.sent &= set(listing.values())
        self.newest = newest
        return True

    def forget(self) -> None:
        """The stage is done."""
        self.objects.erase(self.record)
        self.objects.remove(self.place)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Save every new checkpoint in the background; training never waits for the bucket, nor fails with it."""
        self.sent, self.newest = set(self._listed().values()), _newest(self.folder)
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(POLL_SECONDS):
                try:
                    self.save()
                except (LifecycleError, OSError) as error:  # a checkpoint dropped meanwhile, or a bucket in trouble
                    log.warning("the newest checkpoint is not in the bucket yet: %s", error)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _listed(self) -> Listing:
        data = self.objects.read(self.record)
        return {} if data is None else dict(json.loads(data)["files"])

    def _here(self) -> Listing:
        """The newest checkpoint and everything beside the checkpoints, as it is."""
        newest = _newest(self.folder)
        paths = (path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file())
        wanted = (
            path for path in paths
            if not any(part.startswith(".") for part in path.parts) and path.parts[0] != EVENTS
            and (path.parts[0] != "checkpoints" or path.parts[1] == newest)
        )  # fmt: skip
        return {path.as_posix(): file_entry(self.folder / path, self.folder).sha256 for path in wanted}


def _newest(folder: Path) -> str:
    return max((path.name for path in (folder / "checkpoints").glob("step-*")), default="")


def _step(path: str) -> str:
    parts = path.split("/")
    return parts[1] if parts[0] == "checkpoints" else ""


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Workers on one machine share the folder: one restores it, the others find it restored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
