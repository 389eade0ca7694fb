"""Metadata and what hangs on behind a picture go; its pixels stay bit for bit."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from data_curation.container import stripped

SECRET = b"GPS-AND-NAME"


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def saved(form: str, bare: bool, **options: object) -> bytes:
    file, more = io.BytesIO(), dict[str, object]()
    if not bare:
        exif = Image.Exif()
        exif[0x010E] = SECRET.decode()
        more = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
        if form == "PNG":
            info = PngImagePlugin.PngInfo()
            info.add_text("Comment", SECRET.decode(), zip=False)
            more["pnginfo"] = info
        else:
            more["xmp"] = b"<x:xmpmeta>" + SECRET + b"</x:xmpmeta>"
        if form == "JPEG":
            more["comment"] = SECRET
    picture().save(file, form, **options, **more)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"restart_marker_rows": 1}), ("PNG", {}), ("WEBP", {}),
     ("WEBP", {"lossless": True})],
)  # fmt: skip
def test_only_the_picture_is_left(form: str, options: dict[str, object]) -> None:
    plain, laden = saved(form, True, **options), saved(form, False, **options) + b"PK\x03\x04 another file"
    assert stripped(plain) == plain
    assert SECRET in laden
    bare = stripped(laden)
    assert bare is not None
    assert SECRET not in bare
    assert b"PK\x03\x04" not in bare
    image = Image.open(io.BytesIO(bare))
    assert not image.getexif()
    assert "icc_profile" not in image.info
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(plain))))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_missing_end_is_seen(form: str) -> None:
    data = saved(form, True)
    assert stripped(data[:-2]) is None
    assert stripped(data[: len(data) // 2]) is None
