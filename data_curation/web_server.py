"""The demo web's server: answers from web.parquet, on the loopback interface, for as long as the context lasts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq

from infra.errors import ConfigError

Answer = tuple[bytes, int, str]  # body, status, content type
NOT_FOUND: Answer = (b"not found", 404, "text/plain")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True
    answers: dict[str, Answer]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up early (a refused body) is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Send the stored answer."""
        body, status, content_type = self.server.answers.get(self.path, NOT_FOUND)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: every answer is in the manifest."""


@contextlib.contextmanager
def serve(folder: Path, port: int | None = None) -> Iterator[str]:
    """Serve a source folder's web.parquet; yields host:port. None takes any free port."""
    table = pq.read_table(folder / "web.parquet", page_checksum_verification=True)
    columns = (table[name].to_pylist() for name in ("path", "body", "status", "content_type"))
    try:
        server = _Server(("127.0.0.1", port or 0), _Handler)
    except OSError as error:
        raise ConfigError(
            f"demo web: port {port} on 127.0.0.1 cannot be used ({error.strerror}); stop what listens there, "
            "set download.port to another one, or to null for any free port"
        ) from error
    server.answers = {path: (body, status, kind) for path, body, status, kind in zip(*columns, strict=True)}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
