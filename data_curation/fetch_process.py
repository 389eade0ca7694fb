"""One download process: `python -m data_curation.fetch_process spec.json` runs img2dataset's downloader over its shards.

img2dataset takes over signals and cannot run off the main thread, so it gets a process of its own. We hand its
Downloader our shards one at a time and take the bytes from it before it would resize or write them: its incremental
mode keys on shard numbers, its writers lose rows, and its retries come at once; ours wait, and ask failed URLs only.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from data_curation.config import DownloadConfig
from data_curation.decode import Inspected
from data_curation.decoder import Decoder
from data_curation.guard import Guard
from data_curation.guarded_web import install_guard
from data_curation.manifest import DROP, ERROR, KEEP, ROWS_SCHEMA, Row, write_table
from data_curation.urls import BadUrl, fetchable

log = logging.getLogger(__name__)
DROPPED = {"oversize", "opted_out", "animated", "unsupported_format"}  # sound answers that we do not want
OURS = "refused_address|unknown_host|oversize|truncated|timeout|opted_out|bad_url|shard_deadline"
PATTERNS = (
    (r"HTTP Error (\d+)", r"http_\1"), (rf"^(?:<urlopen error )?({OURS}): ", r"\1"), (r"IncompleteRead", "truncated"),
    (r"timed out", "timeout"), (r"unknown url type|unknown_open|no host given|nonnumeric port|can't contain control", "bad_url"),
    (r"getaddrinfo|Name or service|No address|Temporary failure in name", "unknown_host"),
)  # fmt: skip
TRY_AGAIN = {"timeout", "connection_failed", "truncated", "unknown_host",
             *(f"http_{code}" for code in (408, 425, 429, 500, 502, 503, 504))}  # fmt: skip
STUCK_SECONDS = 30.0  # after its deadline a shard ends by itself within this time, or the watchdog ends it


def classify(message: str) -> str:
    """The reason for one of img2dataset's error texts."""
    for pattern, reason in PATTERNS:
        if found := re.search(pattern, message):
            return found.expand(reason) if "\\" in reason else reason
    return "connection_failed"


