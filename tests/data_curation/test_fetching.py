"""Retries, shares and ends of a shard; and the whole way through a server that behaves badly."""

import http.server
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from data_curation import fetch_process
from data_curation.config import DownloadConfig, ListSource
from data_curation.download import PLAN, download, is_whole, keep_plan
from data_curation.fetch_process import by_turns, fetch_rows, watchdog, worth_retrying, write_shard
from data_curation.manifest import KEEP, ROWS_SCHEMA, Row, read_manifest, write_table
from data_curation.sources import read_source
from infra.errors import DataRefused
from infra.stages import StageContext


def failed(reason: str, retry_after: str | None = None) -> Row:
    return {"decision": "error", "reasons": [reason], "retry_after": retry_after, "fetch_failed": True}


class FakeCollector:
    def __init__(self) -> None:
        self.verdicts: dict[str, Row] = {}


def test_only_failures_that_may_pass_are_tried_again_and_each_url_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[list[str]] = []
    waits: list[float] = []
    answers = {
        "http://a.org/gone": [failed("http_404")], "http://a.org/busy": [failed("http_503", "7"), {"decision": KEEP, "reasons": []}],
        "http://a.org/dead": [failed("timeout")] * 3, "http://a.org/much": [failed("http_429", "999")],
        "http://a.org/bad": [{"decision": "error", "reasons": ["truncated"], "fetch_failed": False}],
    }  # fmt: skip

    def fetch(urls: Sequence[str], config: DownloadConfig, collector: FakeCollector) -> None:
        rounds.append(sorted(urls))
        for url in urls:
            collector.verdicts[url] = answers[url].pop(0)

    monkeypatch.setattr(fetch_process, "fetch_web", fetch)
    monkeypatch.setattr(fetch_process.time, "sleep", waits.append)
    rows = [{"row_id": str(i), "url": url} for i, url in enumerate([*answers, "http://a.org/gone ", "nonsense", None])]
    found = fetch_rows(rows, DownloadConfig(retries=2), FakeCollector(), time.monotonic() + 1_000)  # type: ignore[arg-type]
    assert rounds == [sorted(answers), ["http://a.org/busy", "http://a.org/dead"], ["http://a.org/dead"]]
    assert waits[0] == 7.0
    assert 1.0 <= waits[1] <= 3.0
    assert len(found) == len(rows)
    assert [found[str(i)]["reasons"] for i in range(8)] == [
        ["http_404"], [], ["timeout"], ["http_429"], ["truncated"], ["http_404"], ["bad_url"], ["bad_url"],
    ]  # fmt: skip


def test_no_retry_starts_after_the_shard_ends() -> None:
    verdicts = {"u": failed("timeout")}
    assert worth_retrying(verdicts, ["u"], 1.0, DownloadConfig()) == (["u"], 1.0)
    assert worth_retrying({"u": failed("bad_url")}, ["u"], 1.0, DownloadConfig())[0] == []


def test_a_hanging_shard_is_ended_with_what_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anew = threading.Event()
    monkeypatch.setattr(fetch_process.os, "execv", lambda *_: anew.set())
    collector = FakeCollector()
    collector.verdicts["http://a.org/1"] = {"decision": KEEP, "reasons": []}
    rows = [{"row_id": str(i), "url": url} for i, url in enumerate(["http://a.org/1", "http://a.org/2", "nonsense"])]
    watchdog(0.01, rows, collector, tmp_path / "rows-00000.parquet")  # type: ignore[arg-type]
    assert anew.wait(20)
    assert [row["reasons"] for row in read_manifest(tmp_path)] == [[], ["shard_deadline"], ["bad_url"]]


def test_hosts_take_turns() -> None:
    urls = [f"http://a.org/{i}" for i in range(3)] + ["http://b.org/0"]
    assert by_turns(urls) == ["http://a.org/0", "http://b.org/0", "http://a.org/1", "http://a.org/2"]


