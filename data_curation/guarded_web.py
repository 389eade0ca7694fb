"""What img2dataset's urllib calls may reach: http(s) on public addresses, on every hop, in bounded time and size.

img2dataset calls `urllib.request.urlopen`; installing an opener in its process guards it without touching its code.
"""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Mapping
from email.message import Message
from functools import partial
from typing import Any

from data_curation.config import DownloadConfig
from data_curation.guard import Fetch, Guard, RefusedError, check_deadline, check_headers
from data_curation.urls import BadUrl, fetchable, without_secrets

CHUNK_BYTES = 65_536


class _Http(http.client.HTTPConnection):
    def __init__(self, host: str, *, guard: Guard, fetch: Fetch, **options: Any) -> None:
        super().__init__(host, **options)
        self._guard, self._fetch = guard, fetch

    def connect(self) -> None:
        self.sock = self._guard.connect(self, self._fetch)


class _Https(http.client.HTTPSConnection):
    def __init__(self, host: str, *, guard: Guard, fetch: Fetch, **options: Any) -> None:
        super().__init__(host, **options)
        self._guard, self._fetch = guard, fetch

    def connect(self) -> None:
        plain = self._guard.connect(self, self._fetch)
        self.sock = self._guard.tls.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self._guard.watch(self.sock, self._fetch)
        self.sock.do_handshake()


class _Body:
    """A response that img2dataset may read whole: never more than the limit, never after the deadline."""

    def __init__(self, response: Any, guard: Guard, fetch: Fetch) -> None:
        self._response, self._guard, self._fetch = response, guard, fetch
        self.headers: Message = response.headers

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._guard.release(self._fetch)

    def read(self) -> bytes:
        limit, declared = self._fetch.max_bytes, self.headers.get("Content-Length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise RefusedError(f"oversize: body of {declared} bytes, limit {limit}")
        parts: list[bytes] = []
        left = limit + 1
        while part := self._part(min(CHUNK_BYTES, left)):
            parts.append(part)
            left -= len(part)
            if not left:
                raise RefusedError(f"oversize: body of more than {limit} bytes")
        if self._response.length:
            raise RefusedError(f"truncated: {self._response.length} of the declared bytes did not come")
        return b"".join(parts)

    def _part(self, size: int) -> bytes:
        try:
            part = bytes(self._response.read1(size))
        except (OSError, http.client.HTTPException):
            check_deadline(self._fetch)
            raise
        if not part:
            check_deadline(self._fetch)  # a reaped socket ends like a finished one
        return part


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as far as every hop may be asked and none has opted out."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:  # fmt: skip
        fetch = _fetch_of(req)
        check_headers(headers, fetch, self._guard)
        try:
            where = fetchable(newurl)
        except BadUrl as error:
            raise RefusedError(f"bad_url: redirect to {without_secrets(newurl)[:200]}: {error}") from error
        following = super().redirect_request(req, fp, code, msg, headers, where)
        if following is not None:
            following.fetch = fetch  # type: ignore[attr-defined]
        return following


class _Hops(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens guarded connections, names us honestly, and bounds the body of the last hop."""

    handler_order = 2_000  # after HTTPErrorProcessor, so that redirects and errors are settled

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def http_open(self, request: urllib.request.Request) -> Any:
        return self._open(_Http, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self._open(_Https, request)

    def _open(self, kind: Any, request: urllib.request.Request) -> Any:
        fetch = _fetch_of(request)
        self._guard.before(request.full_url, fetch)
        try:
            response: Any = self.do_open(partial(kind, guard=self._guard, fetch=fetch), request)
        except (OSError, http.client.HTTPException):
            check_deadline(fetch)
            raise
        fetch.status, fetch.retry_after = response.status, response.headers.get("Retry-After")
        return response

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if not hasattr(request, "fetch"):
            fetch = Fetch(request.full_url, self._guard.until, self._guard.config.max_bytes)
            request.fetch = self._guard.seen[request.full_url] = fetch  # type: ignore[attr-defined]
        request.add_header("User-Agent", self._guard.config.user_agent)
        return super().http_request(request)

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        if isinstance(response, _Body):  # a redirect was followed: the inner fetch is bounded already
            return response
        fetch = _fetch_of(request)
        check_headers(response.headers, fetch, self._guard)
        return _Body(response, self._guard, fetch)

    https_request = http_request
    https_response = http_response


def _fetch_of(request: urllib.request.Request) -> Fetch:
    return request.fetch  # type: ignore[attr-defined, no-any-return]


class _Opener(urllib.request.OpenerDirector):
    """Gives a fetch's turn back however it fails."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        request = urllib.request.Request(fullurl, data) if isinstance(fullurl, str) else fullurl
        try:
            return super().open(request, data, timeout)
        except BaseException:
            if (fetch := getattr(request, "fetch", None)) is not None:
                self._guard.release(fetch)
            raise


def install_guard(config: DownloadConfig, pins: Mapping[str, str]) -> Guard:
    """Make every later urlopen of this process go through the guard; file:, data: and ftp: have no handler left.

    `pins` maps a host name to the host:port that stands for it; such a host is our own server.
    """
    guard = Guard(config, pins)
    opener = _Opener(guard)
    for handler in (
        urllib.request.HTTPDefaultErrorHandler(), _Redirects(guard), urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(), _Hops(guard),
    ):  # fmt: skip
        opener.add_handler(handler)
    urllib.request.install_opener(opener)
    return guard