class Collector:
    """Stands where img2dataset expects a sample writer: keeps each answer's verdict under its URL."""

    def __init__(self, decoder: Decoder, guard: Guard) -> None:
        self._decoder, self._guard = decoder, guard
        self.verdicts: dict[str, Row] = {}

    def __call__(self, *_: object) -> Collector:
        """img2dataset constructs its writer with six arguments that we do not need."""
        return self

    def write(self, body: bytes | None, _key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """Judge one answer."""
        url, error = meta["url"], meta["error_message"]
        if body is None:
            reason = classify(error or "")
            verdict: Row = {"decision": DROP if reason in DROPPED else ERROR, "reasons": [reason]}
            verdict["detail"] = " ".join((error or "").split())[:300]
        else:
            verdict = verdict_of(self._decoder.inspect(body))
        if (fetch := self._guard.seen.pop(url, None)) is not None:
            verdict["http_status"], verdict["retry_after"] = fetch.status, fetch.retry_after
            verdict["final_url"] = fetch.final_url if fetch.final_url != url else None
        verdict["fetch_failed"] = body is None
        self.verdicts[url] = verdict

    def close(self) -> None:
        """Nothing is open."""


def verdict_of(found: Inspected) -> Row:
    """Manifest fields of one body."""
    decision = KEEP if found.reason is None else DROP if found.reason in DROPPED else ERROR
    return {
        "image": found.image, "sha256_raw": found.sha256, "sha256_stored": found.sha256_stored, "mime": found.mime,
        "num_bytes": found.num_bytes, "width": found.width, "height": found.height, "decision": decision,
        "reasons": [found.reason] if found.reason else [],
    }  # fmt: skip


def fetch_rows(rows: Sequence[Row], config: DownloadConfig, collector: Collector, until: float) -> dict[str, Row]:
    """Verdicts by row id; each distinct URL is asked once, and again only where that may help."""
    asked, _ = by_url(rows)
    pending = by_turns(list(asked))
    for attempt in range(config.retries + 1):
        if attempt:
            wait = config.backoff_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            again, wait = worth_retrying(collector.verdicts, pending, wait, config)
            if not again or time.monotonic() + wait > until:
                break
            time.sleep(wait)
            pending = again
        fetch_web(pending, config, collector)
    return verdicts_so_far(rows, collector)


def by_url(rows: Sequence[Row]) -> tuple[dict[str, list[str]], dict[str, Row]]:
    """URL -> ids of the rows that want it; and the verdicts of rows whose URL cannot be asked for."""
    asked: defaultdict[str, list[str]] = defaultdict(list)
    refused: dict[str, Row] = {}
    for row in rows:
        try:
            asked[fetchable(row["url"])].append(row["row_id"])
        except BadUrl as error:
            refused[row["row_id"]] = {"decision": ERROR, "reasons": ["bad_url"], "detail": str(error)}
    return asked, refused


def verdicts_so_far(rows: Sequence[Row], collector: Collector) -> dict[str, Row]:
    """Verdicts by row id of the rows that have one by now."""
    asked, verdicts = by_url(rows)
    for url in asked.keys() & collector.verdicts.keys():
        verdicts |= dict.fromkeys(asked[url], collector.verdicts[url])
    return verdicts


def worth_retrying(
    verdicts: dict[str, Row], urls: Sequence[str], wait: float, config: DownloadConfig
) -> tuple[list[str], float]:
    """URLs whose failure may pass, and how long to wait: as long as the most patient server asked for."""
    again = []
    for url in urls:
        verdict = verdicts.get(url, {})
        if not verdict.get("fetch_failed") or verdict["reasons"][0] not in TRY_AGAIN:
            continue
        asked = str(verdict.get("retry_after") or "0")
        seconds = float(asked) if re.fullmatch(r"\d{1,9}", asked) else 0.0
        if seconds <= config.longest_wait_seconds:
            again.append(url)
            wait = max(wait, seconds)
    return again, min(wait, config.longest_wait_seconds)


def by_turns(urls: Sequence[str]) -> list[str]:
    """The URLs with their hosts taking turns, so that no host gets all threads at once."""
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        hosts[urlsplit(url).netloc].append(url)
    return [url for turn in zip_longest(*hosts.values()) for url in turn if url is not None]


def fetch_web(urls: Sequence[str], config: DownloadConfig, collector: Collector) -> None:
    """Fetch by img2dataset on threads."""
    from img2dataset.downloader import Downloader

    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.arrow"
        table = pa.table({"url": pa.array(urls, pa.string())})
        with pa.ipc.new_file(str(shard), table.schema) as writer:
            writer.write_table(table)
        downloader = Downloader(
            sample_writer_class=collector, resizer=lambda stream, _: (stream.read(), None, None, None, None, None),
            thread_count=config.threads, save_caption=False, extract_exif=False, output_folder=folder,
            column_list=["url"], timeout=config.timeout_seconds, number_sample_per_shard=max(len(urls), 2),
            oom_shard_count=5, compute_hash=None, verify_hash_type=None, encode_format="jpg", retries=0,
            user_agent_token=config.user_agent, disallowed_header_directives=None,
        )  # fmt: skip
        downloader.download_shard((0, str(shard)))


def write_shard(rows: Sequence[Row], verdicts: dict[str, Row], missing: str, target: Path) -> None:
    """Put a shard in its place: whole, or not at all."""
    lost = {"decision": ERROR, "reasons": [missing]}
    partial = target.with_name(f"{target.stem}.{os.getpid()}.part")
    write_table([row | verdicts.get(row["row_id"], lost) for row in rows], ROWS_SCHEMA, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(target)


def watchdog(seconds: float, rows: Sequence[Row], collector: Collector, target: Path) -> threading.Timer:
    """Ends a shard that hangs where no socket does: writes what has come and starts this process anew."""

    def bark() -> None:
        log.error("%s hangs %.0f s after its deadline; it is ended with what has come", target.name, STUCK_SECONDS)
        write_shard(rows, verdicts_so_far(rows, collector), "shard_deadline", target)
        os.execv(sys.executable, [sys.executable, "-m", "data_curation.fetch_process", *sys.argv[1:]])

    timer = threading.Timer(seconds, bark)
    timer.daemon = True
    timer.start()
    return timer


def main(spec_path: Path) -> None:
    """Fetch every shard of the spec that is not there yet; a shard is there when its file has its final name."""
    import img2dataset.downloader  # noqa: F401 - seconds that no shard should pay for

    spec = json.loads(spec_path.read_text())
    config = DownloadConfig.model_validate(spec["config"])
    guard = install_guard(config, spec["pins"])
    parent = os.getppid()
    urls = pq.read_table(spec["urls"])
    with Decoder(config.max_pixels, config.decode_memory_mb, config.decode_seconds) as decoder:
        for start, name in spec["shards"]:
            if os.getppid() != parent:
                raise SystemExit("the download stage is gone")
            target = Path(name)
            if target.exists():
                continue
            rows = urls.slice(start, config.shard_rows).to_pylist()
            guard.until = time.monotonic() + config.shard_seconds
            collector = Collector(decoder, guard)
            timer = watchdog(config.shard_seconds + STUCK_SECONDS, rows, collector, target)
            verdicts = fetch_rows(rows, config, collector, guard.until)
            timer.cancel()
            write_shard(rows, verdicts, "lost_by_downloader", target)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]))
