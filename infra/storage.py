"""The store: artifacts under <root>/<stage>/<key>, run records under <root>/runs; `artifact.json` present means done."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pydantic import ValidationError

from infra.artifacts import RECORD, Artifact, FileEntry, folder_digest, listing_digest
from infra.backend import Backend
from infra.config import canonical_json, digest_of
from infra.errors import ArtifactCorrupted, ConfigError, LifecycleError
from infra.records import NAME, checked, is_record, run_record, wrong_in
from infra.remote_work import RemoteWork

log = logging.getLogger(__name__)

_RESERVED = {"runs", "pointers"}
Listing = list[FileEntry]
Runs = list[dict[str, Any]]
Listed = list[str]  # Store.list hides the built-in name
_verified: set[tuple[str, str]] = set()  # (uri, digest) whose every byte this process has already checked


class Store:
    """Artifacts and run records under one root, on a local disk or in S3; made by `open_store`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.root = backend.root
        self.scratch_root = backend.scratch  # this machine's working folders

    def find(self, stage: str, key: str) -> Artifact | None:
        """The committed artifact of a stage key, or None; reads only its record, no data."""
        found = self._record(stage, key)
        return None if found is None else found[0]

    def local(self, artifact: Artifact) -> Path:
        """A local folder with the artifact's files, every byte checked once per process; a damaged one is set aside."""
        stage, key = self._place(artifact)
        found = self._record(stage, key)
        if found is None:
            raise ArtifactCorrupted(f"artifact {artifact.uri} is gone; run stage {stage!r} again", stage, key)
        stored, files = found
        if stored.digest != artifact.digest:
            raise ArtifactCorrupted(
                f"artifact {artifact.uri} now has digest {stored.digest[:12]}, wanted {artifact.digest[:12]}; "
                f"run the stages after {stage!r} again",
                stage,
                key,
            )
        entry = f"{stage}/{key}"
        folder = self._backend.fetch(entry, stored.digest, files)
        if (artifact.uri, artifact.digest) in _verified and folder.is_dir():
            return folder
        wrong = wrong_in(folder, stored.digest, files)
        if wrong and (fresh := self._backend.refetch(entry, stored.digest, files)) is not None:
            folder, wrong = fresh, wrong_in(fresh, stored.digest, files)
        if wrong:
            place = self._backend.quarantine(entry)
            aside = f"it was moved to {place}" if place else "it could not be moved away"
            raise ArtifactCorrupted(
                f"artifact of stage {stage!r} is corrupted: {wrong}; {aside}; `t2i rerun RUN {stage}` builds it again",
                stage,
                key,
            )
        _verified.add((artifact.uri, artifact.digest))
        return folder

    def listing(self, artifact: Artifact) -> Listing:
        """Path, size and sha256 of every file of an artifact."""
        found = self._record(*self._place(artifact))
        return [] if found is None else found[1]

    def read(self, artifact: Artifact, path: str) -> bytes:
        """One file of an artifact, checked against its listing, without fetching the others."""
        stage, key = self._place(artifact)
        listed = {entry.path: entry for entry in self.listing(artifact)}
        if path not in listed:
            raise ConfigError(
                f"artifact {artifact.uri} has no file {path}; it has {', '.join(sorted(listed)[:9]) or 'none'}"
            )
        entry = f"{stage}/{key}"
        data = self._backend.read(f"{self._backend.data_path(entry, artifact.digest)}/{path}")
        if data is None or hashlib.sha256(data).hexdigest() != listed[path].sha256:
            raise ArtifactCorrupted(
                f"artifact of stage {stage!r} is corrupted: {path} is missing or damaged; "
                f"`t2i rerun RUN {stage}` builds it again",
                stage,
                key,
            )
        return data

    def scratch(self, stage: str, key: str) -> Path:
        """A local working folder of one stage key that survives kills; the caller removes what it no longer needs."""
        folder = self._backend.scratch / f"{checked(stage)}-{checked(key)[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remote_work(self, stage: str, key: str, folder: Path) -> RemoteWork | None:
        """Keeper of a working folder's checkpoints, where the root is no folder that all machines see."""
        return self._backend.remote_work(f"{checked(stage)}-{checked(key)[:16]}", folder)

    def remote_works(self) -> dict[str, float]:
        """Names of all that `remote_work` keeps, and when each was saved last (seconds since 1970)."""
        return self._backend.remote_works()

    def forget_work(self, name: str) -> None:
        """Remove what is kept of a working folder of that name."""
        if (kept := self._backend.remote_work(name, self.scratch_root / name)) is not None:
            kept.forget()

    def commit(
        self, stage: str, key: str, kind: str, folder: Path, parents: Iterable[str], facts: dict[str, Any]
    ) -> Artifact:
        """Move `folder` into the store, its record last; who loses a race gets the winner's artifact."""
        if checked(stage) in _RESERVED or not checked(key):
            raise ConfigError(f"a stage cannot be called {stage!r}; choose another name")
        if (folder / RECORD).exists() and not is_record(folder / RECORD):
            raise LifecycleError(f"stage {stage!r} wrote {RECORD}, a name the store keeps for itself; rename that file")
        digest, files = folder_digest(folder)
        if not files:
            raise LifecycleError(f"stage {stage!r} wrote no file under {folder}; a stage must leave at least one")
        entry = f"{stage}/{key}"
        body = {
            "format": 1,
            "stage": stage,
            "kind": kind,
            "digest": digest,
            "parents": list(parents),
            "facts": facts,
            "files": [[item.path, item.size, item.sha256] for item in files],
        }
        record = (canonical_json({**body, "seal": digest_of(body)}) + "\n").encode()
        won = self._backend.publish(folder, entry, digest, files, record)
        found = self.find(stage, key)
        if found is None:
            raise LifecycleError(
                f"stage {stage!r} was committed to {self._backend.uri(entry)} and then removed; run it again"
            )
        if not won and found.digest != digest:
            log.warning(
                "stage %s was made twice with different bytes; the first one, %s, stays", stage, found.digest[:12]
            )
        return found

    def discard(self, artifact: Artifact) -> None:
        """Remove an artifact so that the next run builds it again."""
        self.discard_entry(*self._place(artifact))

    def discard_entry(self, stage: str, key: str) -> None:
        """Remove whatever lies at a stage key, readable or not (`ArtifactCorrupted` carries both names)."""
        entry = f"{checked(stage)}/{checked(key)}"
        self._backend.remove(entry)
        gone = {pair for pair in _verified if pair[0].startswith(self._backend.uri(entry))}
        _verified.difference_update(gone)

    def list(self) -> Iterator[Artifact]:
        """Every committed artifact; an unreadable record is logged and passed over."""
        for stage in self._backend.names(""):
            if stage in _RESERVED or not NAME.match(stage):
                continue
            for key in self._backend.names(stage):
                try:
                    found = self.find(stage, key) if NAME.match(key) else None
                except ArtifactCorrupted as error:
                    log.warning("%s", error)
                    continue
                if found is not None:
                    yield found

    def key_of(self, artifact: Artifact) -> str:
        """The key an artifact lies under."""
        return self._place(artifact)[1]

    def size(self, stage: str, key: str) -> int:
        """Bytes of an artifact's files, from its record."""
        found = self._record(stage, key)
        return 0 if found is None else sum(item.size for item in found[1])

    # -- run records

    def write_run(self, run_id: str, record: dict[str, Any]) -> None:
        """Write the record of a run whole; its first `started` time stays."""
        path = f"runs/{checked(run_id)}.json"
        before = self._backend.read(path)
        started = run_record(before, run_id)["started"] if before else datetime.now(UTC).isoformat()
        body = {"run": run_id, "started": started, **record}
        self._backend.write(path, (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def read_run(self, run_id: str) -> dict[str, Any]:
        """The record of a run; `latest` is the one that started last."""
        if run_id == "latest":
            runs = self.list_runs()
            if not runs:
                raise ConfigError(f"there is no run under {self.root}; start one with `t2i run PRESET`")
            return runs[0]
        data = self._backend.read(f"runs/{checked(run_id)}.json")
        if data is None:
            known = ", ".join(run["run"] for run in self.list_runs()[:5]) or "none"
            raise ConfigError(f"there is no run {run_id!r} under {self.root}; latest runs: {known}")
        return run_record(data, run_id)

    def list_runs(self) -> Runs:
        """Every run record, the one that started last first."""
        names = [name for name in self._backend.names("runs") if name.endswith(".json")]
        read = [(name, self._backend.read(f"runs/{name}")) for name in names]
        runs = [run_record(data, name) for name, data in read if data is not None]
        return sorted(runs, key=lambda run: (str(run["started"]), str(run["run"])), reverse=True)

    def forget_run(self, run_id: str) -> None:
        """Remove the record of a run; what it made stays until nothing needs it."""
        self._backend.erase(f"runs/{checked(run_id)}.json")

    # -- pointers: the only things in a store that change

    def pointers(self) -> Listed:
        """Names of the pointers."""
        return [name.removesuffix(".json") for name in self._backend.names("pointers") if name.endswith(".json")]

    def read_pointer(self, name: str) -> bytes | None:
        """What a pointer says; None when there is none."""
        return self._backend.read(f"pointers/{checked(name)}.json")

    def swap_pointer(self, name: str, expected: bytes | None, data: bytes) -> bool:
        """Make it say `data` if it still says `expected`; False when another was faster."""
        return self._backend.swap(f"pointers/{checked(name)}.json", expected, data)

    def lock(self) -> AbstractContextManager[None]:
        """Held for the length of a run: one run per root; the error names the process that holds it."""
        return self._backend.lock()

    def _place(self, artifact: Artifact) -> tuple[str, str]:
        start = self._backend.uri("")
        parts = artifact.uri.removeprefix(start).strip("/").split("/")
        if not artifact.uri.startswith(start) or len(parts) < 2:
            raise LifecycleError(
                f"artifact {artifact.uri} does not lie under root {self.root}; open the store it is in"
            )
        return parts[0], parts[1]

    def _record(self, stage: str, key: str) -> tuple[Artifact, Listing] | None:
        entry = f"{checked(stage)}/{checked(key)}"
        data = self._backend.read(f"{entry}/{RECORD}")
        if data is None:
            return None
        try:
            body = json.loads(data)
            seal = body.pop("seal")
            files = [FileEntry(path=path, size=size, sha256=sha256) for path, size, sha256 in body["files"]]
            sound = seal == digest_of(body) and body["digest"] == listing_digest(files)
            uri = self._backend.uri(self._backend.data_path(entry, body["digest"]))
            fields = {name: body[name] for name in ("kind", "digest", "stage", "parents", "facts")}
            artifact = Artifact(uri=uri, **fields)
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
            sound = False
        if not sound:
            where = self._backend.uri(f"{entry}/{RECORD}")
            raise ArtifactCorrupted(
                f"artifact of stage {stage!r} is corrupted: {where} is damaged; `t2i rerun RUN {stage}` builds it again",
                stage,
                key,
            )
        return artifact, files


def open_store(root: str | Path, create: bool = True) -> Store:
    """The store at a path, a file:// or an s3:// address; with `create`, the root is made and proved writable."""
    return Store(open_backend(root, create))


def open_backend(root: str | Path, create: bool) -> Backend:
    """Where the bytes of the store at an address lie."""
    text = str(root)
    scheme = urlparse(text).scheme if "://" in text else "file"
    match scheme:
        case "file":
            from infra.local_files import LocalFiles

            return LocalFiles(text, create)
        case "s3":
            from infra.s3_objects import S3Objects

            return S3Objects(text, create)
        case _:
            raise ConfigError(f"root {text!r} has scheme {scheme!r}; use a path, file:///path or s3://bucket/prefix")
