"""Hostile input: 60 ways to a private address, straight and by redirect, and 2,000 broken or malicious pictures.

value: connections made to a forbidden address plus decoding children that died plus pictures that raised in the parent;
bar: 0, and no child above 1 GiB. A slow-drip server is read under a deadline as well.
"""

from __future__ import annotations

import http.server
import io
import json
import random
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from benchmarks.record import record
from data_curation.config import DownloadConfig
from data_curation.decoder import Decoder
from data_curation.guard import RefusedError
from data_curation.guarded_web import install_guard
from infra import net

SEED = 0
CHANGED = 1_900
PRIVATE = (
    "127.0.0.1", "127.1", "127.0.1", "127.255.255.254", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001",
    "0x7f.0.0.0x1", "0", "0.0.0.0", "localhost", "LOCALHOST", "localhost.", "127.0.0.1.", "10.0.0.1", "10.255.255.255", "172.16.0.1",
    "172.31.255.255", "192.168.0.1", "192.168.1.254", "3232235777", "0xc0a80101", "169.254.169.254", "2852039166", "0xa9fea9fe",
    "0251.0376.0251.0376", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "192.0.2.1", "203.0.113.7",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[::ffff:169.254.169.254]", "[::127.0.0.1]", "[fe80::1]", "[fc00::1]", "[fd00:ec2::254]",
    "[ff02::1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[2001:db8::1]",
    "rebind.test", "twofold.test", "mapped.test", "metadata.test",
)  # fmt: skip
NAMES = {  # what the resolver of an attacker would answer
    "rebind.test": ["127.0.0.1"], "twofold.test": ["8.8.8.8", "127.0.0.1"], "mapped.test": ["::ffff:10.0.0.1"],
    "metadata.test": ["169.254.169.254"],
}  # fmt: skip


class Web(http.server.BaseHTTPRequestHandler):
    """Redirects where its path says; /drip sends a byte now and then, in the header or the body."""

    def do_GET(self) -> None:
        """Answer by path."""
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", bytes.fromhex(self.path[4:]).decode())
            self.end_headers()
            return
        try:
            if self.path == "/drip":
                self.send_response(200)
                self.end_headers()
            for _ in range(600):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            return

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


def forbidden_connects() -> dict[str, Any]:
    """Ask for every target, straight and behind a redirect; count the connections that were tried at all."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    install_guard(DownloadConfig(deadline_seconds=2), {"own.test": f"127.0.0.1:{server.server_port}"})
    tried: list[Any] = []
    real_connect, real_resolve = socket.socket.connect, net._getaddrinfo

    def connect(self: socket.socket, address: Any) -> None:
        if address[:2] != ("127.0.0.1", server.server_port):
            tried.append(address)
        real_connect(self, address)

    def resolve(host: str, port: int, **options: Any) -> Any:
        answers = NAMES.get(host, [host])
        return [info for answer in answers for info in real_resolve(answer, port, **options)]

    socket.socket.connect = connect  # type: ignore[method-assign, assignment]
    net._getaddrinfo = resolve  # type: ignore[assignment]
    reached, drips = [], {}
    try:
        for host in PRIVATE:
            for port in (80, server.server_port + 1):
                straight = f"http://{host}:{port}/latest/meta-data"
                for url in (straight, f"http://own.test/to/{straight.encode().hex()}"):
                    if fetched(url):
                        reached.append(url)
        for path in ("drip", "drip-header"):
            began = time.monotonic()
            assert not fetched(f"http://own.test/{path}")
            drips[path] = round(time.monotonic() - began, 2)
    finally:
        socket.socket.connect = real_connect  # type: ignore[method-assign]
        net._getaddrinfo = real_resolve
        urllib.request.install_opener(None)  # type: ignore[arg-type]
        server.shutdown()
    return {"targets": len(PRIVATE), "requests": 4 * len(PRIVATE), "connects": len(tried), "connected_to": sorted(set(map(str, tried))), "reached": reached,
            "drip_seconds": drips, "drip_deadline": 2}  # fmt: skip


def fetched(url: str) -> bool:
    """Whether a URL gave an answer."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            answer.read()
    except (RefusedError, OSError):
        return False
    return True


# --- pictures ---


def sound_pictures(rng: np.random.Generator) -> list[bytes]:
    """Pictures of every allowed kind to be damaged."""
    noise = Image.fromarray(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8))
    smooth = Image.fromarray(np.add.outer(np.arange(120), np.arange(90)).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    laden: dict[str, Any] = {"exif": exif, "icc_profile": profile}
    plans: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (smooth, "JPEG", {}), (noise, "JPEG", {"progressive": True}), (noise.convert("CMYK"), "JPEG", laden),
        (noise.convert("L"), "JPEG", laden), (noise, "PNG", laden), (noise.quantize(16), "PNG", {}),
        (Image.fromarray(rng.integers(0, 65_536, (30, 40), dtype=np.uint16)), "PNG", {}), (noise.convert("RGBA"), "PNG", {}),
        (noise, "PNG", {"save_all": True, "append_images": [noise.rotate(180)]}), (noise, "WEBP", laden), (smooth, "WEBP", {"lossless": True}),
        (noise, "WEBP", {"save_all": True, "append_images": [noise.rotate(180)]}), (noise, "AVIF", laden), (smooth, "AVIF", {}),
        (noise, "GIF", {}), (noise, "TIFF", {}), (noise, "BMP", {}),
    ]  # fmt: skip
    bodies = []
    for picture, form, options in plans:
        file = io.BytesIO()
        picture.save(file, form, **options)
        bodies.append(file.getvalue())
    return bodies


