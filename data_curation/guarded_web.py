"""What img2dataset's urllib calls may reach: http(s) on public addresses, on every hop, in bounded time and size.

img2dataset calls `urllib.request.urlopen`; installing an opener in its process guards it without touching its code.
Left out: robots.txt, per-host rates.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from email.message import Message
from functools import partial
from typing import Any

from infra.errors import DataRefused
from infra.net import public_addresses

CHUNK_BYTES = 65_536


class RefusedError(Exception):
    """A fetch that the guard stopped; the message starts with the reason."""


def resolve(host: str, port: int, allow_private: bool) -> str:
    """An address of `host` that may be reached."""
    try:
        return public_addresses(host, port, [host] if allow_private else [])[0]
    except DataRefused as error:
        reason = "refused_address" if error.__cause__ is None else "unknown_host"
        raise RefusedError(f"{reason}: {error}") from error


def _connect(connection: http.client.HTTPConnection, pins: Mapping[str, str], allow_private: bool) -> socket.socket:
    pinned = pins.get(connection.host)
    host, port = connection.host, connection.port
    if pinned is not None:
        host, port = pinned.rsplit(":", 1)[0], int(pinned.rsplit(":", 1)[1])
    address = resolve(host, port, allow_private or pinned is not None)
    return socket.create_connection((address, port), connection.timeout)


class _Http(http.client.HTTPConnection):
    def __init__(self, host: str, *, pins: Mapping[str, str], allow_private: bool, **options: Any) -> None:
        super().__init__(host, **options)
        self._guard = partial(_connect, self, pins, allow_private)

    def connect(self) -> None:
        self.sock = self._guard()


class _Https(http.client.HTTPSConnection):
    def __init__(self, host: str, *, pins: Mapping[str, str], allow_private: bool, **options: Any) -> None:
        super().__init__(host, **options)
        self._guard = partial(_connect, self, pins, allow_private)

    def connect(self) -> None:
        self.sock = ssl.create_default_context().wrap_socket(self._guard(), server_hostname=self.host)


class _Body:
    """A response that img2dataset may read whole: never more than `max_bytes`, never after the deadline."""

    def __init__(self, response: Any, max_bytes: int, deadline: float) -> None:
        self._response, self._max_bytes, self._deadline = response, max_bytes, deadline
        self.headers: Message = response.headers

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()

    def read(self) -> bytes:
        declared = self.headers.get("Content-Length")
        if declared is not None and declared.isdigit() and int(declared) > self._max_bytes:
            raise RefusedError(f"oversize: body of {declared} bytes, limit {self._max_bytes}")
        parts: list[bytes] = []
        left = self._max_bytes + 1
        while part := self._response.read1(min(CHUNK_BYTES, left)):
            parts.append(part)
            left -= len(part)
            if not left:
                raise RefusedError(f"oversize: body of more than {self._max_bytes} bytes")
            if time.monotonic() > self._deadline:
                raise RefusedError("timeout: the whole fetch took too long")
        if self._response.length:
            raise RefusedError(f"truncated: {self._response.length} of the declared bytes did not come")
        return b"".join(parts)


class _Guard(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens guarded connections, names us honestly, and bounds the body of the last hop."""

    handler_order = 2_000  # after HTTPErrorProcessor, so that redirects and errors are settled

    def __init__(
        self, pins: Mapping[str, str], allow_private: bool, max_bytes: int, deadline_seconds: float, user_agent: str
    ) -> None:
        super().__init__()
        self._options = {"pins": pins, "allow_private": allow_private}
        self._max_bytes, self._deadline_seconds, self._user_agent = max_bytes, deadline_seconds, user_agent

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Http, **self._options), request)  # type: ignore[arg-type]

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Https, **self._options), request)  # type: ignore[arg-type]

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        request.add_header("User-Agent", self._user_agent)
        return super().http_request(request)

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        if isinstance(response, _Body):  # a redirect was followed: the inner fetch is bounded already
            return response
        return _Body(response, self._max_bytes, time.monotonic() + self._deadline_seconds)

    https_request = http_request
    https_response = http_response


def install_guard(
    pins: Mapping[str, str], allow_private: bool, max_bytes: int, deadline_seconds: float, user_agent: str
) -> None:
    """Make every later urlopen of this process go through the guard; file:, data: and ftp: have no handler left.

    `pins` maps a host name to the host:port that stands for it; only pinned hosts may be on the loopback interface.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
        _Guard(pins, allow_private, max_bytes, deadline_seconds, user_agent),
    ):  # fmt: skip
        opener.add_handler(handler)
    urllib.request.install_opener(opener)
