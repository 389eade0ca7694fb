"""The state of guarded fetching: what one URL may take, who may be asked now, and sockets that end at their deadline.

A fetch is one URL with all its redirects: it has one deadline, which a reaper thread enforces by shutting the socket
(a time-out of single socket operations never ends a server that drips), and every hop is asked about opt-out.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import urlsplit

from data_curation.config import DownloadConfig
from data_curation.opt_out import opted_out, product_token
from data_curation.politeness import Robots, Turns
from infra.errors import DataRefused
from infra.net import public_addresses

ROBOTS_BYTES = 512_000
REAP_SECONDS = 0.05


class RefusedError(Exception):
    """A fetch that the guard stopped; the message starts with the reason."""


@dataclass
class Fetch:
    """One URL on its way: what it may take, and what was seen."""

    url: str
    until: float
    max_bytes: int
    is_robots: bool = False
    status: int | None = None
    final_url: str | None = None
    retry_after: str | None = None
    deadline: float | None = None
    turn: str | None = None


@dataclass
class Guard:
    """State of one process's fetching, shared by its threads."""

    config: DownloadConfig
    pins: Mapping[str, str]
    until: float = field(default_factory=lambda: time.monotonic() + 1e9)  # end of the shard
    seen: dict[str, Fetch] = field(default_factory=dict)
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def __post_init__(self) -> None:
        self._sockets: dict[int, tuple[float, socket.socket]] = {}
        self.turns = Turns(self.config.per_host, self.config.host_interval_seconds)
        self.robots = Robots(self._read_robots, product_token(self.config.user_agent), self.turns)
        threading.Thread(target=self._reap, daemon=True, name="reaper").start()

    def own(self, host: str) -> bool:
        """Whether a host is a server of this run."""
        return host in self.pins

    def connect(self, connection: http.client.HTTPConnection, fetch: Fetch) -> socket.socket:
        """A TCP connection to an address that may be reached; the reaper ends it at the fetch's deadline."""
        host, port = connection.host, connection.port
        allowed = list(self.config.allow_private)
        if (pinned := self.pins.get(host)) is not None:
            host, port = pinned.rsplit(":", 1)[0], int(pinned.rsplit(":", 1)[1])
            allowed.append(host)
        assert fetch.deadline is not None
        try:
            addresses = public_addresses(host, port, allowed)
        except DataRefused as error:
            reason = "refused_address" if error.__cause__ is None else "unknown_host"
            raise RefusedError(f"{reason}: {error}") from error
        limit = float(connection.timeout or self.config.timeout_seconds)
        for i, address in enumerate(addresses):
            left = max(0.01, min(limit, fetch.deadline - time.monotonic()))
            try:
                sock = socket.create_connection((address, port), left)
            except OSError:
                if i + 1 == len(addresses):
                    raise
                continue
            self.watch(sock, fetch)
            return sock
        raise AssertionError("a name that resolves has an address")

    def watch(self, sock: socket.socket, fetch: Fetch) -> None:
        """Have the reaper end this socket at the fetch's deadline."""
        assert fetch.deadline is not None
        self._sockets[id(sock)] = fetch.deadline, sock

    def release(self, fetch: Fetch) -> None:
        """End the fetch's turn at its host, if it has one."""
        if fetch.turn is not None:
            self.turns.give(fetch.turn)
            fetch.turn = None

    def before(self, url: str, fetch: Fetch) -> None:
        """Before a hop: robots.txt, then a turn at its host."""
        host = urlsplit(url).hostname or ""
        fetch.final_url = url
        if time.monotonic() >= fetch.until:
            raise RefusedError("shard_deadline: the shard's time was over before this URL's turn")
        if self.own(host):
            fetch.deadline = fetch.deadline or self._deadline()
            return
        if self.config.robots_txt and not fetch.is_robots and not self.robots.allows(url):
            raise RefusedError(f"opted_out: robots.txt of {host} disallows this URL")
        self.release(fetch)
        if not self.turns.take(host, fetch.until):
            raise RefusedError(f"shard_deadline: no turn at {host} came in time")
        fetch.turn = host
        fetch.deadline = fetch.deadline or self._deadline()

    def _deadline(self) -> float:
        return min(time.monotonic() + self.config.deadline_seconds, self.until)

    def _read_robots(self, url: str) -> bytes:
        request = urllib.request.Request(url)
        request.fetch = Fetch(url, self.until, ROBOTS_BYTES, is_robots=True)  # type: ignore[attr-defined]
        with urllib.request.urlopen(request, timeout=self.config.timeout_seconds) as answer:
            return bytes(answer.read())

    def _reap(self) -> None:
        while True:
            time.sleep(REAP_SECONDS)
            now = time.monotonic()
            for key, (deadline, sock) in list(self._sockets.items()):
                if now > deadline:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                if now > deadline or sock.fileno() < 0:  # over, closed, or handed on to TLS
                    self._sockets.pop(key, None)


def check_deadline(fetch: Fetch) -> None:
    """Refuse what took too long."""
    if fetch.deadline is not None and time.monotonic() >= fetch.deadline:
        shard = fetch.deadline >= fetch.until
        raise RefusedError(f"{'shard_deadline' if shard else 'timeout'}: the whole fetch took too long")


def check_headers(headers: Message, fetch: Fetch, guard: Guard) -> None:
    """Refuse an answer whose owner has opted out."""
    if not fetch.is_robots and (found := opted_out(headers, guard.config.user_agent)):
        raise RefusedError(f"opted_out: {found}")
