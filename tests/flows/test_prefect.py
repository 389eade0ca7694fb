"""With a real Prefect server: names and edges of the graph, rerun of one stage, Retry of a failed run from its deployment."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import drive
from flows.config import LifecycleConfig, RunConfig
from flows.plan import plan
from flows.run import LogDisplay, Run
from infra.embedded import PrefectServer, prefect_server
from infra.errors import ConfigError, DataRefused
from infra.storage import open_store

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture
def counts(tmp_path, monkeypatch):
    path = tmp_path / "counts.txt"
    path.touch()
    monkeypatch.setenv("TOY_COUNTS", str(path))

    def taken():
        names = path.read_text().split()
        path.write_text("")
        return names

    return taken


@pytest.fixture
def lifecycle(server, tmp_path, monkeypatch):
    """The real flows over the toy DAG, whose report fails until a file is there."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import toys

    import flows.lifecycle
    import flows.stage

    config = LifecycleConfig(name="toy", run=RunConfig(root=str(tmp_path / "root")))
    specs = toys.toy_line(report=toys.ToyConfig(fail_unless=str(tmp_path / "ready")))
    for module in (flows.lifecycle, flows.stage):
        monkeypatch.setattr(module, "stage_specs", lambda _: specs)
        monkeypatch.setattr(module, "Run", functools.partial(Run, catalog=toys.toy_function))
    return config, specs


def test_failed_stage_is_rerun_alone_and_the_graph_shows_stages(lifecycle, counts, tmp_path):
    config, specs = lifecycle
    root = config.run.root
    rows = plan(specs, open_store(root))
    with pytest.raises(DataRefused, match="waits for"):
        drive.run_lifecycle(config, rows, [], LogDisplay())
    assert counts() == ["source", "judge", "pretrain", "sft", "report"]
    (tmp_path / "ready").touch()
    record = drive.run_stage("latest", "report", False, root, LogDisplay())
    assert counts() == ["report"]
    assert record["outcome"] == "ok"
    drive.run_lifecycle(config, [row.model_copy(update={"state": "RUN"}) for row in rows], [], LogDisplay())
    assert counts() == []
    drive.run_lifecycle(config, rows, ["pretrain"], LogDisplay())
    assert counts() == ["pretrain"]
    assert _edges()["sft"] == {"source", "pretrain"}


def test_what_a_stage_logs_is_its_task_s_log_without_secrets(lifecycle, counts, tmp_path, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter

    monkeypatch.setenv("TOY_API_KEY", "a-secret-of-many-letters")
    config, specs = lifecycle
    (tmp_path / "ready").touch()
    drive.run_lifecycle(config, plan(specs, open_store(config.run.root)), [], LogDisplay())
    run = _newest()
    with get_client(sync_client=True) as client:
        for _ in range(50):  # they are sent in the background
            lines = client.read_logs(LogFilter(flow_run_id={"any_": [run.id]}))
            ours = [line for line in lines if line.name == "tasks.toys"]
            if len(ours) == 3:
                break
            time.sleep(0.2)
    assert {line.message for line in ours} == {f"{stage}: makes 1 with ***" for stage in ("source", "judge", "report")}
    assert len({line.task_run_id for line in ours} - {None}) == 3
    told = {line.message: line.task_run_id for line in lines if line.name == "flows.run"}
    assert told["stage 3/5 pretrain: RUN (not made yet)"] is None


def _newest():
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def _edges():
    """Stage -> stages it takes results from, of the newest flow run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    newest = _newest()
    with get_client(sync_client=True) as client:
        for _ in range(50):  # the server writes task runs a moment later
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [newest.id]}))
            if len(tasks) == 5:
                break
            time.sleep(0.2)
    names = {task.id: task.name for task in tasks}
    assert set(names.values()) == {"source", "judge", "pretrain", "sft", "report"}
    return {
        task.name: {names[i.id] for each in task.task_inputs.values() for i in each if i.input_type == "task_run"}
        for task in tasks
    }


def test_retry_of_a_failed_deployment_run_executes_only_the_failed_stage(server, counts, tmp_path, until):
    from prefect.client.orchestration import get_client
    from prefect.states import AwaitingRetry

    environment = {
        **os.environ, "PREFECT_API_URL": server, "PREFECT_RUNNER_POLL_FREQUENCY": "1", "TOY_ROOT": str(tmp_path / "root"),
        "TOY_READY": str(tmp_path / "ready"), "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), str(FOLDER)]),
    }  # fmt: skip
    served = subprocess.Popen([sys.executable, str(FOLDER / "served_toys.py")], env=environment, start_new_session=True)
    try:
        with get_client(sync_client=True) as client:
            deployment = until(lambda: client.read_deployment_by_name("toy-line/toy"), 150)
            run = client.create_flow_run_from_deployment(deployment.id)
            until(lambda: client.read_flow_run(run.id).state_name == "Failed", 150)
            assert counts() == ["source", "judge", "pretrain", "sft", "report"]
            (tmp_path / "ready").touch()
            client.set_flow_run_state(run.id, AwaitingRetry(), force=True)  # what the Retry button does
            until(lambda: client.read_flow_run(run.id).state_name == "Completed", 150)
            assert counts() == ["report"]
            assert client.read_flow_run(run.id).run_count == 2
    finally:
        os.killpg(served.pid, signal.SIGTERM)
        served.wait(30)


def test_port_in_use_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match="in use"):
        PrefectServer(tmp_path, port=int(server.split(":")[2].split("/")[0]))
