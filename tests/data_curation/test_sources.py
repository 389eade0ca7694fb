"""Whatever way pictures come, they are found, said aloud, and make the same rows; what is none is refused clearly."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_curation.config import DataConfig, DownloadConfig, FolderSource, ListSource
from data_curation.download import download
from data_curation.layouts import look
from data_curation.manifest import Row, read_manifest
from data_curation.sources import read_source
from infra.errors import DataRefused
from infra.stages import StageContext


def pictures() -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, caption): sound ones of every kind, one turned by EXIF, one broken, one that is not allowed."""
    rng = np.random.default_rng(0)
    found = {}
    for i, (form, suffix) in enumerate(
        [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("AVIF", "avif"), ("GIF", "gif"), ("JPEG", "jpeg")]
    ):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 5 else 1
        file = io.BytesIO()
        options = {"exif": exif} if form == "JPEG" else {}
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(file, form, **options)
        found[f"p{i}.{suffix}"] = file.getvalue(), f"caption, number {i}\nwith a line more"
    found["p6.jpg"] = found["p0.jpg"][0][:2_000], "cut"
    return found


def pairs(folder: Path) -> FolderSource:
    for name, (body, caption) in pictures().items():
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / name).write_bytes(body)
        (folder / "sub" / name).with_suffix(".txt").write_text(caption)
    return FolderSource(path=folder)


def json_pairs(folder: Path) -> FolderSource:
    for name, (body, caption) in pictures().items():
        (folder / name).write_bytes(body)
        (folder / name).with_suffix(".json").write_text(json.dumps({"caption": caption, "width": 3}))
    return FolderSource(path=folder)


def imagefolder(folder: Path) -> FolderSource:
    with (folder / "metadata.jsonl").open("w") as file:
        for name, (body, caption) in pictures().items():
            (folder / name).write_bytes(body)
            file.write(json.dumps({"file_name": name, "text": caption}) + "\n")
    return FolderSource(path=folder)


