"""A folder of one subject's pictures: what is stored, and the answer to everything that cannot be used."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_curation.config import SubjectFolder
from data_curation.decode import open_picture
from data_curation.subject import PICTURES, read_subject
from infra.errors import ConfigError, DataRefused


def picture(seed: int, size=(60, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    own = tmp_path / "own"
    (own / "more").mkdir(parents=True)
    picture(0).save(own / "a.png")
    picture(1).save(own / "b.jpg", exif=exif())
    picture(2).save(own / "more" / "c.webp", lossless=True)
    (own / "a.txt").write_text("a {subject} on a table\n")
    (own / "notes.md").write_text("not a picture")
    return own


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x010F] = "Camera of a person"
    return tags.tobytes()


def read(config: SubjectFolder, out: Path):
    out.mkdir(exist_ok=True)
    facts = read_subject(config, SimpleNamespace(out=out))
    return facts, pq.read_table(out / PICTURES).to_pylist()


def test_pictures_and_captions_are_stored_without_metadata(folder, tmp_path) -> None:
    facts, rows = read(SubjectFolder(path=folder), tmp_path / "out")
    assert facts == {"pictures": 3, "captions": 1}
    assert [(row["name"], row["caption"]) for row in rows] == [
        ("a.png", "a {subject} on a table"), ("b.jpg", ""), ("more/c.webp", ""),
    ]  # fmt: skip
    assert np.array_equal(np.asarray(open_picture(rows[2]["image"])), np.asarray(picture(2)))
    assert not any(b"Camera of a person" in row["image"] for row in rows)
    assert {(row["width"], row["height"]) for row in rows} == {(60, 48)}


def test_the_same_folder_gives_the_same_bytes_and_a_changed_one_is_refused(folder, tmp_path) -> None:
    config = SubjectFolder(path=folder)
    for name in ("one", "two"):
        read(config, tmp_path / name)
    assert (tmp_path / "one" / PICTURES).read_bytes() == (tmp_path / "two" / PICTURES).read_bytes()
    picture(7).save(folder / "d.png")
    assert SubjectFolder(path=folder).fingerprint != config.fingerprint
    with pytest.raises(DataRefused, match="changed since the run was planned"):
        read(config, tmp_path / "three")


def test_too_few_too_many_and_no_pictures(folder, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataRefused, match="has 0 pictures, not 3 to 30; give more or fewer"):
        read(SubjectFolder(path=empty), tmp_path / "out")
    picture(0).save(empty / "one.png")
    with pytest.raises(DataRefused, match="has 1 pictures, not 3 to 30"):
        read(SubjectFolder(path=empty), tmp_path / "out")
    with pytest.raises(DataRefused, match="has 3 pictures, not 1 to 2"):
        read(SubjectFolder(path=folder, fewest=1, most=2), tmp_path / "out")
    with pytest.raises(ConfigError, match="does not exist"):
        read(SubjectFolder(path=tmp_path / "nowhere"), tmp_path / "out")


def test_every_unusable_picture_is_named_with_its_reason(folder, tmp_path) -> None:
    picture(3, (20, 60)).save(folder / "d.png")
    (folder / "e.png").write_bytes(b"hello, I am no picture")
    whole = io.BytesIO()
    picture(4).save(whole, "JPEG")
    (folder / "f.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    (folder / "g.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "h.png").write_bytes(b"")
    picture(5).save(folder / "i.png")
    (folder / "i.txt").write_text(" \n")
    picture(6, (400, 300)).save(folder / "j.png")
    with pytest.raises(DataRefused) as refused:
        read(SubjectFolder(path=folder, max_pixels=100_000), tmp_path / "out")
    message = str(refused.value)
    assert message.startswith(f"7 of 10 pictures in {folder} cannot be used; replace or remove them: ")
    for part in ("d.png: 20x60 px, smaller than the 32 px the model draws", "e.png: not_image", "f.jpg: truncated",
                 "g.png: the same picture as a.png", "h.png: empty", "i.png: its caption i.txt is empty",
                 "j.png: oversize"):  # fmt: skip
        assert part in message
    assert not (tmp_path / "out" / PICTURES).exists()


def test_a_file_too_large_is_not_read(folder, tmp_path) -> None:
    with pytest.raises(DataRefused, match="a.png: [0-9]+ bytes, more than max_bytes=1000"):
        read(SubjectFolder(path=folder, max_bytes=1000), tmp_path / "out")


def test_a_mask_beside_a_picture_is_stored_with_it(folder, tmp_path) -> None:
    mask = Image.new("L", (60, 48))
    mask.paste(255, (10, 10, 30, 30))
    mask.save(folder / "b.mask.png")
    facts, rows = read(SubjectFolder(path=folder), tmp_path / "out")
    assert facts == {"pictures": 3, "captions": 1, "masks": 1}
    assert [row["mask"] is not None for row in rows] == [False, True, False]
    assert np.array_equal(np.asarray(open_picture(rows[1]["mask"]))[..., 0], np.asarray(mask))


def test_every_unusable_mask_is_named_with_its_reason(folder, tmp_path) -> None:
    Image.new("L", (48, 60), 255).save(folder / "a.mask.png")
    Image.new("L", (60, 48)).save(folder / "b.mask.png")
    (folder / "more" / "c.mask.png").write_bytes(b"no picture")
    Image.new("L", (60, 48), 255).save(folder / "z.mask.png")
    with pytest.raises(DataRefused) as refused:
        read(SubjectFolder(path=folder), tmp_path / "out")
    for part in ("a.png: its mask a.mask.png has 48x60 px, the picture 60x48; make them the same",
                 "b.jpg: its mask b.mask.png is black everywhere", "more/c.webp: its mask c.mask.png: not_image",
                 "z.mask.png: no picture of that name beside it"):  # fmt: skip
        assert part in str(refused.value)
