"""The fetch policy refuses every way to a non-public address, on the URL and at connection time."""

import http.server
import socket
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from infra import net
from infra.errors import DataRefused
from infra.net import check_url, guard_sockets, is_public


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "2002:7f00:1::", "64:ff9b::7f00:1", "fd00:ec2::254",
        "192.0.0.192", "::127.0.0.1", "::ffff:0:127.0.0.1", "::10.0.0.1", "2001:db8::1", "5f00::1", "4000::1",
    ],
)  # fmt: skip
def test_non_public_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://8.8.8.8/x", "gopher://8.8.8.8", "data:text/plain,x", "//8.8.8.8/x", "http://", "http:///x",
        "http://127.0.0.1/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/", "http://[::1]/",
        "http://[::ffff:7f00:1]/", "http://169.254.169.254/latest/meta-data", "http://localhost:8080/", "http://0/",
        "http://user:pw@8.8.8.8/", "http://8.8.8.8:99999/", "http://8.8.8.8 /", "http://[::1", "http://8.8.8.8\\@127.0.0.1/",
    ],
)  # fmt: skip
def test_refused_urls(url: str) -> None:
    with pytest.raises(DataRefused):
        check_url(url)


def test_a_name_that_points_both_ways_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("8.8.8.8", "127.0.0.1")]

    monkeypatch.setattr(net, "_getaddrinfo", answer)
    with pytest.raises(DataRefused, match="127.0.0.1, not a public address"):
        check_url("http://example.com/a.png")


def test_allowed_urls() -> None:
    assert check_url("https://8.8.8.8/a.png") == ["8.8.8.8"]
    for entry in ("127.0.0.1:8080", "127.0.0.1", "127.0.0.0/8"):
        assert check_url("http://127.0.0.1:8080/a.png", [entry]) == ["127.0.0.1"]
    with pytest.raises(DataRefused):
        check_url("http://127.0.0.1:8081/a.png", ["127.0.0.1:8080"])


@pytest.fixture
def local_port() -> Iterator[int]:
    """A web server on loopback."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_guarded_sockets_refuse_at_the_connection(local_port: int) -> None:
    undo = guard_sockets([])
    try:
        with pytest.raises(OSError, match="not a public address"):
            urllib.request.urlopen(f"http://127.0.0.1:{local_port}/", timeout=2)
        with socket.socket() as sock, pytest.raises(PermissionError):
            sock.connect(("localhost", local_port))
        left, right = socket.socketpair()
        left.close()
        right.close()
    finally:
        undo()
    with socket.create_connection(("127.0.0.1", local_port), timeout=2):
        pass


def test_guarded_sockets_let_the_allowed_through(local_port: int) -> None:
    undo = guard_sockets([f"127.0.0.1:{local_port}"])
    try:
        with socket.create_connection(("127.0.0.1", local_port), timeout=2):
            pass
    finally:
        undo()
