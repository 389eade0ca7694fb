"""Hosts are asked by few at once, not too often, and as their robots.txt says."""

import threading
import time
import urllib.error
from email.message import Message
from itertools import pairwise

import pytest

from data_curation.politeness import Robots, Turns


def test_a_host_has_so_many_turns_and_others_do_not_wait_for_it() -> None:
    turns = Turns(2, 0)
    soon = time.monotonic() + 0.05
    assert turns.take("a.org", soon)
    assert turns.take("a.org", soon)
    assert not turns.take("a.org", soon)
    assert turns.take("b.org", soon + 1)
    turns.give("a.org")
    assert turns.take("a.org", soon + 1)


def test_starts_are_apart_and_a_turn_that_would_come_too_late_is_none() -> None:
    turns = Turns(8, 0.05)
    starts: list[float] = []

    def ask() -> None:
        if turns.take("a.org", time.monotonic() + 5):
            starts.append(time.monotonic())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    starts.sort()
    assert all(b - a > 0.045 for a, b in pairwise(starts))
    turns.slow_down("a.org", 30)
    assert turns.take("a.org", time.monotonic() + 5)
    assert not turns.take("a.org", time.monotonic() + 5)


def test_robots_txt_is_read_once_and_obeyed() -> None:
    read: list[str] = []

    def reader(url: str) -> bytes:
        read.append(url)
        return b"User-agent: t2i-lifecycle\nDisallow: /private/\nCrawl-delay: 7\n\nUser-agent: *\nDisallow: /\n"

    turns = Turns(1, 0)
    robots = Robots(reader, "t2i-lifecycle", turns)
    assert robots.allows("http://a.org/x.png")
    assert not robots.allows("http://a.org/private/x.png")
    assert not Robots(reader, "anotherbot", turns).allows("http://a.org/x.png")
    assert read == ["http://a.org/robots.txt"] * 2
    assert turns._delays == {"a.org": 7.0}


@pytest.mark.parametrize(("status", "allowed"), [(404, True), (403, True), (503, None), (429, None)])
def test_no_robots_txt_allows_and_a_failing_server_does_not(status: int, allowed: bool | None) -> None:
    def reader(url: str) -> bytes:
        raise urllib.error.HTTPError(url, status, "", Message(), None)

    robots = Robots(reader, "t2i-lifecycle", Turns(1, 0))
    if allowed is None:
        with pytest.raises(OSError, match=str(status)):
            robots.allows("http://a.org/x.png")
    else:
        assert robots.allows("http://a.org/x.png")
