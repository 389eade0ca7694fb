"""Reading a downloaded body: is it a picture, how large, does all of it decode; the header is judged before pixels.

Allowed are JPEG, PNG, WebP and AVIF stills. What is stored has no metadata and nothing after its end: plain pictures
keep their coded pixels, all others (turned by EXIF, transparent, palette, CMYK, 16 bit, AVIF, with a colour profile
other than sRGB) are rewritten as PNG, upright, in sRGB, on white.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, replace

from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from data_curation.container import JPEG, PNG, stripped

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")
STORED_AS_IS = ("JPEG", "PNG", "WEBP")
MIMES = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "AVIF": "image/avif"}
OTHER_PICTURES = (
    b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"8BPS", b"\x00\x00\x01\x00", b"\xff\x0a", b"\x00\x00\x00\x0cJXL ",
    b"\x00\x00\x00\x0cjP  ", b"%PDF", b"qoif",
)  # fmt: skip
AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"miaf")


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
    sha256_stored: str | None = None


def inspect(data: bytes, max_pixels: int) -> Inspected:
    """Decode a body within bounds; `mime`, `width` and `height` are those of what is stored."""
    found = Inspected(hashlib.sha256(data).hexdigest(), len(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            found = replace(found, mime=MIMES[str(image.format)], width=image.width, height=image.height)
            if image.width * image.height > max_pixels:
                return replace(found, reason="oversize")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                return replace(found, reason="animated")
            image.load()
            bare = data if image.format == "AVIF" else stripped(data)
            if bare is None:
                return replace(found, reason="truncated")
            profile = _profile(image)
            if not _plain(image) or profile is not None:
                image, bare = _rewritten(image, profile)
                found = replace(found, mime="image/png", width=image.width, height=image.height)
    except UnidentifiedImageError:
        return replace(found, reason=_unreadable(data))
    except MemoryError:
        return replace(found, reason="decode_memory")
    except Exception as error:  # Pillow's readers raise whatever hostile bytes make them raise
        return replace(found, reason="truncated" if "truncated" in str(error) or _cut_webp(data) else "corrupt")
    return replace(found, image=bare, sha256_stored=hashlib.sha256(bare).hexdigest())


def open_picture(stored: bytes) -> Image.Image:
    """A stored picture as RGB; for pictures that `inspect` let through."""
    return Image.open(io.BytesIO(stored), formats=STORED_AS_IS).convert("RGB")


def _plain(image: Image.Image) -> bool:
    return (
        image.format in (*STORED_AS_IS, "MPO")
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and _orientation(image) == 1
    )


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The colour profile by which pixels must be converted to sRGB, if there is one that can be read."""
    icc = image.info.get("icc_profile")
    if not icc or image.mode not in ("RGB", "RGBA", "CMYK"):
        return None
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(icc))
        name = ImageCms.getProfileDescription(profile)
        space = profile.profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    fits = space == ("CMYK" if image.mode == "CMYK" else "RGB")
    return profile if fits and "sRGB" not in name else None


def _rewritten(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> tuple[Image.Image, bytes]:
    """Upright, in sRGB, on white, without metadata."""
    image = ImageOps.exif_transpose(image)
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if profile is not None:
        image = image.convert("RGB") if alpha else image
        try:
            converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError:
            converted = None  # a profile that cannot convert says nothing about the colours
        image = converted or image.convert("RGB")
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")  # type: ignore[no-untyped-call, unused-ignore]
    if alpha is None and (image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if alpha is not None:
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image.convert("RGB"), mask=alpha)
        image = canvas
    image = image if image.mode == "L" else image.convert("RGB")
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return image, file.getvalue()


def _unreadable(data: bytes) -> str:
    if not data:
        return "empty"
    if _cut_webp(data):
        return "truncated"
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    is_box = data[4:8] == b"ftyp"
    if is_webp or data.startswith((JPEG, PNG)) or (is_box and data[8:12] in AVIF_BRANDS):
        return "corrupt"
    return "unsupported_format" if is_box or data.startswith(OTHER_PICTURES) else "not_image"


def _cut_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
