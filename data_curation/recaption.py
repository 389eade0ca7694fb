"""Recaptioning: long captions written anew, each with who wrote it and what stood there before (DALL-E 3 report, 2023)."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_curation.captioners import Subject, captioner
from data_curation.decode import open_picture
from data_curation.filter_config import RecaptionConfig
from data_curation.manifest import KEEP, Row, funnel, pictures, read_manifest, shards, write_manifest

if TYPE_CHECKING:
    from infra.stages import StageContext

Known = dict[str, tuple[str, str | None]]  # row_id -> short caption, metadata as JSON
Written = tuple[str, list[tuple[str, str]]]  # name of the captioner, (row_id, caption)


def recaption(config: RecaptionConfig, ctx: StageContext) -> dict[str, Any]:
    """Write caption_long of every kept row that needs one; no row is dropped."""
    rows = read_manifest(ctx.inputs["rows"])
    wanted = {row["row_id"]: row for row in rows if row["decision"] == KEEP and (config.rows == "all" or _lacks(row))}
    known: Known = {row_id: (row["caption_short"] or "", row["metadata"]) for row_id, row in wanted.items()}
    items = [(path, known, config) for path in shards(ctx.inputs["images"])]
    written, silent, name = 0, 0, ""
    for found_name, captions in ctx.fan_out(caption_shard, items):
        name = found_name or name
        for row_id, caption in captions:
            row = wanted[row_id]
            if not caption:
                silent += 1
                continue
            row["caption_long_before"], row["caption_long_model"] = row["caption_long"], found_name
            row["caption_long"] = caption
            written += 1
    write_manifest(rows, ctx.out)
    return funnel(rows, len(rows)) | {"captioner": name, "written": written, "nothing_to_say": silent}


def _lacks(row: Row) -> bool:
    return not row["caption_long"] or row["caption_long"] == row["caption_short"]


def caption_shard(item: tuple[Path, Known, RecaptionConfig]) -> Written:
    """(row_id, caption) of a shard's wanted pictures."""
    shard, known, config = item
    stored, written, name = pictures(shard, set(known)), list[tuple[str, str]](), ""
    write = captioner(config.captioner)
    while part := list(islice(stored, write.batch)):
        subjects = [
            Subject(known[row_id][0], json.loads(known[row_id][1] or "{}"), partial(open_picture, data))
            for row_id, data in part
        ]
        name = write.name
        written += zip([row_id for row_id, _ in part], write(subjects), strict=True)
    return name, written
