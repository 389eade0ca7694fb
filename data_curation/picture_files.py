"""Pictures on this machine as samples: image + txt/json pairs, Hugging Face imagefolder, WebDataset tars, Parquet.

Nothing is unpacked to disk; links and special members of a tar are not read. A sample without a body stands for a
picture that is named but not there: it becomes a row with its reason, not a silence.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from data_curation.layouts import (
    BODIES,
    CAPTIONS,
    LICENCES,
    LONG_CAPTIONS,
    METADATA,
    METADATA_NAMES,
    PICTURES,
    URLS,
    body_column,
    pick,
    walk,
)
from infra.errors import DataRefused

LARGEST = 100_000_000  # bytes of one member; a larger one is not read into memory


@dataclass(frozen=True)
class Sample:
    """One picture with what is said about it."""

    url: str
    name: str
    body: bytes | None
    caption: str = ""
    long: str = ""
    licence: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def samples(place: Path, layout: str) -> Iterator[Sample]:
    """Every sample at a place, in the order of names."""
    files = list(walk(place)) if place.is_dir() else [place]
    base = place if place.is_dir() else place.parent
    match layout:
        case "pairs":
            yield from _pairs(files, base)
        case "imagefolder":
            yield from _imagefolder(files, base)
        case "webdataset":
            for path in files:
                if path.suffix.lower() == ".tar":
                    yield from _tar(path, base)
        case _:
            for path in files:
                if path.suffix.lower() == ".parquet":
                    yield from _parquet(path, base, _needed_column(path))


def _said(facts: Mapping[str, Any], place: str, name: str, body: bytes | None, caption: str = "") -> Sample:
    """A sample from what a JSON file or a table row says."""
    names = [key for key, value in facts.items() if isinstance(value, str | int | float)]

    def value(wanted: tuple[str, ...]) -> str:
        key = pick(names, wanted)
        return "" if key is None else str(facts[key]).strip()

    metadata = {key: str(facts[key]) for key in names if key.lower() in METADATA_NAMES}
    return Sample(
        value(URLS) or place, name, body, caption or value(CAPTIONS), value(LONG_CAPTIONS), value(LICENCES), metadata
    )


def _body(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.stat().st_size <= LARGEST else None
    except OSError:
        return None


def _local(path: Path, base: Path) -> str:
    return f"local:{path.relative_to(base).as_posix()}"


def _json(text: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _pairs(files: list[Path], base: Path) -> Iterator[Sample]:
    there = set(files)
    for path in files:
        if path.suffix.lower() not in PICTURES:
            continue
        text, facts = path.with_suffix(".txt"), path.with_suffix(".json")
        caption = text.read_text("utf-8-sig", errors="replace").strip() if text in there else ""
        said = _json(facts.read_bytes()) if facts in there else {}
        yield _said(said, _local(path, base), path.stem, _body(path), caption)


def _imagefolder(files: list[Path], base: Path) -> Iterator[Sample]:
    tables = [base / name for name in METADATA if (base / name).exists()]
    if not tables:
        raise DataRefused(f"{base} has no {', '.join(METADATA)}; an imagefolder needs one, or set layout to pairs")
    rows = _metadata_rows(tables[0])
    inside = base.resolve()
    for row in rows:
        name = str(row.get("file_name") or "")
        path = base / name
        within = bool(name) and path.resolve().is_relative_to(inside) and path.is_file()
        place = f"local:{Path(name).as_posix()}"
        yield _said(
            {k: v for k, v in row.items() if k != "file_name"}, place, path.stem, _body(path) if within else None
        )


def _metadata_rows(path: Path) -> list[dict[str, Any]]:
    try:
        match path.suffix:
            case ".parquet":
                table = pq.read_table(path)
            case ".csv":
                table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
            case _:
                table = pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        raise DataRefused(f"{path} cannot be read: {' '.join(str(error).split())[:300]}; repair it") from error
    if "file_name" not in table.column_names:
        raise DataRefused(f"{path} has no column file_name, only {table.column_names}; name the pictures there")
    return list(table.to_pylist())


def _tar(path: Path, base: Path) -> Iterator[Sample]:
    try:
        with tarfile.open(path, "r:*") as tar:
            key, members = "", dict[str, bytes | None]()
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if (mine := f"{folder}/{stem}".lstrip("/")) != key:
                    yield from _sample_of(path, base, key, members)
                    key, members = mine, {}
                stream = tar.extractfile(member) if member.size <= LARGEST else None
                members[suffix.lower()] = stream.read() if stream else None
            yield from _sample_of(path, base, key, members)
    except (tarfile.TarError, OSError, EOFError) as error:
        words = " ".join(str(error).split())[:300]
        raise DataRefused(f"{path} cannot be read: {words}; repair it or take it out of the folder") from error


def _sample_of(path: Path, base: Path, key: str, members: Mapping[str, bytes | None]) -> Iterator[Sample]:
    picture = next((suffix for suffix in members if f".{suffix}" in PICTURES), None)
    if picture is None:  # nothing, or text alone
        return
    caption = next((members[name] or b"" for name in ("txt", "caption", "text") if name in members), b"")
    said, text = _json(members.get("json") or b"{}"), caption.decode("utf-8", "replace").strip()
    place = f"{_local(path, base)}#{key}.{picture}"
    yield _said(said, place, key.rpartition("/")[2], members[picture], text)


def _needed_column(path: Path) -> str:
    column = body_column(path)
    if column is None:
        raise DataRefused(
            f"{path} cannot be read as Parquet with a column of pictures ({', '.join(BODIES)}); repair it or take it out "
            "of the folder"
        )
    return column


def _parquet(path: Path, base: Path, column: str) -> Iterator[Sample]:
    number = 0
    for batch in pq.ParquetFile(path).iter_batches(64):
        for row in batch.to_pylist():
            body = row.pop(column)
            name = ""
            if isinstance(body, dict):
                name, body = Path(str(body.get("path") or "")).stem, body.get("bytes")
            yield _said(row, f"{_local(path, base)}#{number}", name, body)
            number += 1
