"""A real Prefect server and a real Ray: they start, are quiet, and are gone afterwards, also after SIGKILL."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra import prefect_template
from infra.embedded import PrefectServer, environment, healthy, local_ray, prefect_server, quiet_environment
from infra.errors import ConfigError, LifecycleError
from infra.stages import Resources


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(templates: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """One template of Prefect's database for the tests here: only the first server migrates. No server is given."""
    monkeypatch.setenv("T2I_CACHE", templates)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return templates


def _gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2I_ONE", "1")
    monkeypatch.delenv("T2I_TWO", raising=False)
    with environment({"T2I_ONE": None, "T2I_TWO": "2"}):
        assert ("T2I_ONE" not in os.environ, os.environ["T2I_TWO"]) == (True, "2")
    assert (os.environ["T2I_ONE"], "T2I_TWO" in os.environ) == ("1", False)


def test_quiet_environment_keeps_the_proxy_away_from_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intra.net")
    values = quiet_environment()
    assert values["NO_PROXY"] == "intra.net,127.0.0.1,localhost"
    assert values["DO_NOT_TRACK"] == "1"
    assert values["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use; choose another"):
            PrefectServer(tmp_path, port)


def test_a_server_that_cannot_start_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LifecycleError, match="did not start.*server.log"):
        PrefectServer(tmp_path).wait()


@pytest.mark.prefect
def test_prefect_serves_api_and_ui_on_loopback_and_ends(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "a key of some cloud")
    with prefect_server(tmp_path / "home") as url:
        assert os.environ["PREFECT_API_URL"] == url
        assert "PREFECT_API_KEY" not in os.environ
        from prefect import flow, task
        from prefect.client.orchestration import get_client

        @flow
        def doubled(number: int) -> int:
            return int(task(lambda value: value * 2, name="double")(number))

        assert doubled(21) == 42
        with get_client(sync_client=True) as client:
            assert [run.state_name for run in client.read_flow_runs()] == ["Completed"]
        port = int(url.split(":")[2].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/v2/", headers={"Accept": "text/html"})
        assert b"<html" in connection.getresponse().read().lower()
        connection.close()
        listening = [item for item in psutil.net_connections("tcp") if item.laddr and item.laddr.port == port]
        assert {item.laddr.ip for item in listening if item.status == "LISTEN"} == {"127.0.0.1"}
    assert not healthy(url)
    assert os.environ["PREFECT_API_KEY"] == "a key of some cloud"
    assert list(Path(cache).glob("prefect-*.db"))


@pytest.mark.prefect
@pytest.mark.usefixtures("cache")
def test_a_run_leans_on_the_server_of_up_but_not_on_another_run_s(tmp_path: Path) -> None:
    of_run, of_up = PrefectServer(tmp_path / "one"), PrefectServer(tmp_path / "two", all_services=True)
    try:
        of_run.wait(), of_up.wait()
        with prefect_server(tmp_path / "two") as url:
            assert url == of_up.url
        assert healthy(of_up.url)
        with prefect_server(tmp_path / "one") as url:
            assert url != of_run.url
        assert healthy(of_run.url)
    finally:
        of_run.stop(), of_up.stop()


@pytest.mark.prefect
def test_prefect_ends_with_a_killed_parent(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time; from pathlib import Path; from infra.embedded import PrefectServer\n"
        "server = PrefectServer(Path(sys.argv[1])); print(server.process.pid, flush=True); server.wait()\n"
        "print('up', flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert _gone(pid)


@pytest.mark.ray
def test_ray_is_quiet_asks_for_a_token_and_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    folders = set(Path("/tmp").glob("t2i-ray-*"))
    with local_ray(Resources(num_workers=1)):
        import ray

        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = [at.laddr.ip for each in family for at in each.net_connections("tcp") if at.status == "LISTEN"]
        assert len(listening) > 3  # head, raylet, agents
        assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}
        address = ray.get_runtime_context().gcs_address
        stranger = subprocess.run(
            [sys.executable, "-c", f"import ray; ray.init(address='{address}', logging_level='CRITICAL'); print('in')"],
            env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert stranger.returncode != 0
        assert "in" not in stranger.stdout.split()
    assert not ray.is_initialized()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert set(Path("/tmp").glob("t2i-ray-*")) == folders
    assert capfd.readouterr().out == ""


def test_a_new_home_starts_from_the_kept_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "home"
    home.mkdir()
    assert not prefect_template.start_from_template(home)
    (tmp_path / "cache").mkdir()
    prefect_template.template().write_bytes(b"a database")
    assert prefect_template.start_from_template(home)
    assert (home / "prefect.db").read_bytes() == b"a database"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5"])
@pytest.mark.parametrize(
    "password", [{}, {"PREFECT_SERVER_API_AUTH_STRING": ""}, {"PREFECT_SERVER_API_AUTH_STRING": ":"}]
)
def test_no_server_beyond_loopback_without_a_password(tmp_path: Path, host: str, password: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"a server on {host} can be reached from other machines"):
        PrefectServer(tmp_path, host=host, more=password)
    assert not list(tmp_path.iterdir())
