"""Decoding in a child of bounded memory and time: whatever a body does to the decoder, the stage goes on.

`Decoder` speaks to `python -m data_curation.decoder`, which imports Pillow and nothing else of size. One request is
8 bytes of length and the body; one answer is 8 + 8 bytes of lengths, JSON, and the picture to store.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import IO

from data_curation.decode import Inspected, inspect
from infra.memory import peak_memory

MEGABYTE = 1 << 20


class Decoder:
    """A decoding child, started anew when a body has ended or outstayed it; a context manager."""

    def __init__(self, max_pixels: int, memory_mb: int, seconds: float) -> None:
        self._max_pixels, self._memory_mb, self._seconds = max_pixels, memory_mb, seconds
        self._child: subprocess.Popen[bytes] | None = None
        self.num_deaths = 0
        self.peak_bytes = 0

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def inspect(self, body: bytes) -> Inspected:
        """As `decode.inspect`; a body that kills the child, or keeps it too long, has that as its reason."""
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(struct.pack("<Q", len(body)))
            child.stdin.write(body)
            child.stdin.flush()
            read = _reader(child.stdout, time.monotonic() + self._seconds)
            num_facts, num_image = struct.unpack("<QQ", read(16))
            facts, image = json.loads(read(num_facts)), read(num_image)
        except TimeoutError:
            return self._failed(body, "decode_timeout")
        except (EOFError, BrokenPipeError):
            return self._failed(body, "decode_crash")
        self.peak_bytes = max(self.peak_bytes, facts.pop("peak"))
        return Inspected(**facts, image=image or None)

    def _failed(self, body: bytes, reason: str) -> Inspected:
        self.num_deaths += 1
        self._end()
        return Inspected(sha256(body).hexdigest(), len(body), reason)

    def _start(self) -> subprocess.Popen[bytes]:
        here = str(Path(__file__).parent.parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "data_curation.decoder", str(self._max_pixels), str(self._memory_mb)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
        )
        return self._child

    def _end(self) -> None:
        if self._child is None:
            return
        self.peak_bytes = max(self.peak_bytes, peak_memory(self._child.pid))
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._child.wait()
        self._child = None


def _reader(stream: IO[bytes], until: float) -> Callable[[int], bytes]:
    """Reads so many bytes of a pipe, all of them or TimeoutError or EOFError."""

    def read(size: int) -> bytes:
        parts, left = [], size
        while left:
            if not select.select([stream], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(stream.fileno(), min(left, MEGABYTE))
            if not part:
                raise EOFError
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    return read


def serve(max_pixels: int, memory_mb: int) -> None:
    """The child: inspect bodies until the parent is gone."""
    limit = memory_mb * MEGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := requests.read(8)) == 8:
        try:
            body = requests.read(struct.unpack("<Q", head)[0])
            found = inspect(body, max_pixels)
        except MemoryError:
            os._exit(1)  # even the body had no place; the parent names the reason
        facts = asdict(found) | {"peak": peak_memory()}
        image = facts.pop("image") or b""
        text = json.dumps(facts).encode()
        answers.write(struct.pack("<QQ", len(text), len(image)))
        answers.write(text)
        answers.write(image)
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
