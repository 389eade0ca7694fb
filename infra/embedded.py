"""Services for the length of a run: a Prefect server on loopback with its UI, and a local Ray behind a token.

Both end with the thread that started them, also when that is killed: start them on the main thread or one that waits.
"""

import http.client
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlparse

from infra.errors import ConfigError, LifecycleError
from infra.prefect_template import keep_template, start_from_template
from infra.stages import Resources

log = logging.getLogger(__name__)

START_SECONDS = 180.0
STOP_SECONDS = 5.0
OBJECT_STORE_BYTES = 200_000_000
STATE = "server.json"
UNUSED_SERVICES = (
    "SCHEDULER",
    "LATE_RUNS",
    "FOREMAN",
    "TRIGGERS",
    "CANCELLATION_CLEANUP",
    "REPOSSESSOR",
    "PAUSE_EXPIRATIONS",
)
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray takes 127.0.0.1 for this machine, on any system
AUTH = "PREFECT_SERVER_API_AUTH_STRING"
_CREDENTIALS = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_PROFILE")


def quiet_environment() -> dict[str, str]:
    """Variables for every process we start: no telemetry, no notices, short polls, no proxy for loopback."""
    bypass = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = ",".join([part for part in bypass.split(",") if part] + ["127.0.0.1", "localhost"])
    return {
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "NO_PROXY": bypass if "127.0.0.1" in bypass else hosts,
        "no_proxy": bypass if "127.0.0.1" in bypass else hosts,
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # people read our lines, the UI has Prefect's
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables (None removes one) and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    _assign(values)
    try:
        yield
    finally:
        _assign(before)


def _assign(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_taken(port: int) -> bool:
    """Whether a port on 127.0.0.1 cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def healthy(url: str) -> bool:
    """Whether a Prefect API answers at `url` (no proxy is asked)."""
    parsed = urlparse(url)
    kind = http.client.HTTPSConnection if parsed.scheme == "https" else http.client.HTTPConnection
    try:
        with closing(kind(parsed.hostname or "", parsed.port, timeout=5)) as connection:
            connection.request("GET", f"{parsed.path.rstrip('/')}/health")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def refuse_open_door(host: str, password: str) -> None:
    """A server that others can reach must ask for a password."""
    if host not in ("127.0.0.1", "localhost", "::1") and ":" not in password.strip(":"):
        raise ConfigError(
            f"a server on {host} can be reached from other machines and would let everybody start code here; "
            f"set {AUTH}=user:password first, or stay on 127.0.0.1"
        )


class PrefectServer:
    """One server process, starting at once: do other work, then `wait`, use `url`, `stop`.

    It listens on 127.0.0.1, or on `host`, which must be loopback unless `more` (its environment) asks for a password.
    """

    def __init__(
        self, home: Path, port: int | None = None, all_services: bool = False, host: str = "127.0.0.1",
        more: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        refuse_open_door(host, (more or {}).get(AUTH, ""))
        if port is not None and port_taken(port):
            raise ConfigError(f"port {port} on 127.0.0.1 is in use; choose another one with --port")
        self.home = home.absolute()
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.log = self.home / "server.log"
        self.shared = all_services  # a run's own server ends with it, so no other run may lean on it
        self.home.mkdir(parents=True, exist_ok=True)
        self._is_new = not start_from_template(self.home)
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "infra.prefect_process", host, str(self.port), str(os.getpid())],
                env={**self._environment(all_services), **(more or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                cwd=self.home,
                start_new_session=True,  # Ctrl-C goes to the run, which then stops the server
            )

    def _environment(self, all_services: bool) -> dict[str, str]:
        values = {name: value for name, value in os.environ.items() if name not in _CREDENTIALS} | quiet_environment()
        if not all_services:
            values |= {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNUSED_SERVICES}
        here = str(Path(__file__).resolve().parents[1])
        return values | {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.url,
            "PREFECT_UI_API_URL": self.url,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self.home / 'prefect.db'}",
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": self.url.removesuffix("/api"),  # other pages cannot start flows
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }

    def wait(self) -> None:
        """Return when the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while not healthy(self.url):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = " ".join(self.log.read_text(errors="replace").strip().splitlines()[-1:])
                raise LifecycleError(f"the Prefect server did not start: {tail}; {self.log} has more, run `t2i doctor`")
            time.sleep(0.05)
        if self.shared:
            (self.home / STATE).write_text(json.dumps({"url": self.url, "pid": self.process.pid}))
        if self._is_new:
            keep_template(self.home)

    def stop(self) -> None:
        """End the process and its group, by force if it takes long."""
        if self.shared:
            (self.home / STATE).unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
            try:
                self.process.wait(STOP_SECONDS)
                return
            except subprocess.TimeoutExpired:
                log.debug("Prefect server did not end on signal %s", number)


@contextmanager
def prefect_server(home: Path, port: int | None = None) -> Iterator[str]:
    """The API address for a run: PREFECT_API_URL, else the server of `t2i up` on this home, else one of our own."""
    given = os.environ.get("PREFECT_API_URL") or _running(home)
    server = None if given else PrefectServer(home, port)
    url = given or (server.url if server else "")
    values: dict[str, str | None] = {**quiet_environment(), "PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
    if server is not None:
        values |= dict.fromkeys(_CREDENTIALS)
    try:
        with environment(values):
            from prefect import settings  # slow, as the server's start is: both at once

            if server is not None:
                server.wait()
            with settings.temporary_settings({settings.PREFECT_API_URL: url, settings.PREFECT_HOME: str(home)}):
                try:
                    yield url
                finally:
                    _send_the_rest()
    finally:
        if server is not None:
            server.stop()


def _running(home: Path) -> str | None:
    try:
        url = str(json.loads((home / STATE).read_text())["url"])
    except (OSError, ValueError, KeyError):
        return None
    return url if healthy(url) else None


def _send_the_rest() -> None:
    """Let Prefect's queued events (the states of tasks) and log lines reach the server while it is there."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=STOP_SECONDS)


@contextmanager
def local_ray(resources: Resources, dashboard: bool = False) -> Iterator[None]:
    """Ray for the length of a run: the one at `ray_address`, or a quiet local one that asks for a token."""
    threads = str(resources.threads_per_worker)  # two processes of two threads on two cores are slower than one
    values: dict[str, str | None] = {**quiet_environment(), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if resources.ray_address is None:
        values |= {"RAY_ADDRESS": None, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
                   LOOPBACK_ONLY: "0"}  # fmt: skip
    with environment(values):
        import ray
        from ray._private import ray_constants
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        ray_constants.ENABLE_RAY_CLUSTER = (
            resources.ray_address is not None
        )  # as LOOPBACK_ONLY, had Ray been imported now
        Config.initialize("")  # Ray keeps mode and token from when it was imported, or from an earlier session
        AuthenticationTokenLoader.instance().reset_cache()
        if resources.ray_address is not None:
            ray.init(address=resources.ray_address, log_to_driver=False, logging_level=logging.ERROR)
            folder = None
        else:
            folder = tempfile.mkdtemp(prefix="t2i-ray-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
            ray.init(
                num_cpus=(os.cpu_count() or 1) + resources.num_workers,  # waiting trainers must not starve other tasks
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
            )
        try:
            yield
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
