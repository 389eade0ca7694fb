"""Odd pictures become plain ones or get a reason; a body that ends its decoder ends nothing else."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from data_curation.decode import inspect, open_picture
from data_curation.decoder import Decoder

LIMIT = 4_000_000


def body(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def noise(width: int = 90, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_upright_pixels(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.GPSInfo)[2] = (48.0, 8.0, 30.0)
    data = body(noise(), "JPEG", exif=exif)
    found = inspect(data, LIMIT)
    assert found.image is not None
    assert found.sha256_stored != found.sha256
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(np.asarray(open_picture(found.image)), expected)
    assert (found.width, found.height) == ((64, 90) if orientation > 4 else (90, 64))
    assert not Image.open(io.BytesIO(found.image)).getexif()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (body(noise(), "GIF"), "unsupported_format"), (body(noise(), "BMP"), "unsupported_format"),
        (body(noise(), "TIFF"), "unsupported_format"), (b"%PDF-1.4", "unsupported_format"),
        (body(noise(), "WEBP", save_all=True, append_images=[noise(), Image.new("RGB", (90, 64))]), "animated"),
        (body(noise(), "PNG", save_all=True, append_images=[Image.new("RGB", (90, 64))]), "animated"),
        (body(Image.new("RGB", (3_000, 2_000)), "PNG"), "oversize"), (body(noise(), "JPEG")[:-2], "truncated"),
        (b"RIFF1234", "not_image"), (b"\x00" * 64, "not_image"), (b"\x89PNG\r\n\x1a\n", "corrupt"),
    ],
)  # fmt: skip
def test_bodies_that_are_not_kept(data: bytes, reason: str) -> None:
    assert inspect(data, LIMIT).reason == reason


def test_odd_but_sound_pictures_are_made_plain() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([255, 0, 0])
    cases = {
        "avif": (body(noise(), "AVIF", quality=100), None), "cmyk": (body(noise().convert("CMYK"), "JPEG", quality=95), None),
        "grey": (body(noise().convert("L"), "PNG"), None), "palette": (body(noise().quantize(16), "PNG"), None),
        "bits": (body(noise().convert("1"), "PNG"), None), "clear": (body(clear, "PNG"), (255, 255, 255)),
        "clear palette": (body(palette, "PNG", transparency=0), (255, 255, 255)),
        "grey with alpha": (body(Image.new("LA", (20, 20), (9, 0)), "PNG"), (255, 255, 255)),
        "clear colour": (body(Image.new("RGB", (20, 20), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255, 255, 255)),
        "16 bit": (body(Image.fromarray(np.full((20, 20), 30_000, np.uint16)), "PNG"), (117, 117, 117)),
        "webp with alpha": (body(clear, "WEBP", lossless=True), (255, 255, 255)),
    }  # fmt: skip
    for name, (data, pixel) in cases.items():
        found = inspect(data, LIMIT)
        assert (found.reason, found.image is None) == (None, False), name
        again = Image.open(io.BytesIO(found.image or b""))
        assert again.mode in ("L", "RGB"), name
        assert again.size == (found.width, found.height), name
        if pixel:
            assert open_picture(found.image or b"").getpixel((3, 3)) == pixel, name


def test_another_colour_space_is_converted_and_srgb_kept_as_it_is() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = inspect(body(noise(), "JPEG", icc_profile=srgb), LIMIT)
    assert same.mime == "image/jpeg"
    assert same.image == inspect(body(noise(), "JPEG"), LIMIT).image
    broken = inspect(body(noise(), "JPEG", icc_profile=b"no profile at all"), LIMIT)
    assert broken.image == same.image


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder(LIMIT, 512, 5.0) as made:
        yield made


def test_the_child_says_what_inspect_says(decoder: Decoder) -> None:
    for data in (body(noise(), "JPEG"), b"", body(noise(), "PNG")[:90], body(noise(), "AVIF"), b"<html>"):
        assert decoder.inspect(data) == inspect(data, LIMIT)
    assert decoder.num_deaths == 0


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux only")
def test_a_bomb_meets_the_memory_limit_and_the_next_body_is_judged() -> None:
    bomb = body(Image.new("RGB", (6_000, 6_000)), "PNG")
    with Decoder(200_000_000, 160, 60.0) as small:
        assert small.inspect(bomb).reason in ("decode_memory", "decode_crash")
        assert small.inspect(body(noise(), "PNG")).reason is None
        assert small.inspect(bytes(170_000_000)).reason == "decode_crash"
        assert small.inspect(body(noise(), "PNG")).reason is None
        assert 0 < small.peak_bytes < 160 * 2**20


def test_a_slow_body_is_given_up(decoder: Decoder, tmp_path: Path) -> None:
    decoder._seconds = 0.0
    assert decoder.inspect(body(noise(), "PNG")).reason == "decode_timeout"
    decoder._seconds = 10.0
    assert decoder.inspect(body(noise(), "PNG")).reason is None
    assert decoder.num_deaths == 1
