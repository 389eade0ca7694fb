"""Reading a downloaded body: is it a picture, how large, does all of it decode; the header is judged before pixels."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
STORED_AS_IS = ("JPEG", "PNG", "WEBP")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")


@dataclass(frozen=True)
class Inspected:
    """A body's picture, ready to store, or the reason why there is none."""

    sha256: str
    num_bytes: int
    reason: str | None = None
    image: bytes | None = None
    mime: str | None = None
    width: int | None = None
    height: int | None = None


def inspect(data: bytes, max_pixels: int) -> Inspected:
    """Decode a body within bounds; kept as it came when it is plain, rewritten as PNG when it is not."""
    digest, size = hashlib.sha256(data).hexdigest(), len(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            mime, (width, height) = Image.MIME[str(image.format)], image.size
            if width * height > max_pixels:
                return Inspected(digest, size, "oversize", None, mime, width, height)
            image.load()
            stored = data if _plain(image) else _rewritten(image)
    except UnidentifiedImageError:
        return Inspected(digest, size, _unreadable(data))
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        return Inspected(digest, size, "truncated" if "truncated" in str(error) or _cut_webp(data) else "corrupt")
    if stored is not data:
        with Image.open(io.BytesIO(stored)) as rewritten:
            mime, (width, height) = "image/png", rewritten.size
    return Inspected(digest, size, None, stored, mime, width, height)


def open_picture(stored: bytes) -> Image.Image:
    """A stored picture as RGB; for pictures that `inspect` let through."""
    return Image.open(io.BytesIO(stored), formats=STORED_AS_IS).convert("RGB")


def _plain(image: Image.Image) -> bool:
    one_frame = getattr(image, "n_frames", 1) == 1
    return image.format in STORED_AS_IS and image.mode in ("RGB", "L") and one_frame and not image.getexif()


def _rewritten(image: Image.Image) -> bytes:
    """First frame, upright, on white, without metadata."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")  # type: ignore[no-untyped-call, unused-ignore]
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    file = io.BytesIO()
    canvas.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _unreadable(data: bytes) -> str:
    if not data:
        return "empty"
    if _cut_webp(data):
        return "truncated"
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return "corrupt" if is_webp or data.startswith(MAGIC) else "not_image"


def _cut_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
