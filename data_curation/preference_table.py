"""Rows of a preference table (Pick-a-Pic, HPD): prompt, two pictures, and who was preferred.

Columns are found by the names those data sets use. Pictures are encoded bytes, {bytes: ...} structs, or paths beside the
table. A label is how much the first picture is preferred: 1, 0, or 0.5 for a tie; or the votes of both (HPD).
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from infra.errors import DataRefused

PROMPT = ("prompt", "caption", "text")
FIRST, SECOND = ("jpg_0", "image_0", "image_path_0"), ("jpg_1", "image_1", "image_path_1")
LABEL = ("label_0", "preference", "human_preference")
MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class Compared:
    """One usable comparison: pictures uint8 [S, S, 3], and by how much the winner is preferred, in (0, 1]."""

    prompt: str
    winner: np.ndarray
    loser: np.ndarray
    strength: float


def read_comparisons(table: Path, side: int) -> tuple[list[Compared], dict[str, int]]:
    """Usable rows as squares of `side` px, and how many rows were dropped for which reason."""
    try:
        rows = pq.read_table(table)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataRefused(f"{table} is no Parquet table ({error}); give a Pick-a-Pic or HPD Parquet file") from error
    names = [_column(rows.column_names, group, table) for group in (PROMPT, FIRST, SECOND, LABEL)]
    kept, dropped = list[Compared](), Counter[str]()
    for row in _rows(rows, names):
        found = _compared(row, table.parent, side)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            kept.append(found)
    agreed = without_contradictions(kept)
    if contradicted := len(kept) - len(agreed):
        dropped["contradicted"] = contradicted
    assert len(agreed) + sum(dropped.values()) == rows.num_rows
    return agreed, dict(dropped)


def without_contradictions(rows: list[Compared]) -> list[Compared]:
    """The rows but those whose two pictures also stand the other way round under the same prompt; neither side is believed."""
    keys = [(row.prompt, hash_of(row.winner), hash_of(row.loser)) for row in rows]
    there = set(keys)
    return [row for row, (prompt, won, lost) in zip(rows, keys, strict=True) if (prompt, lost, won) not in there]


def hash_of(picture: np.ndarray) -> str:
    """sha256 of the pixels."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _column(names: list[str], wanted: tuple[str, ...], table: Path) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise DataRefused(f"{table}: none of the columns {list(wanted)}; it has {names}, rename one of them")
    return found


def _rows(table: pa.Table, names: list[str]) -> Iterator[tuple[Any, ...]]:
    for batch in table.select(names).to_batches(max_chunksize=64):
        yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def _compared(row: tuple[Any, ...], folder: Path, side: int) -> Compared | str:
    """The comparison, or the reason why the row is dropped."""
    prompt, first, second, label = row
    if not (prompt or "").strip():
        return "no prompt"
    if isinstance(label, list | tuple) and len(label) == 2:
        label = 0.5 if label[0] == label[1] else float(label[0] > label[1])
    if not isinstance(label, int | float) or not 0 <= label <= 1:
        return "label is no preference"
    if label == 0.5:
        return "tie"
    pictures = [_picture(value, folder) for value in (first, second)]
    if any(picture is None for picture in pictures):
        return "picture missing or broken"
    a, b = (picture for picture in pictures if picture is not None)
    if abs(a.width * b.height - b.width * a.height) * 20 > a.width * b.height:  # 5 %: another bucket
        return "pictures of different shapes"
    x, y = (_square(picture, side) for picture in (a, b))
    if np.array_equal(x, y):
        return "same picture twice"
    winner, loser = (x, y) if label > 0.5 else (y, x)
    return Compared(str(prompt).strip(), winner, loser, 2 * abs(float(label) - 0.5))


def _picture(value: Any, folder: Path) -> Image.Image | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    try:
        if isinstance(data, str):
            path = (folder / data).resolve()
            if not path.is_relative_to(folder.resolve()):
                return None
            data = path.read_bytes()
        if not isinstance(data, bytes):
            return None
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            return None
        return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError):
        return None


def _square(image: Image.Image, side: int) -> np.ndarray:
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cut = image.crop((left, top, left + edge, top + edge))
    return np.asarray(cut.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0))
