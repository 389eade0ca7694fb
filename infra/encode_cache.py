"""What was encoded once, by the content it was made from: `<root>/.encoded/<space>/<shard>`, whatever stage asked for it.

A space is a kind of array made by one model in one way; a key in it is the sha256 of what was encoded. A shard is a Parquet
file with page checksums, written whole; its `.keys` file, written after it, holds the shard's sha256, the keys, and its own
sha256, so every damaged bit is found. What is damaged is removed, and encoded again by whoever wanted it. Results never
depend on what is here. Left out: removing single shards of a space that is still in use.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.backend import Backend
from infra.config import digest_of
from infra.storage import open_backend

log = logging.getLogger(__name__)

PLACE = ".encoded"
KEYS, USED = ".keys", "used"
WIDTH = 32  # bytes of a sha256
MOST_BYTES = 1 << 28  # of one shard
SCHEMA = pa.schema([("key", pa.binary(WIDTH)), ("shape", pa.list_(pa.int32())), ("data", pa.binary())])
Arrays = Mapping[bytes, NDArray[Any]]
Index = dict[bytes, str]  # key -> name of the shard that holds it


def key_of(*parts: object) -> bytes:
    """sha256 of what an array was made from."""
    return hashlib.sha256(repr(parts).encode()).digest()


@dataclass(frozen=True)
class Space:
    """Arrays of one kind, model and way; without a root nothing is kept and nothing found. Travels to workers."""

    root: str | None  # of the store
    name: str
    dtype: str

    def index(self) -> Index:
        """Every key that is there; marks the space as used."""
        if self.root is None:
            return {}
        backend, found = _backend(self.root), Index()
        for name in backend.names(self._path("")):
            if not name.endswith(KEYS):
                continue
            keys = self._keys(backend, name.removesuffix(KEYS))
            found |= {keys[at : at + WIDTH]: name.removesuffix(KEYS) for at in range(WIDTH, len(keys), WIDTH)}
        backend.write(self._path(USED), repr(time.time()).encode())
        return found

    def read(self, wanted: Index) -> dict[bytes, NDArray[Any]]:
        """The arrays of these keys; those of a damaged or missing shard are left out."""
        found: dict[bytes, NDArray[Any]] = {}
        for shard in sorted(set(wanted.values())) if self.root is not None else ():
            table = self._table(shard)
            if table is None:
                continue
            for key, shape, data in zip(*(table[name] for name in SCHEMA.names), strict=True):
                if wanted.get(key.as_py()) == shard:
                    array = np.frombuffer(data.as_buffer(), self.dtype).reshape(shape.as_py())
                    found[key.as_py()] = array
        return found

    def write(self, arrays: Arrays) -> None:
        """Keep arrays in shards of at most 256 MB; the same keys give the same name."""
        part, size = list[bytes](), 0
        for key in sorted(arrays) if self.root is not None else ():
            if part and size + arrays[key].nbytes > MOST_BYTES:
                self._write(part, arrays)
                part, size = [], 0
            part.append(key)
            size += arrays[key].nbytes
        if part:
            self._write(part, arrays)

    def _write(self, keys: list[bytes], arrays: Arrays) -> None:
        assert self.root is not None
        shard = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        shapes = [list(arrays[key].shape) for key in keys]
        data = [np.ascontiguousarray(arrays[key], self.dtype).tobytes() for key in keys]
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.table([keys, shapes, data], schema=SCHEMA), sink, compression="none", use_dictionary=False,
            write_statistics=False, write_page_checksum=True,
        )  # fmt: skip
        stored = sink.getvalue().to_pybytes()
        listing = hashlib.sha256(stored).digest() + b"".join(keys)
        backend = _backend(self.root)
        backend.write(self._path(f"{shard}.parquet"), stored)
        backend.write(self._path(f"{shard}{KEYS}"), listing + hashlib.sha256(listing).digest())

    def _table(self, shard: str) -> pa.Table | None:
        assert self.root is not None
        backend = _backend(self.root)
        keys, stored = self._keys(backend, shard), backend.read(self._path(f"{shard}.parquet"))
        if stored is None or hashlib.sha256(stored).digest() != keys[:WIDTH]:
            self._forget(backend, shard)
            return None
        return pq.read_table(pa.BufferReader(stored), page_checksum_verification=True)

    def _keys(self, backend: Backend, shard: str) -> bytes:
        """The shard's sha256 and its keys; nothing where they are damaged."""
        stored = backend.read(self._path(f"{shard}{KEYS}")) or b""
        listing, seal = stored[:-WIDTH], stored[-WIDTH:]
        if hashlib.sha256(listing).digest() != seal or len(listing) % WIDTH or not listing:
            self._forget(backend, shard)
            return b""
        return listing

    def _forget(self, backend: Backend, shard: str) -> None:
        log.warning("%s/%s is damaged or gone; removed, what it held is encoded again", self._path(""), shard)
        for name in (f"{shard}{KEYS}", f"{shard}.parquet"):
            backend.erase(self._path(name))

    def _path(self, name: str) -> str:
        return f"{PLACE}/{self.name}/{name}".rstrip("/")


def space(root: str | None, kind: str, dtype: str, **identity: object) -> Space:
    """The space of arrays made in the way that `identity` says in full: model, revision, what it was shown, software."""
    return Space(root, f"{kind}-{digest_of({'dtype': dtype, **identity})[:16]}", dtype)


def through(
    cache: Space, index: Index, keys: Sequence[bytes], make: Callable[[list[int]], Sequence[NDArray[Any]]]
) -> tuple[list[NDArray[Any]], int]:
    """The arrays of these keys, in order, and how many were made now: `make` gets the places that nobody has encoded."""
    have = cache.read({key: index[key] for key in keys if key in index})
    first = {key: place for place, key in reversed(list(enumerate(keys))) if key not in have}
    places = sorted(first.values())
    made = dict(zip((keys[place] for place in places), make(places) if places else (), strict=True))
    cache.write(made)
    have |= made
    return [have[key] for key in keys], len(made)


def spaces_unused_since(root: str, limit: float) -> tuple[str, ...]:
    """Names of spaces that no run has opened since `limit`, seconds since 1970."""
    backend = _backend(root)
    used = {name: backend.read(f"{PLACE}/{name}/{USED}") for name in backend.names(PLACE)}
    return tuple(name for name, when in used.items() if float(when or 0) < limit)


def forget_space(root: str, name: str) -> None:
    """Remove a space; whoever wants what it held encodes it again."""
    _backend(root).remove(f"{PLACE}/{name}")


@functools.lru_cache(maxsize=4)
def _backend(root: str) -> Backend:
    return open_backend(root, create=False)
