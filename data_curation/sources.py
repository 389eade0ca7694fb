"""Sources of one's own: URL lists, and pictures on this machine; both become urls.parquet, pictures also bodies/.

The same pictures and captions give the same rows by any route, but for where they came from (url, row_id).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_curation.config import FolderSource, ListSource
from data_curation.demo_web import row_id
from data_curation.known import seen_urls
from data_curation.layouts import look
from data_curation.local_pictures import BODIES
from data_curation.manifest import SOURCE_SCHEMA, Row, write_table
from data_curation.own_data import fingerprint
from data_curation.picture_files import Sample, samples
from data_curation.remote import copy_of
from data_curation.url_lists import read_list
from infra.errors import ConfigError, DataRefused

if TYPE_CHECKING:
    from infra.stages import StageContext

log = logging.getLogger(__name__)
BODY_SCHEMA = pa.schema([("row_id", pa.string()), ("body", pa.binary())])
PART_BYTES, PART_ROWS = 64_000_000, 1_000  # of one file of bodies
LONGEST_TEXT = 4_000  # characters of a metadata value; the rest is cut


def read_source(config: ListSource | FolderSource, ctx: StageContext) -> dict[str, Any]:
    """Write urls.parquet, for pictures also their bodies, which go the same way as downloaded ones."""
    local = not config.path.startswith("s3://")
    if local and not Path(config.path).expanduser().exists():
        raise ConfigError(f"data.source.path={config.path} does not exist; give a URL list or a folder of pictures")
    if local and config.fingerprint not in (None, fingerprint(config.path)):
        raise DataRefused(f"source {config.path} changed since the run was planned; start a new run to plan with it")
    if isinstance(config, FolderSource):
        return _read_pictures(config, ctx)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(config.path).expanduser() if local else copy_of(config.path, Path(folder), config.fingerprint)
        rows = _list_rows(config, path)
    seen = seen_urls(ctx)
    if not rows:
        raise DataRefused(f"source {config.path} has no pictures or URLs: the list is empty; give one with a URL a row")
    new = [row for row in rows if row["url"] not in seen]
    write_table(new, SOURCE_SCHEMA, ctx.out / "urls.parquet")
    repeated = len(rows) - len({row["url"] for row in rows})
    if repeated:
        log.warning(
            "source %s repeats %d URLs; each is a row, and a copy is dropped by its bytes", config.path, repeated
        )
    return (
        {"received": len(new)}
        | ({"seen_before": len(rows) - len(new)} if seen else {})
        | ({"repeated_urls": repeated} if repeated else {})
    )


# --- lists ---


def _list_rows(config: ListSource, path: Path) -> list[Row]:
    table = read_list(path, config.url_column)
    if config.url_column not in table.column_names:
        raise ConfigError(
            f"source {config.path} has no column {config.url_column!r}, only {table.column_names}; set url_column"
        )
    named = [config.caption_column, config.long_caption_column, config.licence_column, *config.metadata_columns]
    for name in {config.url_column, *filter(None, named)} & set(table.column_names):
        if pa.types.is_nested(table.schema.field(name).type) or pa.types.is_binary(table.schema.field(name).type):
            raise DataRefused(
                f"source {config.path}: column {name!r} is {table.schema.field(name).type}, text is needed; convert it"
            )
    table = table if config.limit is None else table.slice(0, config.limit)

    def column(name: str | None) -> list[str]:
        known = name is not None and name in table.column_names
        return [_text(v) for v in table[name].to_pylist()] if known else [""] * len(table)

    urls, short = column(config.url_column), column(config.caption_column)
    long, licence = column(config.long_caption_column), column(config.licence_column)
    extra = {name: column(name) for name in config.metadata_columns if name in table.column_names}
    return [
        _row(
            i, urls[i], short[i], long[i], licence[i], config.domain, {name: texts[i] for name, texts in extra.items()}
        )
        for i in range(len(urls))
    ]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _row(
    ordinal: int, url: str, short: str, long: str, licence: str, domain: str, metadata: dict[str, str]
) -> Row:  # fmt: skip
    told = {name: text[:LONGEST_TEXT] for name, text in metadata.items() if text}
    return {
        "row_id": row_id(url, ordinal), "url": url, "caption_short": short, "caption_long": long or short,
        "licence": licence, "domain": domain, "ordinal": ordinal,
        "metadata": json.dumps(told, sort_keys=True, ensure_ascii=False) if told else None,
    }  # fmt: skip


# --- pictures ---


def _read_pictures(config: FolderSource, ctx: StageContext) -> dict[str, Any]:
    found = look(config.path)
    layout = config.layout if config.layout != "auto" else found.settings.get("layout")
    if layout is None:
        raise DataRefused(
            f"source {config.path} is no folder of pictures but this: {found.says}; set data.source.kind=list"
        )
    log.info("source: %s, read as %s", found.says, layout)
    (ctx.out / BODIES).mkdir()
    rows: list[Row] = []
    seen, old = seen_urls(ctx), 0

    def unseen() -> Iterator[Sample]:
        nonlocal old
        for sample in samples(Path(config.path).expanduser(), layout):
            if sample.url in seen:
                old += 1
            else:
                yield sample

    parts = _parts(unseen(), config, rows)
    for number, part in enumerate(parts):
        write_table(part, BODY_SCHEMA, ctx.out / BODIES / f"part-{number:05d}.parquet")
    if not rows and not old:
        raise DataRefused(f"source {config.path}, read as {layout}, has no pictures; see what `t2i init` says about it")
    write_table(rows, SOURCE_SCHEMA, ctx.out / "urls.parquet")
    return {
        "received": len(rows), "layout": layout,
        "without_caption": sum(not row["caption_short"] for row in rows),
    }  # fmt: skip


def _parts(found: Iterator[Sample], config: FolderSource, rows: list[Row]) -> Iterator[list[Row]]:
    """Bodies in files of bounded size; appends every sample's row to `rows`."""
    part: list[Row] = []
    num_bytes = 0
    for sample in found:
        spoken = sample.name.replace("_", " ").replace("-", " ") if config.caption_from_name else ""
        short = sample.caption or spoken
        rows.append(_row(len(rows), sample.url, short, sample.long, sample.licence, config.domain, sample.metadata))
        part.append({"row_id": rows[-1]["row_id"], "body": sample.body})
        num_bytes += len(sample.body or b"")
        if num_bytes >= PART_BYTES or len(part) >= PART_ROWS:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part
