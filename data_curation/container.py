"""Picture files without what is not picture: metadata (EXIF, GPS, XMP, comments, profiles) and anything after the end.

Only whole segments are taken out, so the pixels stay bit for bit; a polyglot's other half goes with the rest.
A file whose end is missing gives None.
"""

from __future__ import annotations

import re

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
JPEG_KEPT = {
    *range(0xC0, 0xD0),
    0xDA,
    0xDB,
    0xDC,
    0xDD,
    0xEE,
}  # frames, tables, scans, restarts, Adobe's colour transform
PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"sRGB", b"IDAT", b"IEND"}
WEBP_KEPT = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH"}
NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
SOS, EOI, APP0 = 0xDA, 0xD9, 0xE0


def stripped(data: bytes) -> bytes | None:
    """The bare JPEG, PNG or WebP."""
    if data.startswith(JPEG):
        return _jpeg(data)
    if data.startswith(PNG):
        return _png(data)
    return _webp(data)


def _jpeg(data: bytes) -> bytes | None:
    kept, place, in_scan = [data[:2]], 2, False
    while found := NEXT_MARKER.search(data, place):  # in a scan, this skips its entropy-coded data
        if in_scan:
            kept.append(data[place : found.start()])
        marker, place = data[found.end() - 1], found.end()
        if marker == EOI:
            return b"".join([*kept, b"\xff\xd9"])
        size = int.from_bytes(data[place : place + 2], "big")
        if size < 2 or place + size > len(data):
            return None
        segment = data[place : place + size]
        place += size
        in_scan = marker == SOS
        if marker in JPEG_KEPT or (marker == APP0 and segment[2:7] == b"JFIF\x00"):
            kept.append(b"\xff" + bytes([marker]) + segment)
    return None


def _png(data: bytes) -> bytes | None:
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + size
        if end > len(data):
            return None
        if name in PNG_KEPT:
            kept.append(data[place:end])
        if name == b"IEND":
            return b"".join(kept)
        place = end
    return None


def _webp(data: bytes) -> bytes | None:
    end, place = int.from_bytes(data[4:8], "little") + 8, 12
    if end > len(data):
        return None
    kept = []
    while place + 8 <= end:
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        chunk = data[place : min(place + 8 + size + size % 2, end)]
        if chunk[:4] == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~0x2E]) + chunk[9:]  # no profile, EXIF, XMP, animation
        if chunk[:4] in WEBP_KEPT:
            kept.append(chunk)
        place += 8 + size + size % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body
