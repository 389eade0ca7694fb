"""One download process: `python -m data_curation.fetch_process spec.json` runs img2dataset's downloader over its shards.

img2dataset takes over signals and cannot run off the main thread, so it gets a process of its own. We hand its
Downloader our shards one at a time and take the bytes from it before it would resize or write them: its incremental
mode keys on shard numbers and its writers lose rows.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_curation.config import DownloadConfig
from data_curation.decode import inspect
from data_curation.guarded_web import install_guard
from data_curation.manifest import DROP, ERROR, KEEP, ROWS_SCHEMA, Row, write_table

log = logging.getLogger(__name__)
OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex")
DROPPED = {"oversize", "opted_out"}  # sound answers that we do not want; everything else is an error
PATTERNS = (
    (r"HTTP Error (\d+)", r"http_\1"), (r"X-Robots-Tag", "opted_out"),
    (r"(?:<urlopen error )?(refused_address|unknown_host|oversize|truncated|timeout): .*", r"\1"),
    (r"timed out", "timeout"), (r"unknown url type|unknown_open|no host given|nonnumeric port|can't contain control", "bad_url"),
    (r"getaddrinfo|Name or service|No address|Temporary failure in name", "unknown_host"),
)  # fmt: skip


def classify(message: str) -> str:
    """The reason for one of img2dataset's error texts."""
    for pattern, reason in PATTERNS:
        if found := re.search(pattern, message):
            return found.expand(reason) if "\\" in reason else reason
    return "connection_failed"


class Collector:
    """Stands where img2dataset expects a sample writer: keeps each body's verdict under its row id."""

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self.verdicts: dict[str, Row] = {}

    def __call__(self, *_: object) -> Collector:
        """img2dataset constructs its writer with six arguments that we do not need."""
        return self

    def write(self, body: bytes | None, _key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """Judge one answer."""
        self.verdicts[meta["row_id"]] = judge(body, meta["error_message"], self._config)

    def close(self) -> None:
        """Nothing is open."""


def judge(body: bytes | None, error: str | None, config: DownloadConfig) -> Row:
    """Manifest fields of one answer."""
    if body is None:
        reason = classify(error or "")
        return {"decision": DROP if reason in DROPPED else ERROR, "reasons": [reason]}
    found = inspect(body, config.max_pixels)
    decision = KEEP if found.reason is None else DROP if found.reason in DROPPED else ERROR
    return {
        "image": found.image, "sha256_raw": found.sha256, "num_bytes": found.num_bytes, "mime": found.mime,
        "width": found.width, "height": found.height, "decision": decision,
        "reasons": [found.reason] if found.reason else [],
    }  # fmt: skip


def fetch_web(rows: list[Row], config: DownloadConfig) -> dict[str, Row]:
    """Verdicts of the rows' URLs, fetched by img2dataset on threads."""
    from img2dataset.downloader import Downloader

    collector = Collector(config)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.arrow"
        table = pa.table({"url": [row["url"] or "" for row in rows], "row_id": [row["row_id"] for row in rows]})
        with pa.ipc.new_file(str(shard), table.schema) as writer:
            writer.write_table(table)
        downloader = Downloader(
            sample_writer_class=collector, resizer=lambda stream, _: (stream.read(), None, None, None, None, None),
            thread_count=config.threads, save_caption=False, extract_exif=False, output_folder=folder,
            column_list=["url", "row_id"], timeout=config.timeout_seconds, number_sample_per_shard=max(len(rows), 2),
            oom_shard_count=5, compute_hash=None, verify_hash_type=None, encode_format="jpg", retries=config.retries,
            user_agent_token=config.user_agent, disallowed_header_directives=OPT_OUT,
        )  # fmt: skip
        downloader.download_shard((0, str(shard)))
    return collector.verdicts


def main(spec_path: Path) -> None:
    """Fetch every shard of the spec that is not there yet; a shard is there when its file has its final name."""
    spec = json.loads(spec_path.read_text())
    config = DownloadConfig.model_validate(spec["config"])
    install_guard(spec["pins"], config.allow_private, config.max_bytes, config.deadline_seconds, config.user_agent)
    parent = os.getppid()
    urls = pq.read_table(spec["urls"])
    for start, target in spec["shards"]:
        if os.getppid() != parent:
            raise SystemExit("the download stage is gone")
        rows = urls.slice(start, config.shard_rows).to_pylist()
        verdicts = fetch_web(rows, config)
        lost = {"decision": ERROR, "reasons": ["lost_by_downloader"]}
        partial = Path(target).with_suffix(".part")
        write_table([row | verdicts.get(row["row_id"], lost) for row in rows], ROWS_SCHEMA, partial)
        partial.rename(target)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]))
