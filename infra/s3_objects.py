"""A store's root in S3 or what speaks its protocol: data first, then `artifact.json` under If-None-Match.

Data lie under <stage>/<key>/<digest>, so two writers that made different bytes never touch each other's objects.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from infra.artifacts import RECORD, FileEntry
from infra.errors import ArtifactCorrupted, ConfigError, LifecycleError
from infra.local_files import holder_record, holder_text, sync_tree
from infra.remote_work import PLACE, RemoteWork

log = logging.getLogger(__name__)

LOCK_SECONDS = 90.0  # a lock not renewed for this long belongs to a dead run
READ_TRIES = 5
_MISSING = {"404", "NoSuchKey", "NotFound", "NoSuchBucket"}
_CONFLICT = {"412", "409", "PreconditionFailed", "ConditionalRequestConflict"}


def cache_folder(root: str) -> Path:
    """Where downloads and working folders of a remote root live on this machine (T2I_CACHE moves it)."""
    base = os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i-lifecycle"
    return Path(base) / hashlib.sha256(root.encode()).hexdigest()[:16]


def _code(error: Exception) -> str:
    response: dict[str, Any] = getattr(error, "response", None) or {}  # None: the connection broke
    return str(response.get("Error", {}).get("Code", ""))


class S3Objects:
    """Backend of `Store` in a bucket; address and credentials come from the usual AWS_* variables."""

    def __init__(self, root: str, create: bool) -> None:
        import boto3  # type: ignore[import-untyped,unused-ignore]
        from botocore.config import Config as ClientConfig  # type: ignore[import-untyped,unused-ignore]
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped,unused-ignore]

        parsed = urlparse(root)
        self._bucket, self._prefix = parsed.netloc, parsed.path.strip("/")
        if not self._bucket:
            raise ConfigError(f"root {root!r} names no bucket; write s3://bucket/prefix")
        self.root = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._cache = cache_folder(self.root)
        self.scratch = self._cache / "scratch"
        self._errors = (BotoCoreError, ClientError)
        self._client: Any = boto3.client(
            "s3", config=ClientConfig(retries={"max_attempts": 5, "mode": "standard"}, connect_timeout=10)
        )
        if create:
            try:
                self.write(".probe", b"x")
            except LifecycleError as error:
                raise ConfigError(
                    f"root {self.root} cannot be written: {error.__cause__}; check bucket, AWS_ENDPOINT_URL, credentials"
                ) from error

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".strip("/") if self._prefix else path.strip("/")

    def uri(self, path: str) -> str:
        """The s3:// address of a path below the root."""
        return f"{self.root}/{path}"

    def data_path(self, entry: str, digest: str) -> str:
        """Data lie in a folder of their digest."""
        return f"{entry}/{digest[:16]}"

    def read(self, path: str) -> bytes | None:
        """The bytes of an object, None when there is none."""
        return self._read(path)[0]

    def _read(self, path: str) -> tuple[bytes | None, dict[str, Any]]:
        for tries_left in reversed(range(READ_TRIES)):  # boto3 tries requests again, but not a body that breaks off
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(path))
                return bytes(answer["Body"].read()), answer
            except (*self._errors, OSError) as error:
                if _code(error) in _MISSING:
                    return None, {}
                if not tries_left:
                    raise LifecycleError(
                        f"{self.uri(path)} cannot be read: {error}; check the network and run again"
                    ) from error
        raise AssertionError

    def write(self, path: str, data: bytes) -> None:
        """Replace an object (S3 puts are atomic)."""
        self._put_if(path, data)

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        """Replace an object if it still holds `expected` (None: if there is none)."""
        body, answer = self._read(path)
        if body != expected:
            return False
        condition = {"IfNoneMatch": "*"} if body is None else {"IfMatch": str(answer["ETag"])}
        return self._put_if(path, data, **condition) is not None

    def _put_if(self, path: str, data: bytes, **condition: str) -> str | None:
        """Put under IfNoneMatch or IfMatch; the new ETag, or None when the condition did not hold."""
        try:
            answer = self._client.put_object(Bucket=self._bucket, Key=self._key(path), Body=data, **condition)
        except self._errors as error:
            if condition and _code(error) in _CONFLICT | _MISSING:
                body, there = self._read(path)  # our own, when the answer to it was lost and the put was tried again
                return str(there["ETag"]) if body == data else None
            raise LifecycleError(f"{self.uri(path)} cannot be written: {error}; run again") from error
        return str(answer["ETag"])

    def publish(self, folder: Path, entry: str, digest: str, files: list[FileEntry], record: bytes) -> bool:
        """Upload every file, then the record if there is none yet; the folder becomes the local copy."""

        with ThreadPoolExecutor(8) as pool:
            place = self.data_path(entry, digest)
            list(pool.map(lambda item: self.upload(folder / item.path, f"{place}/{item.path}"), files))
        won = self._put_if(f"{entry}/{RECORD}", record, IfNoneMatch="*") is not None
        _keep(folder, self._cached(digest))
        return won

    def upload(self, source: Path, path: str) -> None:
        """Put a file, in parts where it is large."""
        try:
            self._client.upload_file(str(source), self._bucket, self._key(path))
        except (*self._errors, OSError) as error:
            raise LifecycleError(f"upload of {self.uri(path)} failed: {error}; run again") from error

    def download(self, path: str, target: Path) -> None:
        """Get an object as a file, in parts where it is large."""
        try:
            self._client.download_file(self._bucket, self._key(path), str(target))
        except self._errors as error:
            raise LifecycleError(f"download of {self.uri(path)} failed: {error}; run again") from error

    def _cached(self, digest: str) -> Path:
        return self._cache / "artifacts" / digest

    def fetch(self, entry: str, digest: str, files: list[FileEntry]) -> Path:
        """The local copy, downloaded when there is none."""
        cached = self._cached(digest)
        if cached.is_dir():
            return cached
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial, place = Path(tempfile.mkdtemp(dir=cached.parent, prefix=".part-")), self.data_path(entry, digest)

        def download(item: FileEntry) -> None:
            target = partial / item.path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self._bucket, self._key(f"{place}/{item.path}"), str(target))

        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(download, files))
        except self._errors as error:
            shutil.rmtree(partial, ignore_errors=True)
            if _code(error) in _MISSING:
                stage, key = entry.split("/")
                raise ArtifactCorrupted(
                    f"artifact of stage {stage!r} is corrupted: an object under {self.uri(entry)} is missing; "
                    f"`t2i rerun RUN {stage}` builds it again",
                    stage,
                    key,
                ) from error
            raise LifecycleError(f"download of {self.uri(entry)} failed: {error}; run again") from error
        _keep(partial, cached)
        return cached

    def refetch(self, entry: str, digest: str, files: list[FileEntry]) -> Path | None:
        """Throw the local copy away and download again."""
        shutil.rmtree(self._cached(digest), ignore_errors=True)
        return self.fetch(entry, digest, files)

    def quarantine(self, entry: str) -> str | None:
        """Move the record to .quarantine, so that nothing finds its data; a new commit overwrites them."""
        place, source = f".quarantine/{entry}/{RECORD}", self._key(f"{entry}/{RECORD}")
        try:
            self._client.copy_object(
                Bucket=self._bucket, Key=self._key(place), CopySource={"Bucket": self._bucket, "Key": source}
            )
            self._client.delete_object(Bucket=self._bucket, Key=source)
        except self._errors:
            return None
        return self.uri(place)

    def remove(self, entry: str) -> None:
        """Delete the record, then the data."""
        self._client.delete_object(Bucket=self._bucket, Key=self._key(f"{entry}/{RECORD}"))
        for page in self._pages(f"{entry}/"):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", [])]
            if keys:
                self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})

    def erase(self, path: str) -> None:
        """Delete one object."""
        self._client.delete_object(Bucket=self._bucket, Key=self._key(path))

    def _pages(self, path: str, **options: str) -> Iterator[dict[str, Any]]:
        prefix = self._key(path) + "/" if self._key(path) else ""
        yield from self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix, **options)

    def names(self, path: str) -> list[str]:
        """Names of the next level, sorted, hidden ones left out."""
        found: set[str] = set()
        for page in self._pages(path, Delimiter="/"):
            found.update(item["Prefix"].rstrip("/").rsplit("/", 1)[-1] for item in page.get("CommonPrefixes", []))
            found.update(item["Key"].rsplit("/", 1)[-1] for item in page.get("Contents", []))
        return sorted(name for name in found if name and not name.startswith("."))

    def remote_work(self, name: str, folder: Path) -> RemoteWork:
        """Keeper of a working folder's checkpoints."""
        return RemoteWork(self, name, folder)

    def remote_works(self) -> dict[str, float]:
        """Name -> when it was saved last."""
        read = {name: self.read(f"{PLACE}/{name}") for name in self.names(PLACE) if name.endswith(".json")}
        return {name[:-5]: float(json.loads(data)["time"]) for name, data in read.items() if data is not None}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """An object renewed by a thread; one that was not renewed for LOCK_SECONDS is taken over."""
        holder = {
            **holder_record(),
            "token": uuid.uuid4().hex,
            "renewals": 0,
        }  # no two bodies alike: ETags tell them apart
        body = json.dumps(holder).encode()
        current = [self._put_if(".lock", body, IfNoneMatch="*") or self._take_over(body)]
        ended = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(holder, current, ended), daemon=True)
        renewer.start()
        try:
            yield
        finally:
            ended.set()
            renewer.join(timeout=30)
            if self._read(".lock")[1].get("ETag") == current[0]:
                self._client.delete_object(Bucket=self._bucket, Key=self._key(".lock"))

    def _take_over(self, data: bytes) -> str:
        body, answer = self._read(".lock")
        if body is None:
            etag = self._put_if(".lock", data, IfNoneMatch="*")
        else:
            # the server's own clock on both sides
            now = _http_date(answer["ResponseMetadata"]["HTTPHeaders"].get("date"), answer["LastModified"])
            stale = (now - answer["LastModified"]).total_seconds() > LOCK_SECONDS
            etag = self._put_if(".lock", data, IfMatch=answer["ETag"]) if stale else None
        if etag is None:
            holder = json.loads(body) if body else {}
            raise ConfigError(
                f"root {self.root} is in use by another run: {holder_text(holder)}; wait for it (a dead one is given up "
                f"after {LOCK_SECONDS:.0f} s) or use another --root"
            )
        return etag

    def _renew(self, holder: dict[str, str | int], current: list[str], ended: threading.Event) -> None:
        for renewals in itertools.count(1):
            if ended.wait(LOCK_SECONDS / 4):
                return
            try:
                etag = self._put_if(".lock", json.dumps({**holder, "renewals": renewals}).encode(), IfMatch=current[0])
            except LifecycleError as error:
                log.warning("lock of %s was not renewed: %s", self.root, error)
                continue
            if etag is None:
                log.error(
                    "lock of %s was taken by another run; its artifacts stay correct, work may be done twice", self.root
                )
                return
            current[0] = etag


def _http_date(text: str | None, default: Any) -> Any:
    return parsedate_to_datetime(text) if text else default


def _keep(folder: Path, cached: Path) -> None:
    """Make `folder` the local copy of an artifact; when one is there already, drop it."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    sync_tree(folder)
    (folder / RECORD).unlink(missing_ok=True)
    try:
        os.rename(folder, cached)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
