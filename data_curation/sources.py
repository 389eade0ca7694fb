"""Sources of one's own: a URL list (Parquet, CSV, JSONL, text) or a folder of pictures with optional .txt captions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from data_curation.config import FolderSource, ListSource
from data_curation.demo_web import HOST
from data_curation.manifest import SOURCE_SCHEMA, Row, write_table
from infra.errors import ConfigError, DataRefused
from infra.local_files import fingerprint

if TYPE_CHECKING:
    from infra.stages import StageContext

TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".avif": "image/avif"}
WEB_SCHEMA = pa.schema(
    [("path", pa.string()), ("body", pa.binary()), ("status", pa.int32()), ("content_type", pa.string())]
)


def read_source(config: ListSource | FolderSource, ctx: StageContext) -> dict[str, Any]:
    """Write urls.parquet; for a folder also web.parquet, whose pictures go the same way as downloaded ones."""
    if not config.path.expanduser().exists():
        raise ConfigError(f"data.source.path={config.path} does not exist; give a URL list or a folder of pictures")
    if config.fingerprint not in (None, fingerprint(config.path)):
        raise DataRefused(f"source {config.path} changed since the run was planned; start a new run to plan with it")
    rows = _list_rows(config) if isinstance(config, ListSource) else _folder_rows(config, ctx.out)
    if not rows:
        raise DataRefused(f"source {config.path} has no pictures or URLs; supported files: {', '.join(sorted(TYPES))}")
    write_table(rows, SOURCE_SCHEMA, ctx.out / "urls.parquet")
    return {"received": len(rows)}


def _row(ordinal: int, url: str, short: str, long: str, licence: str, domain: str) -> Row:
    row_id = hashlib.sha256(f"{ordinal}\n{url}".encode()).hexdigest()[:32]
    return {
        "row_id": row_id, "url": url, "caption_short": short, "caption_long": long or short,
        "licence": licence, "domain": domain, "ordinal": ordinal,
    }  # fmt: skip


def _list_rows(config: ListSource) -> list[Row]:
    path = config.path.expanduser()
    try:
        table = _read_table(path, config.url_column)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataRefused(f"source {path} cannot be read: {error}; repair it or give another list") from error
    if config.url_column not in table.column_names:
        raise ConfigError(
            f"source {path} has no column {config.url_column!r}, only {table.column_names}; set url_column"
        )

    def column(name: str | None) -> list[str]:
        known = name is not None and name in table.column_names
        return [str(v or "") for v in table[name].to_pylist()] if known else [""] * len(table)

    urls, short = column(config.url_column), column(config.caption_column)
    long, licence = column(config.long_caption_column), column(config.licence_column)
    number = len(urls) if config.limit is None else min(config.limit, len(urls))
    return [_row(i, urls[i], short[i], long[i], licence[i], config.domain) for i in range(number)]


def _read_table(path: Path, url_column: str) -> pa.Table:
    match path.suffix.lower():
        case ".parquet":
            return pq.read_table(path)
        case ".csv":
            return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
        case ".jsonl" | ".json":
            return pyarrow.json.read_json(path)
        case ".txt":
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            return pa.table({url_column: pa.array([line for line in lines if line], pa.string())})
        case other:
            raise ConfigError(f"source {path} ends with {other!r}; give .parquet, .csv, .jsonl or .txt")


def _folder_rows(config: FolderSource, out: Path) -> list[Row]:
    folder = config.path.expanduser()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TYPES and path.is_file())
    rows, web = [], []
    for ordinal, path in enumerate(files):
        name = f"/{ordinal:06d}{path.suffix.lower()}"
        text = path.with_suffix(".txt")
        spoken = path.stem.replace("_", " ").replace("-", " ") if config.caption_from_name else ""
        caption = text.read_text().strip() if text.exists() else spoken
        rows.append(_row(ordinal, f"http://{HOST}{name}", caption, "", "", config.domain))
        web.append({"path": name, "body": path.read_bytes(), "status": 200, "content_type": TYPES[path.suffix.lower()]})
    write_table(web, WEB_SCHEMA, out / "web.parquet")
    return rows