def test_damaged_shards_and_those_of_another_plan_are_not_used(tmp_path: Path) -> None:
    shard = tmp_path / "scratch" / "rows-00000.parquet"
    shard.parent.mkdir()
    write_shard([{"row_id": "a"}, {"row_id": "b"}], {}, "lost", shard)
    assert is_whole(shard, 2)
    assert not is_whole(shard, 3)
    assert not shard.exists()
    shard.write_bytes(b"PAR1")
    assert not is_whole(shard, 2)
    source = tmp_path / "source"
    source.mkdir()
    write_table([{"row_id": "a", "url": "http://a.org/"}], ROWS_SCHEMA, source / "urls.parquet")
    keep_plan(DownloadConfig(), source, shard.parent)
    shard.write_bytes(b"kept")
    keep_plan(DownloadConfig(processes=4), source, shard.parent)  # how many fetch does not change what is fetched
    assert shard.exists()
    keep_plan(DownloadConfig(max_bytes=2_000), source, shard.parent)
    assert not shard.exists()
    shard.write_bytes(b"kept")
    write_table([{"row_id": "a", "url": "http://b.org/"}], ROWS_SCHEMA, source / "urls.parquet")
    keep_plan(DownloadConfig(max_bytes=2_000), source, shard.parent)
    assert [path.name for path in shard.parent.iterdir()] == [PLAN]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (80, 80), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Web(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        status, headers, body = 200, dict[str, str](), png(len(self.path))
        match self.path.split("?")[0]:
            case "/robots.txt":
                body = b"User-agent: *\nDisallow: /private\n"
            case "/drip.png":
                self.send_response(200)
                self.end_headers()
                try:
                    for _ in range(200):
                        self.wfile.write(b"x")
                        time.sleep(0.05)
                except OSError:
                    return
            case "/busy.png" if self.asked[self.path] == 1:
                status, headers = 503, {"Retry-After": "0"}
            case "/moved.png":
                status, headers = 301, {"Location": "/fine.png"}
            case "/optout.png":
                headers = {"X-Robots-Tag": "max-image-preview: large, noai"}
            case "/hop.png":
                status, headers = 302, {"Location": "/fine.png", "TDM-Reservation": "1"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    Web.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_site_that_behaves_badly(tmp_path: Path, site: str, context: Callable[..., StageContext]) -> None:
    expected: dict[str, tuple[str, Any]] = {
        "/fine.png": ("keep", []), "/drip.png": ("error", ["timeout"]), "/busy.png": ("keep", []),
        "/moved.png": ("keep", []), "/optout.png": ("drop", ["opted_out"]), "/hop.png": ("drop", ["opted_out"]),
        "/private/x.png": ("drop", ["opted_out"]), "/a,b é.png": ("keep", []),
    }  # fmt: skip
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f" {site}{path} " for path in [*expected, "/fine.png"]))
    read_source(ListSource(path=listed), context(tmp_path, "source"))
    config = DownloadConfig(
        allow_private=["127.0.0.1"], deadline_seconds=1, backoff_seconds=0.1, shard_rows=20, processes=1
    )
    facts = download(config, context(tmp_path, "download", source="source"))
    rows = read_manifest(tmp_path / "download")
    assert {row["url"].removeprefix(site): (row["decision"], row["reasons"]) for row in rows} == expected
    assert facts["received"] == 9 == facts["kept"] + facts["errored"] + sum(facts["dropped"].values())
    assert Web.asked["/busy.png"] == Web.asked["/drip.png"] == 2
    assert Web.asked["/robots.txt"] == Web.asked["/optout.png"] == 1
    assert Web.asked["/fine.png"] == 2  # once for two rows, once at the end of /moved.png
    assert not Web.asked["/private/x.png"]
    by_path = {row["url"].removeprefix(site): row for row in rows}
    assert by_path["/moved.png"]["final_url"] == f"{site}/fine.png"
    assert "TDM-Reservation" in by_path["/hop.png"]["detail"]
    assert by_path["/busy.png"]["http_status"] == 200


@pytest.mark.slow
def test_a_shard_ends_at_its_deadline_and_a_run_without_pictures_is_refused(
    tmp_path: Path, site: str, context: Callable[..., StageContext]
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f"{site}/drip.png?{i}" for i in range(40)))
    Web.asked.clear()
    read_source(ListSource(path=listed), context(tmp_path, "source"))
    config = DownloadConfig(
        allow_private=["127.0.0.0/8"], shard_seconds=2, deadline_seconds=60, per_host=2, processes=1, robots_txt=False
    )
    began = time.monotonic()
    with pytest.raises(DataRefused, match="none of 40 rows gave a picture") as caught:
        download(config, context(tmp_path, "download", source="source"))
    assert caught.value.exit_code == 3
    assert time.monotonic() - began < 60
    assert Counter(row["reasons"][0] for row in read_manifest(tmp_path / "download")) == {"shard_deadline": 40}
