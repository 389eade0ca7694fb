"""Every bad body gets its reason; odd but sound pictures are made plain."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_curation.config import DemoWebConfig
from data_curation.decode import inspect, open_picture
from data_curation.demo_web import plan, render
from data_curation.quality_scores import scores

LIMIT = 40_000_000


def body(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 90, len(mode)), dtype=np.uint8)
    return Image.fromarray(values, mode=None)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_plain_pictures_are_kept_byte_by_byte_and_cut_ones_refused(form: str) -> None:
    data = body(noise(), form)
    found = inspect(data, LIMIT)
    assert (found.reason, found.image, found.width, found.height) == (None, data, 90, 64)
    assert inspect(data[: len(data) * 2 // 3], LIMIT).reason == "truncated"
    assert inspect(data[:16] + np.random.default_rng(1).bytes(len(data) - 16), LIMIT).reason == "corrupt"


def test_what_is_no_picture_is_called_so() -> None:
    assert inspect(b"<!doctype html><p>no</p>", LIMIT).reason == "not_image"
    assert inspect(b"", LIMIT).reason == "empty"
    assert inspect(b"<svg xmlns='http://www.w3.org/2000/svg'/>", LIMIT).reason == "not_image"


def test_a_huge_picture_is_refused_by_its_header() -> None:
    page = next(page for page in plan(DemoWebConfig(rows=500)) if page.defect == "oversize")
    data = render([page])[0]["body"]
    assert len(data) < 100_000
    assert inspect(data, LIMIT).reason == "oversize"


def test_metadata_is_dropped_and_the_picture_turned_upright() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "somebody"
    found = inspect(body(noise(), "JPEG", exif=exif), LIMIT)
    assert (found.width, found.height, found.mime) == (64, 90, "image/png")
    assert found.image is not None
    assert b"somebody" not in found.image


def test_transparent_and_deep_pictures_become_plain() -> None:
    clear = inspect(body(Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "PNG"), LIMIT)
    deep = inspect(body(Image.fromarray(np.full((20, 20), 30_000, np.uint16)), "PNG"), LIMIT)
    assert clear.image is not None
    assert deep.image is not None
    assert open_picture(clear.image).getpixel((3, 3)) == (255, 255, 255)
    assert open_picture(deep.image).getpixel((3, 3)) == (117, 117, 117)


def test_blur_and_compression_are_scored_apart_from_sound_pictures() -> None:
    pages = plan(DemoWebConfig(rows=600))
    found: dict[str | None, list[dict[str, float]]] = {None: [], "blurred": [], "over_compressed": []}
    for page in pages[:250]:
        if page.defect in found and len(found[page.defect]) < 30:
            found[page.defect].append(scores(render([page])[0]["body"]))
    assert max(s["blur"] for s in found[None]) < 0.45 < min(s["blur"] for s in found["blurred"])
    assert max(s["jpeg_quality"] for s in found["over_compressed"]) < 20
    assert min(s["jpeg_quality"] or 100 for s in found[None]) >= 80
