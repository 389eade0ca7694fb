"""A Prefect server on loopback for the length of a run, or the one that is already there."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import ConfigError, LifecycleError

START_SECONDS = 180.0
STOP_SECONDS = 5.0
STATE = "server.json"
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # people read our lines, the UI has Prefect's
}
UNUSED_SERVICES = (
    "SCHEDULER",
    "LATE_RUNS",
    "FOREMAN",
    "TRIGGERS",
    "CANCELLATION_CLEANUP",
    "REPOSSESSOR",
    "PAUSE_EXPIRATIONS",
)
PR_SET_PDEATHSIG = 1


class PrefectServer:
    """One server process on 127.0.0.1; `wait` for it, use `url`, `stop` it."""

    def __init__(self, home: Path, port: int | None = None, all_services: bool = False) -> None:
        self.home = home
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        if port is not None and _taken(port):
            raise ConfigError(f"port {port} on 127.0.0.1 is in use; choose another one with --port")
        home.mkdir(parents=True, exist_ok=True)
        services = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNUSED_SERVICES}
        environment = {**os.environ, **QUIET, **({} if all_services else services), "PREFECT_HOME": str(home)}
        environment |= {"PREFECT_UI_API_URL": self.url, "PREFECT_LOGGING_LEVEL": "WARNING"}
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "warning"]
        self.log = home / "server.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
            )

    def wait(self) -> None:
        """Return when the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while not healthy(self.url):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                raise LifecycleError(
                    f"the Prefect server did not start: {' '.join(tail)}; {self.log} has more, try again"
                )
            time.sleep(0.1)
        (self.home / STATE).write_text(json.dumps({"url": self.url, "pid": self.process.pid}))

    def stop(self) -> None:
        """End the process, by force if it takes long."""
        (self.home / STATE).unlink(missing_ok=True)
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """The API address for a run: PREFECT_API_URL, else a server at work on this home, else one of our own."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    os.environ.setdefault("PREFECT_HOME", str(home))
    given = os.environ.get("PREFECT_API_URL") or _running(home)
    server = None if given else PrefectServer(home)
    url = given or (server.url if server else "")
    os.environ["PREFECT_API_URL"] = url
    try:
        from prefect.settings import (
            PREFECT_API_URL,
            PREFECT_HOME,
            temporary_settings,
        )  # slow, as the server is: both at once

        if server is not None:
            server.wait()
        with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: os.environ["PREFECT_HOME"]}):
            try:
                yield url
            finally:
                _send_logs()
    finally:
        if server is not None:
            del os.environ["PREFECT_API_URL"]
            server.stop()


def _send_logs() -> None:
    """Let Prefect's log lines reach the server while it is there."""
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()


def home_of(root: str) -> Path:
    """Where Prefect keeps its database for runs under `root`."""
    if "://" in root and not root.startswith("file://"):
        return Path.home() / ".cache" / "t2i" / "prefect"
    from infra.local_files import local_path

    return local_path(root) / ".prefect"


def healthy(url: str) -> bool:
    """Whether a Prefect API answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _running(home: Path) -> str | None:
    try:
        url = str(json.loads((home / STATE).read_text())["url"])
    except (OSError, ValueError, KeyError):
        return None
    return url if healthy(url) else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _die_with_parent() -> None:
    """Linux: get SIGTERM when the process that started us ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
