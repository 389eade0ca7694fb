"""Politeness: few connections to a host at once, a pause between two starts, and its robots.txt (RFC 9309) obeyed.

Limits hold for one download process. robots.txt is read by Python's parser, which knows path prefixes, no wildcards.
Left out: sitemaps; a Crawl-delay is obeyed as the pause, up to a minute.
"""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.robotparser
from collections import defaultdict
from collections.abc import Callable
from urllib.parse import urlsplit

LONGEST_DELAY = 60.0
Read = Callable[[str], bytes]  # URL -> body; raises HTTPError for an answer that is none


class Turns:
    """Who may ask a host now; `take` waits, `give` lets the next one on."""

    def __init__(self, per_host: int, interval_seconds: float) -> None:
        self._interval = interval_seconds
        self._slots: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(per_host))
        self._delays: dict[str, float] = {}
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def slow_down(self, host: str, seconds: float) -> None:
        """The host asked for a pause of so many seconds between two requests."""
        self._delays[host] = min(max(seconds, self._interval), LONGEST_DELAY)

    def take(self, host: str, until: float) -> bool:
        """Wait for a turn, but not beyond `until` (monotonic); whether it came."""
        with self._lock:
            slot = self._slots[host]
        if not slot.acquire(timeout=max(0.0, until - time.monotonic())):
            return False
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next.get(host, now))
            self._next[host] = start + self._delays.get(host, self._interval)
        if start > until:
            slot.release()
            return False
        time.sleep(start - now)
        return True

    def give(self, host: str) -> None:
        """End a turn."""
        self._slots[host].release()


class Robots:
    """What each host's robots.txt allows us; read once per host and process."""

    def __init__(self, read: Read, token: str, turns: Turns) -> None:
        self._read, self._token, self._turns = read, token, turns
        self._rules: dict[str, urllib.robotparser.RobotFileParser] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def allows(self, url: str) -> bool:
        """Whether we may ask for `url`; raises OSError while the host's robots.txt cannot be had (5xx)."""
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            mine = self._locks[place]
        with mine:
            if place not in self._rules:
                self._rules[place] = self._load(place, parts.hostname or "")
        return self._rules[place].can_fetch(self._token, url)

    def _load(self, place: str, host: str) -> urllib.robotparser.RobotFileParser:
        rules = urllib.robotparser.RobotFileParser()
        try:
            text = self._read(f"{place}/robots.txt").decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            if error.code >= 500 or error.code == 429:
                raise
            text = ""  # RFC 9309: no robots.txt, no rules
        rules.parse(text.splitlines())
        if (delay := rules.crawl_delay(self._token)) is not None:
            self._turns.slow_down(host, float(delay))
        return rules
