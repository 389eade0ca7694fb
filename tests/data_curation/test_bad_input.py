"""Bad input gets an answer that names the thing, the value, the limit and what to do."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation.config import DataConfig, DownloadConfig, FolderSource, ListSource
from data_curation.download import download
from data_curation.filter_config import QualityConfig
from data_curation.layouts import look
from data_curation.manifest import read_manifest, write_manifest
from data_curation.sources import read_source
from data_curation.urls import BadUrl, fetchable
from infra.config import parse
from infra.errors import ConfigError, DataRefused, LifecycleError
from infra.stages import Resources, StageContext
from infra.storage import open_store
from tasks.catalog import StageFunction, spec_of
from tasks.stage import job_of, perform

Make = Callable[..., StageContext]
A = "http://a.org/"

LISTS: dict[str, tuple[str, bytes | pa.Table, str]] = {
    "missing column": ("x.csv", b"address\nhttp://a.org/\n", r"no column 'url', only \['address'\]; set url_column"),
    "nested": ("x.parquet", pa.table({"url": [[A]]}), "column 'url' is list.*text is needed; convert it"),
    "binary": ("x.parquet", pa.table({"url": [A.encode()]}), "column 'url' is binary, text is needed; convert it"),
    "caption of wrong type": (
        "x.parquet", pa.table({"url": [A], "caption": [{"a": 1}]}), "column 'caption' is struct.*text is needed",
    ),
    "empty text": ("x.txt", b"\n\n", "list is empty; give one with a URL a row"),
    "header alone": ("x.csv", b"url,caption\n", "list is empty; give one with a URL a row"),
    "no rows": ("x.parquet", pa.table({"url": pa.array([], pa.string())}), "list is empty; give one"),
    "0 bytes, csv": ("x.csv", b"", r"x\.csv cannot be read.*repair it or give another list"),
    "0 bytes, tsv": ("x.tsv", b"", r"x\.tsv cannot be read.*repair it or give another list"),
    "0 bytes, jsonl": ("x.jsonl", b"", r"x\.jsonl cannot be read.*repair it or give another list"),
    "0 bytes, parquet": ("x.parquet", b"", r"x\.parquet cannot be read.*repair it or give another list"),
    "0 bytes, txt": ("x.txt", b"", "list is empty"),
    "commas without quotes": ("x.csv", b"url,caption\nhttp://a.org,x,y,z\n", "cannot be read.*repair"),
    "cut off": ("x.jsonl", b'{"url": "http://a.org/"}\n{"url": ', "cannot be read.*repair"),
    "mixed types": ("x.jsonl", b'{"url": "http://a.org/"}\n{"url": {"x": 1}}\n', "cannot be read.*repair"),
    "not UTF-8": ("x.txt", b"http://a.org/\xff\n", "cannot be read.*repair"),
    "another format": ("x.xml", b"<x/>", "ends with '.xml'; give .parquet, .csv, .tsv, .jsonl or .txt"),
}  # fmt: skip


def put(path: Path, content: bytes | pa.Table) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content, path)
    return path


@pytest.mark.parametrize("case", LISTS)
def test_lists(tmp_path: Path, context: Make, case: str) -> None:
    name, content, words = LISTS[case]
    path = put(tmp_path / name, content)
    with pytest.raises((ConfigError, DataRefused), match=words):
        read_source(ListSource(path=path), context(tmp_path, "source"))


def test_repeated_urls_are_rows_and_said_aloud(tmp_path: Path, context: Make, caplog: pytest.LogCaptureFixture) -> None:
    path = put(tmp_path / "x.txt", f"{A}\n{A}\n{A}b\n".encode())
    assert read_source(ListSource(path=path), context(tmp_path, "source")) == {"received": 3, "repeated_urls": 1}
    assert "repeats 1 URLs" in caplog.text


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "empty"), ("  ", "empty"), ("http://a.org/\x07b", "control character inside"), ("a.org/x", "scheme ''"),
        ("http://a b.org/", "no host"), ("http://", "no host"), ("javascript:alert(1)", "only http and https"),
        ("http://a.org/" + "x" * 9_000, "9013 characters, limit 8000"), ("http://me:pw@a.org/", "remove them"),
        ("http://[::1", "Invalid IPv6"), ("http://a.org:99999/", "out of range"),
    ],
)  # fmt: skip
def test_urls_that_cannot_be_asked_for(raw: str | None, words: str) -> None:
    with pytest.raises(BadUrl, match=words):
        fetchable(raw)


@pytest.mark.parametrize(
    ("raw", "url"),
    [
        ("http://a.org/a,b.png", "http://a.org/a,b.png"), (" http://a.org/a b.png\t", "http://a.org/a%20b.png"),
        ("http://bücher.org/ü.png?ä=1", "http://xn--bcher-kva.org/%C3%BC.png?%C3%A4=1"),
    ],
)  # fmt: skip
def test_commas_unicode_and_whitespace_in_urls_are_understood(raw: str, url: str) -> None:
    assert fetchable(raw) == url


FOLDERS: dict[str, tuple[dict[str, bytes | pa.Table], dict[str, Any], str]] = {
    "nothing in it": ({}, {}, "Looked for: pictures .*Found: no files in 0 files. Do: give the folder"),
    "no pictures": (
        {f"{i}.doc": b"x" for i in range(300)}, {},
        r"Looked for: pictures .*Found: 300 \.doc in 300 files.* Do: give the folder",
    ),
    "a list instead": ({"x.csv": b"url\nhttp://a.org/\n"}, {}, "set data.source.kind=list"),
    "mixed schemas": (
        {"a.parquet": pa.table({"jpg": [b"x"]}), "b.parquet": pa.table({"text": ["x"]})}, {},
        r"b\.parquet cannot be read as Parquet with a column of pictures.*take it out of the folder",
    ),
    "0 bytes, parquet": (
        {"a.parquet": pa.table({"jpg": [b"x"]}), "b.parquet": b""}, {}, r"b\.parquet cannot be read as Parquet",
    ),
    "0 bytes, tar": ({"a.tar": b""}, {}, r"a\.tar cannot be read: .*repair it or take it out of the folder"),
    "no metadata": ({"a.png": b"x"}, {"layout": "imagefolder"}, "has no metadata.jsonl.* or set layout to pairs"),
    "no file_name": (
        {"a.png": b"x", "metadata.csv": b"name\na.png\n"}, {}, r"no column file_name, only \['name'\]; name the pictures",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path: Path, context: Make, case: str) -> None:
    files, settings, words = FOLDERS[case]
    data = tmp_path / "data"
    data.mkdir()
    for name, content in files.items():
        put(data / name, content)
    began = time.monotonic()
    with pytest.raises((ConfigError, DataRefused), match=words):
        read_source(FolderSource(path=data, **settings), context(tmp_path, "source"))
    assert time.monotonic() - began < 5
    if case == "no pictures":
        with pytest.raises(DataRefused, match=words):
            look(str(data))


def test_an_empty_picture_is_a_row_with_its_reason(tmp_path: Path, context: Make) -> None:
    (tmp_path / "data").mkdir()
    put(tmp_path / "data" / "a.png", b"")
    read_source(FolderSource(path=tmp_path / "data"), context(tmp_path, "source"))
    with pytest.raises(DataRefused, match="empty"):
        download(DownloadConfig(shard_rows=10), context(tmp_path, "download", source="source"))


@pytest.mark.parametrize("source", [ListSource, FolderSource])
def test_a_path_with_nothing_there(tmp_path: Path, context: Make, source: Any) -> None:
    with pytest.raises(ConfigError, match=r"missing.csv does not exist; give a URL list or a folder of pictures"):
        read_source(source(path=tmp_path / "missing.csv"), context(tmp_path, "source"))


def test_an_s3_path_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="s3://bucket/list.csv cannot be read: .*check the address"):
        ListSource(path="s3://bucket/list.csv")
    assert time.monotonic() - began < 30
    with pytest.raises(ConfigError, match="names no object; write s3://bucket/list.parquet"):
        ListSource(path="s3://bucket")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"quality": {"max_blur": 1.5}}, r"quality.max_blur = 1.5: input should be less than or equal to 1"),
        ({"quality": {"min_jpeg_quality": -1}}, r"quality.min_jpeg_quality = -1: .*greater than or equal to 0"),
        ({"quality": {"max_aspect": "wide"}}, r"quality.max_aspect = 'wide': .*valid number"),
        ({"dedup": {"max_distance": 900}}, r"dedup.max_distance = 900: .*less than or equal to 200"),
        ({"safety": {"max_nsfw": float("nan")}}, r"safety.max_nsfw = nan: .*"),
        ({"buckets": {"resolutions": []}}, r"buckets.resolutions = \[\]: .*at least 1 item"),
        ({"quality": {"max_blurr": 0.5}}, r"quality.max_blurr: unknown key; did you mean 'max_blur'\?"),
        ({"download": {"shard_rows": 1}}, r"download.shard_rows = 1: .*greater than or equal to 10"),
    ],
)  # fmt: skip
def test_thresholds_out_of_range(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(DataConfig, setting, "preset.yaml")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk(tmp_path: Path) -> None:
    """/dev/full answers the real write with the kernel's own ENOSPC."""

    def on_a_full_disk(config: QualityConfig, ctx: StageContext) -> dict[str, Any]:
        (ctx.out / "manifest.parquet").symlink_to("/dev/full")
        write_manifest([{"row_id": "a", "decision": "keep"}], ctx.out)
        return {"rows": len(read_manifest(ctx.out))}

    store = open_store(tmp_path / "root")
    job = job_of(spec_of("quality", "filter_quality", QualityConfig()), store, {}, Resources())
    with pytest.raises(LifecycleError, match="'quality' stopped: the disk under .*root.* is full; free some space"):
        perform(job, store, catalog=lambda name: StageFunction(QualityConfig, on_a_full_disk))
    assert store.find("quality", job.key) is None