def png(width: int, height: int, raw: bytes, depth: int = 8, kind: int = 2, extra: bytes = b"") -> bytes:
    """A PNG with whatever header and data are wanted."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def bombs(bodies: list[bytes]) -> Iterator[bytes]:
    """Pictures that promise much, take much, or are something else besides."""
    yield from (png(width, height, b"\x00" * 10_000) for width, height in
                ((2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (1, 2**31 - 1), (40_000, 40_000), (0, 0), (6_300, 6_300)))  # fmt: skip
    yield png(6_300, 6_300, b"\x00" * (6_300 * 6_300 * 3 + 6_300))  # just below the limit: decoded whole
    yield png(6_300, 6_300, b"\x00" * (6_300 * 6_300 * 8 + 6_300), depth=16, kind=6)
    yield png(1, 1, b"\x00" * 500_000_000)  # the pixels end early, the data do not
    text = b"zTXtk\x00\x00" + zlib.compress(b"\x00" * 200_000_000)
    yield png(1, 1, b"\x00" * 4, extra=struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)))
    for body in bodies:
        yield body + b"PK\x03\x04" + b"<?php system($_GET[0]);"
        yield b"<html><script>alert(1)</script>" + body
        yield body[: len(body) // 2] + body
    jpeg = bodies[0]
    for sides in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x13\x88\x1f\x40"):
        place = jpeg.index(b"\xff\xc0")
        yield jpeg[: place + 5] + sides + jpeg[place + 9 :]
    scan = jpeg[jpeg.index(b"\xff\xda") : -2]
    yield jpeg[:-2] + scan * 3_000 + b"\xff\xd9"  # thousands of scans
    yield from (
        b"",
        b"\x00",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
        b"<svg/>",
        b"%PDF-1.7",
        bytes(5_000_000),
    )
    yield from (
        b"\x00\x00\x00\x1cftypavif" + bytes(20),
        b"\x00\x00\x00\x1cftypheic" + bytes(20),
        b"#!MVG\npush graphic-context",
    )


def damaged(bodies: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Bodies with bits flipped, bytes cut out, doubled, or set to extremes; the head, where lengths are, more often."""
    rng = random.Random(seed)
    for _ in range(count):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            if not body:
                break
            place = rng.randrange(min(len(body), rng.choice((64, 512, len(body)))))
            match rng.randrange(5):
                case 0:
                    body[place] ^= 1 << rng.randrange(8)
                case 1:
                    body[place : place + 4] = rng.choice(
                        (b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4))
                    )
                case 2:
                    del body[place : place + rng.randrange(1, 64)]
                case 3:
                    body[place:place] = body[place : place + rng.randrange(1, 64)]
                case _:
                    body = body[: max(1, len(body) - rng.randrange(len(body)))]
        yield bytes(body)


def hostile_pictures(count: int) -> dict[str, Any]:
    """Judge all of them in a bounded child."""
    config = DownloadConfig()
    bodies = sound_pictures(np.random.default_rng(SEED))
    reasons: Counter[str] = Counter()
    raised, slowest, number = 0, 0.0, 0
    with Decoder(config.max_pixels, config.decode_memory_mb, config.decode_seconds) as decoder:
        for body in chain(bombs(bodies), damaged(bodies, count, SEED)):
            began = time.monotonic()
            try:
                reasons[decoder.inspect(body).reason or "kept"] += 1
            except Exception:  # the bar counts whatever gets through
                raised += 1
            slowest, number = max(slowest, time.monotonic() - began), number + 1
        peak, deaths = decoder.peak_bytes, decoder.num_deaths
    return {"pictures": number, "raised": raised, "child_deaths": deaths, "child_peak_mib": round(peak / 2**20),
            "slowest_seconds": round(slowest, 2), "reasons": dict(sorted(reasons.items()))}  # fmt: skip


def main() -> dict[str, Any]:
    """Run both halves."""
    web, decoding = forbidden_connects(), hostile_pictures(CHANGED)
    bad = web["connects"] + len(web["reached"]) + decoding["raised"] + decoding["child_deaths"]
    met = bad == 0 and decoding["child_peak_mib"] < 1024
    return record("hostile_input", [SEED], float(bad), 0.0, 0.0, met, {"web": web, "pictures": decoding})


if __name__ == "__main__":
    print(json.dumps(main()))
