"""What lies at a path? Looks at names (and Parquet schemas), never at pictures, and says aloud what it found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_curation.url_lists import read_list
from infra.errors import DataRefused

PICTURES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".jxl",
})  # fmt: skip  # what is taken for a picture; those that are not allowed get a reason, not silence
LISTS = frozenset({".parquet", ".csv", ".tsv", ".jsonl", ".json", ".txt"})
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
URLS = ("url", "image_url", "img_url", "image_link", "link", "src")
CAPTIONS = ("caption", "text", "caption_short", "alt", "alt_text", "title", "prompt", "description")
LONG_CAPTIONS = ("caption_long", "long_caption", "dense_caption", "detailed_caption")
LICENCES = ("licence", "license")
METADATA_NAMES = ("title", "alt", "alt_text", "tags", "keywords", "page_title", "description", "author", "place")
BODIES = ("jpg", "png", "webp", "image", "img", "bytes", "image_bytes")


@dataclass(frozen=True)
class Found:
    """What a source is: settings for `data.source`, and the words that say so."""

    settings: dict[str, Any]
    says: str


def look(path: str) -> Found:
    """Find out how the data at a path is laid out; DataRefused says what was looked for and what was found instead."""
    if path.startswith("s3://"):
        return Found({"kind": "list", "path": path}, f"{path}: a URL list in S3, with the columns url and caption")
    place = Path(path).expanduser()
    if place.is_file():
        return _look_at_file(place)
    if not place.is_dir():
        raise DataRefused(f"{path} does not exist; give a folder of pictures, tars, or a URL list")
    files = list(walk(place))
    kinds = Counter(file.suffix.lower() for file in files)
    pictures = sum(kinds[suffix] for suffix in PICTURES)
    images = [file for file in files if file.suffix.lower() == ".parquet" and body_column(file)]
    settings: dict[str, Any] = {"kind": "folder", "path": str(place)}
    if kinds[".tar"]:
        made = " as img2dataset writes them" if any(file.name.endswith("_stats.json") for file in files) else ""
        return Found(settings | {"layout": "webdataset"}, f"{place}: {kinds['.tar']} WebDataset tars{made}")
    if pictures:
        return _look_at_pictures(place, files, pictures, settings)
    if images:
        said = f"{place}: {len(images)} Parquet files with pictures in column {body_column(images[0])!r}"
        return Found(settings | {"layout": "parquet"}, said)
    lists = [file for file in files if _bare_suffix(file) in LISTS]
    if len(lists) == 1:
        return _look_at_file(lists[0])
    raise DataRefused(nothing(place, files, kinds))


def _look_at_pictures(place: Path, files: list[Path], pictures: int, settings: dict[str, Any]) -> Found:
    if any(file.parent == place and file.name in METADATA for file in files):
        name = next(file.name for file in files if file.parent == place and file.name in METADATA)
        said = f"{place}: a Hugging Face imagefolder, {pictures} pictures, captions in {name}"
        return Found(settings | {"layout": "imagefolder"}, said)
    stems = {file.with_suffix("") for file in files if file.suffix.lower() in (".txt", ".json")}
    captioned = sum(file.suffix.lower() in PICTURES and file.with_suffix("") in stems for file in files)
    rest = "" if captioned == pictures else f"; {pictures - captioned} without, their file names are the captions"
    said = f"{place}: {pictures} pictures, {captioned} with a caption in a .txt or .json beside them{rest}"
    return Found(settings | {"layout": "pairs"}, said)


def _look_at_file(file: Path) -> Found:
    suffix = _bare_suffix(file)
    if suffix == ".tar":
        return Found({"kind": "folder", "path": str(file), "layout": "webdataset"}, f"{file}: one WebDataset tar")
    if suffix == ".parquet" and (column := body_column(file)):
        said = f"{file}: a Parquet file with pictures in column {column!r}"
        return Found({"kind": "folder", "path": str(file), "layout": "parquet"}, said)
    if suffix not in LISTS:
        raise DataRefused(f"{file} is neither a URL list ({', '.join(sorted(LISTS))}) nor a .tar; give one of these")
    columns = ["url"] if suffix == ".txt" else read_list(file, "url").column_names
    settings: dict[str, Any] = {"kind": "list", "path": str(file)}
    url = pick(columns, URLS)
    if url is None:
        raise DataRefused(f"{file} has no column for URLs among {columns}; call one {URLS[0]!r} or set url_column")
    settings["url_column"], settings["caption_column"] = url, pick(columns, CAPTIONS)
    settings["long_caption_column"], settings["licence_column"] = pick(columns, LONG_CAPTIONS), pick(columns, LICENCES)
    settings["metadata_columns"] = tuple(name for name in columns if name.lower() in METADATA_NAMES)
    caption = settings["caption_column"]
    said = f"{file}: a URL list, URLs in {url!r}, " + (f"captions in {caption!r}" if caption else "no captions")
    return Found(settings, said)


def pick(columns: list[str], wanted: tuple[str, ...]) -> str | None:
    """The column with the first of the wanted names, upper or lower case."""
    by_name = {name.lower(): name for name in reversed(columns)}
    return next((by_name[name] for name in wanted if name in by_name), None)


def body_column(file: Path) -> str | None:
    """The column of a Parquet file that holds encoded pictures: binary, or Hugging Face's struct of bytes and path."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return None
    fitting = [
        field.name for field in schema
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]  # fmt: skip
    return pick(fitting, BODIES)


def walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, in order of name; hidden ones and links are left out."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def nothing(place: Path, files: list[Path], kinds: Counter[str]) -> str:
    """What was looked for, what was found, what to do."""
    found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in kinds.most_common(6)) or "no files"
    return (
        f"{place} has no pictures or URLs. Looked for: pictures ({', '.join(sorted(PICTURES)[:8])}, ...), WebDataset tars, "
        f"Parquet files with pictures, or one URL list ({', '.join(sorted(LISTS))}). Found: {found} in {len(files)} files. "
        "Do: give the folder that holds the pictures, or the file of the list itself"
    )


def _bare_suffix(file: Path) -> str:
    return Path(file.stem).suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()
