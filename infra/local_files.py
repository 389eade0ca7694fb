"""A store's root on a local or shared disk: fsync everything, then one rename; the kernel frees the lock of the dead."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlparse

from infra.artifacts import RECORD, FileEntry, files_under
from infra.errors import ConfigError, LifecycleError


def local_path(root: str) -> Path:
    """The absolute path meant by a plain path or a file:// address."""
    if not root.startswith("file://"):
        return Path(os.path.abspath(Path(root).expanduser()))
    parsed = urlparse(root)
    if parsed.netloc not in ("", "localhost"):
        raise ConfigError(
            f"root {root!r} names the host {parsed.netloc!r}; a file address has three slashes: file:///path"
        )
    return Path(os.path.abspath(unquote(parsed.path)))


def fingerprint(path: Path) -> str | None:
    """Digest of a file's bytes, or of a folder's names, sizes and times; None where there is nothing."""
    path = path.expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for item in sorted(path.rglob("*")):
        if item.is_file():
            digest.update(f"{item.relative_to(path)}|{item.stat().st_size}|{item.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """sha256 over the weights (safetensors) that lie in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    folders = {folder}
    for path in files_under(folder):
        folders.update(parent for parent in path.parents if folder in parent.parents)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    for each in sorted(folders, reverse=True):
        sync_folder(each)


def holder_text(record: dict[str, str | int]) -> str:
    """Who holds a lock, in words."""
    return f"process {record.get('pid', '?')} on {record.get('host', '?')} since {record.get('since', '?')}"


def holder_record() -> dict[str, str | int]:
    """This process, as written into a lock."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


class LocalFiles:
    """Backend of `Store` on a file system."""

    def __init__(self, root: str, create: bool) -> None:
        self._folder = local_path(root)
        self.root = str(self._folder)
        self.scratch = self._folder / ".scratch"
        if create:
            self._prove_writable()

    def _prove_writable(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as probe:
                probe.write(b"x")
                probe.flush()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"root {self._folder} cannot be written: {reason}; choose another place with --root"
            ) from error

    def uri(self, path: str) -> str:
        """The file:// address of a path below the root."""
        return (self._folder / path).as_uri() + ("" if path else "/")

    def data_path(self, entry: str, digest: str) -> str:
        """Data lie beside the record."""
        return entry

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, None when there is none."""
        try:
            return (self._folder / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        """Replace a file atomically."""
        write_atomically(self._folder / path, data)

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        """Replace a file if it still holds `expected` (None: if there is none)."""
        with (self._folder / ".swap").open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if self.read(path) != expected:
                return False
            self.write(path, data)
            return True

    def publish(self, folder: Path, entry: str, digest: str, files: list[FileEntry], record: bytes) -> bool:
        """Flush `folder` with its record inside, then rename it into place; False when another was there first."""
        target = self._folder / entry
        staged = folder
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.stat(folder).st_dev != os.stat(target.parent).st_dev:
                staged = self.scratch / f".copy-{os.getpid()}-{entry.replace('/', '-')}"
                shutil.copytree(folder, staged, dirs_exist_ok=True)
            (staged / RECORD).write_bytes(record)
            sync_tree(staged)
            won = self._rename(staged, target)
            sync_folder(target.parent)
        except OSError as error:
            (staged / RECORD).unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LifecycleError(f"disk under {self.root} is full; free some space and run again") from error
            raise
        for rest in {staged, folder}:
            shutil.rmtree(rest, ignore_errors=True)
        return won

    def _rename(self, staged: Path, target: Path) -> bool:
        while True:
            try:
                os.rename(staged, target)
                return True
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if (target / RECORD).exists():
                return False
            self._trash(target, unless_committed=True)

    def _trash(self, target: Path, unless_committed: bool = False) -> None:
        bin_folder = self._folder / ".trash"
        bin_folder.mkdir(exist_ok=True)
        grave = Path(tempfile.mkdtemp(dir=bin_folder))
        try:
            os.rename(target, grave / "entry")
        except FileNotFoundError:
            pass  # another process was faster
        else:
            if unless_committed and (grave / "entry" / RECORD).exists():  # committed by another since we looked
                os.rename(grave / "entry", target)
            sync_folder(target.parent)
        shutil.rmtree(grave, ignore_errors=True)

    def fetch(self, entry: str, digest: str, files: list[FileEntry]) -> Path:
        """The folder itself."""
        return self._folder / entry

    def refetch(self, entry: str, digest: str, files: list[FileEntry]) -> Path | None:
        """There is no second copy."""
        return None

    def quarantine(self, entry: str) -> str | None:
        """Move an entry to .quarantine, where nothing reads it; its new place, None where the root cannot be written."""
        shelf = self._folder / ".quarantine"
        try:
            shelf.mkdir(exist_ok=True)
            place = Path(tempfile.mkdtemp(dir=shelf, prefix=f"{entry.replace('/', '-')[:64]}-"))
            os.rename(self._folder / entry, place / "entry")
        except OSError:
            return None
        sync_folder((self._folder / entry).parent)
        return str(place / "entry")

    def remove(self, entry: str) -> None:
        """Take an entry away in one rename, then delete it."""
        self._trash(self._folder / entry)

    def erase(self, path: str) -> None:
        """Delete one file."""
        (self._folder / path).unlink(missing_ok=True)

    def names(self, path: str) -> list[str]:
        """Names in a folder, sorted, hidden ones left out."""
        folder = self._folder / path
        return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []

    def remote_work(self, name: str, folder: Path) -> None:
        """Nothing: working folders lie under the root already."""

    def remote_works(self) -> dict[str, float]:
        """Nothing either."""
        return {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """An flock on <root>/.lock; it ends with the process, however that ends."""
        with (self._folder / ".lock").open("a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read_holder(self._folder / ".lock")
                raise ConfigError(
                    f"root {self.root} is in use by another run: {holder_text(holder)}; wait for it or use another --root"
                ) from None
            stream.truncate(0)
            stream.write(json.dumps(holder_record()).encode())
            stream.flush()
            try:
                yield
            finally:
                stream.truncate(0)


def _read_holder(path: Path) -> dict[str, str | int]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