def webdataset(folder: Path) -> FolderSource:
    items = list(pictures().items())
    for number, part in enumerate((items[:4], items[4:])):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for name, (body, caption) in part:
                for member, data in ((name, body), (f"{name.split('.')[0]}.txt", caption.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo(f"z{number}.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return FolderSource(path=folder)


def img2dataset_parquet(folder: Path) -> FolderSource:
    rows = [{"url": f"http://a.org/{name}", "caption": caption, "key": name, "jpg": body}
            for name, (body, caption) in pictures().items()]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return FolderSource(path=folder)


def hugging_face_parquet(folder: Path) -> FolderSource:
    rows = [{"image": {"bytes": body, "path": name}, "text": caption} for name, (body, caption) in pictures().items()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return FolderSource(path=folder / "train.parquet")


ROUTES: dict[str, tuple[Callable[[Path], FolderSource], str]] = {
    "pairs": (pairs, "7 pictures, 7 with a caption"), "json": (json_pairs, "7 with a caption"),
    "imagefolder": (imagefolder, "imagefolder"), "webdataset": (webdataset, "2 WebDataset tars"),
    "img2dataset": (img2dataset_parquet, "pictures in column 'jpg'"), "hf": (hugging_face_parquet, "pictures in column 'image'"),
}  # fmt: skip
PLACE = {"row_id", "url", "ordinal"}


def content(rows: list[Row]) -> list[str]:
    return sorted(json.dumps({k: v for k, v in row.items() if k not in PLACE}, sort_keys=True) for row in rows)


def test_the_same_pictures_by_any_route_are_the_same_rows(tmp_path: Path, context: Callable[..., StageContext]) -> None:
    found = {}
    for name, (make, said) in ROUTES.items():
        root = tmp_path / name
        (root / "data").mkdir(parents=True)
        config = make(root / "data")
        assert said in look(config.path).says
        read_source(config, context(root, "source"))
        facts = download(DownloadConfig(shard_rows=10), context(root, "download", source="source"))
        assert facts["received"] == 7 == facts["kept"] + facts["errored"] + sum(facts["dropped"].values())
        found[name] = content(read_manifest(root / "download"))
        stored = pq.read_table(root / "download" / "rows-00000.parquet")["image"].to_pylist()
        found[name] += sorted(repr(picture) for picture in stored)
    assert "unsupported_format" in str(found["pairs"])
    assert "truncated" in str(found["pairs"])
    for name in ROUTES:
        assert found[name] == found["pairs"], name


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl", "txt", "csv.gz", "jsonl.gz"])
def test_lists_of_every_form_give_the_same_rows(
    tmp_path: Path, suffix: str, context: Callable[..., StageContext]
) -> None:
    urls = [
        " http://a.org/a,b.png",
        "http://a.org/ü.png",
        "http://a.org/ü.png",
        None if suffix in ("parquet", "jsonl") else "",
    ]
    captions = ['says "so"', "two\nlines", "", "four"]
    table = pa.table({"url": urls, "caption": captions, "tags": ["x"] * 4})
    path = tmp_path / f"list.{suffix}"
    opened: Any = gzip.open if suffix.endswith("gz") else open
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "txt":
        path.write_text("\ufeff" + "\n".join(urls[:3]) + "\n\n")
    else:
        with opened(path, "wt", newline="") as file:
            if "json" in suffix:
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
            else:
                import csv

                writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
                writer.writerow(table.column_names)
                writer.writerows(list(row.values()) for row in table.to_pylist())
    settings = look(str(path)).settings
    ctx = context(tmp_path, "source")
    facts = read_source(ListSource(**settings), ctx)
    rows = pq.read_table(tmp_path / "source" / "urls.parquet").to_pylist()
    assert facts == {"received": 3 if suffix == "txt" else 4, "repeated_urls": 1}
    assert [row["url"].strip() for row in rows[:3]] == [
        "http://a.org/a,b.png",
        "http://a.org/ü.png",
        "http://a.org/ü.png",
    ]
    assert len({row["row_id"] for row in rows}) == len(rows)
    if suffix != "txt":
        assert [row["caption_short"] for row in rows] == captions
        assert rows[0]["metadata"] == '{"tags": "x"}'


def test_odd_folders(tmp_path: Path, context: Callable[..., StageContext]) -> None:
    (tmp_path / "secret.png").write_bytes(next(iter(pictures().values()))[0])
    data = tmp_path / "data"
    data.mkdir()
    (data / "metadata.csv").write_text("file_name,text\n../secret.png,out\ngone.png,away\n,none\na.png,here\n")
    (data / "a.png").write_bytes(pictures()["p1.png"][0])
    os.symlink("/etc/passwd", data / "b.png")
    (data / ".hidden.png").write_bytes(b"x")
    read_source(FolderSource(path=data), context(tmp_path, "source"))
    download(DownloadConfig(shard_rows=10), context(tmp_path, "download", source="source"))
    rows = {row["caption_short"]: row["reasons"] for row in read_manifest(tmp_path / "download")}
    assert rows == {"out": ["no_picture"], "away": ["no_picture"], "none": ["no_picture"], "here": []}
    (data / "broken.tar").write_bytes(b"no tar")
    assert "1 WebDataset tars" in look(str(data)).says
    with pytest.raises(DataRefused, match=r"broken\.tar cannot be read"):
        read_source(FolderSource(path=data), context(tmp_path, "again"))


def test_a_bare_path_is_a_source(tmp_path: Path) -> None:
    assert DataConfig.model_validate({"source": str(tmp_path)}).source.kind == "folder"
    assert DataConfig.model_validate({"source": str(tmp_path / "x.csv")}).source.kind == "list"
    assert DataConfig.model_validate({"source": str(tmp_path / "x.tar")}).source.kind == "folder"
