"""A proxy before an S3 server that spoils a share of the answers: 500, 503, slow, cut off; and one lost after the deed."""

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

SLOW_SECONDS = 1.0
FAULTS = ("500", "503", "slow", "cut", "lost")
HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class FaultyS3:
    """Listens on loopback; `url` is its address, `faults` counts what it did."""

    def __init__(self, target: str, share: float, seed: int = 0) -> None:
        self.target, self.share = urlparse(target), share
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.requests, self.faults = 0, dict.fromkeys(FAULTS, 0)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                owner.answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def handle_expect_100(self) -> bool:
                return super().handle_expect_100()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def choose(self) -> str | None:
        with self.lock:
            self.requests += 1
            if self.random.random() >= self.share:
                return None
            fault = self.random.choice(FAULTS)
            self.faults[fault] += 1
            return fault

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.choose()
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "SlowDown"
            return self.send(request, int(fault), {}, f"<Error><Code>{code}</Code></Error>".encode())
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        link = http.client.HTTPConnection(self.target.hostname or "", self.target.port, timeout=60)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
        link.request(request.command, request.path, body, headers)
        got = link.getresponse()
        data, head = got.read(), {name: value for name, value in got.getheaders() if name.lower() not in HOP}
        link.close()
        if fault == "lost":  # done, but nobody hears of it
            request.close_connection = True
            return request.connection.close()
        length = got.getheader("Content-Length") if request.command == "HEAD" else str(len(data))
        return self.send(request, got.status, head | {"Content-Length": length or "0"}, data, fault == "cut")

    def send(self, request: BaseHTTPRequestHandler, status: int, head: dict, body: bytes, cut: bool = False) -> None:
        request.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | head).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        request.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            request.close_connection = True

    def close(self) -> None:
        self.server.shutdown()
