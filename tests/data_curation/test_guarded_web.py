"""What the guard lets img2dataset's urllib reach."""

import contextlib
import http.server
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from benchmarks.hostile_input import forbidden_connects
from data_curation.config import DownloadConfig
from data_curation.fetch_process import classify
from data_curation.guard import RefusedError
from data_curation.guarded_web import install_guard


class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: C901, PLR0915 - one case a page
        match self.path:
            case "/away":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/fine")
                self.end_headers()
            case "/file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
            case "/hop":
                self.send_response(302)
                self.send_header("X-Robots-Tag", "max-image-preview: large, noai")
                self.send_header("Location", "/fine")
                self.end_headers()
            case "/login":
                self.send_response(302)
                self.send_header("Location", "http://user:pw@pinned.test/fine")
                self.end_headers()
            case "/noai" | "/reserved":
                self.send_response(200)
                self.send_header(*(("X-Robots-Tag", "noai;") if self.path == "/noai" else ("tdm-reservation", "1")))
                self.end_headers()
            case "/slow-header":
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        self.wfile.write(b"x")
                        time.sleep(0.05)
            case "/huge":
                self.send_response(200)
                self.send_header("Content-Length", "9000000")
                self.end_headers()
            case "/endless":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(b"x" * 1000)
            case "/drip":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                        time.sleep(0.05)
            case "/short":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"x" * 10)
            case _:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(self.headers["User-Agent"].encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    config = DownloadConfig(max_bytes=10_000, deadline_seconds=2, user_agent="an honest name")
    install_guard(config, {"pinned.test": f"127.0.0.1:{server.server_port}"})
    yield server.server_port
    urllib.request.install_opener(None)  # type: ignore[arg-type]
    server.shutdown()
    server.server_close()


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=2) as answer:
        return bytes(answer.read())


def test_a_pinned_name_is_reached_under_our_own_name(port: int) -> None:
    assert fetch("http://pinned.test/fine") == b"an honest name"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:{port}/fine", "refused_address"), ("http://localhost:{port}/fine", "refused_address"),
        ("http://[::1]:{port}/", "refused_address"), ("http://169.254.169.254/latest", "refused_address"),
        ("http://pinned.test/away", "refused_address"), ("http://pinned.test/huge", "oversize"),
        ("http://pinned.test/endless", "oversize"), ("http://pinned.test/drip", "timeout"),
        ("http://pinned.test/slow-header", "timeout"), ("http://pinned.test/hop", "opted_out"),
        ("http://pinned.test/noai", "opted_out"), ("http://pinned.test/reserved", "opted_out"),
        ("http://pinned.test/login", "bad_url"), ("http://pinned.test/short", "truncated"), ("file:///etc/hostname", "bad_url"),
        ("ftp://pinned.test/x", "bad_url"), ("http://pinned.test/file", "http_302"),
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_its_reason(port: int, url: str, reason: str) -> None:
    with pytest.raises((RefusedError, urllib.error.URLError)) as caught:
        fetch(url.format(port=port))
    assert classify(str(caught.value)) == reason


def test_sixty_private_targets_straight_and_by_redirect_get_no_connection() -> None:
    found = forbidden_connects()
    assert (found["targets"], found["requests"]) == (60, 240)
    assert (found["connects"], found["connected_to"], found["reached"]) == (0, [], [])
