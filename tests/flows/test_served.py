"""`t2i up` on Postgres behind a password: the form in a browser, the run it starts, the watch over silent and failed runs."""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from infra.embedded import AUTH, environment, free_port, healthy, quiet_environment

pytestmark = [pytest.mark.lifecycle, pytest.mark.prefect, pytest.mark.timeout(900)]
FOLDER = Path(__file__).parent
PASSWORD = "admin:a-long-password"
SHORT = ["personalize=[]", "mix=[]", "distill=[]", "distill_pairs=[]", "compare=null", "evaluate.subjects=[]"]
PICTURES = os.environ.get("T2I_SCREENSHOTS")


@pytest.fixture(scope="module")
def told():
    """A chat's webhook: what it was told."""
    bodies = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_): ...

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", bodies
    server.shutdown()


@pytest.fixture(scope="module")
def served(tmp_path_factory, told, until):
    sys.path.insert(0, str(FOLDER))
    from postgres import missing, postgres

    sys.path.remove(str(FOLDER))
    if why := missing():
        pytest.skip(why)
    root, port = tmp_path_factory.mktemp("served") / "root", free_port()
    preset = FOLDER.parents[1] / "presets" / "smoke.yaml"
    command = [sys.executable, "-m", "flows.cli", "up", str(preset), "--root", str(root), "--port", str(port)]
    for each in SHORT:
        command += ["--set", each]
    with postgres("a-password-of-postgres") as database:
        values = {
            **os.environ, "PYTHONPATH": str(FOLDER.parents[1]), AUTH: PASSWORD,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        }  # fmt: skip
        values.pop("PREFECT_API_URL", None)
        up = subprocess.Popen(
            [*command, "--notify", told[0], "--silent", "60"], env=values, start_new_session=True, cwd=root.parent
        )
        url = f"http://127.0.0.1:{port}/api"
        try:
            until(lambda: up.poll() is not None or healthy(url))
            with environment({**quiet_environment(), "PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": PASSWORD}):
                yield url, root
        finally:
            os.killpg(up.pid, signal.SIGTERM)
            up.wait(30)


@pytest.fixture
def client(served):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: served[0], PREFECT_API_AUTH_STRING: PASSWORD}),
        get_client(sync_client=True) as client,
    ):
        yield client


@pytest.fixture
def page(served, browser):
    page = browser.new_page(viewport={"width": 1300, "height": 1800})
    page.goto(served[0].removesuffix("/api"))
    page.locator("input").first.fill(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard**")
    return page


def shown(page, name):
    """Keep a picture of the page where somebody wants to look."""
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def test_a_run_started_from_the_form_completes(served, client, page, until):
    url, root = served
    deployment = until(lambda: client.read_deployment_by_name("lifecycle/lifecycle"))
    assert deployment.tags == ["t2i"]
    assert deployment.global_concurrency_limit.limit == 1
    page.goto(f"{url.removesuffix('/api')}/v2/deployments/deployment/{deployment.id}/run")
    name = page.get_by_label("Name (Optional)", exact=True).first
    name.wait_for()
    labels = [text.removesuffix(" (Optional)") for text in page.locator("label").all_inner_texts()]
    shown(page, "form")
    order = [labels.index(each) for each in ("config", "Name", "Data", "Source", "Judge", "Pretrain", "Posttrain",
                                             "Evaluate", "Export", "Report", "Run", "force")]  # fmt: skip
    assert order == sorted(order)  # as written in the code, not as Postgres keeps it
    assert page.get_by_text("Every stage's settings").is_visible()
    assert page.get_by_role("tab").all_inner_texts()[:3] == ["Demo web", "List source", "Folder source"]
    name.fill("from-the-form")
    page.get_by_role("button", name="Submit").click()
    run = until(lambda: client.read_flow_runs(limit=1))[0]
    assert run.parameters["config"]["name"] == "from-the-form"
    until(lambda: client.read_flow_run(run.id).state.is_final(), 600)
    page.goto(f"{url.removesuffix('/api')}/v2/runs/flow-run/{run.id}")
    page.wait_for_timeout(4000)
    shown(page, "run")
    assert client.read_flow_run(run.id).state_name == "Completed"
    artifacts = {artifact.key: artifact for artifact in client.read_artifacts() if artifact.key}
    assert {"stages", "samples", "report", "progress-pretrain-32"} <= artifacts.keys()
    assert {row["stage"] for row in json.loads(artifacts["stages"].data)} >= {"source", "sft", "report"}
    page.goto(f"{url.removesuffix('/api')}/v2/artifacts/artifact/{artifacts['samples'].id}")
    page.locator("img[src^='data:image/png']").first.wait_for()
    shown(page, "samples")
    records = [json.loads(path.read_text()) for path in (root / "runs").glob("from-the-form-*.json")]
    assert [record["outcome"] for record in records] == ["ok"]


def test_the_door_is_shut_without_the_password(served):
    import http.client

    port = int(served[0].split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/api/flow_runs/filter", "{}", {"Content-Type": "application/json"})
    assert connection.getresponse().status == 401
    connection.close()


def test_a_failed_run_is_told(served, client, told, until):
    deployment = until(lambda: client.read_deployment_by_name("stage/stage"))
    run = client.create_flow_run_from_deployment(deployment.id, parameters={"run_id": "nobody"})
    until(lambda: client.read_flow_run(run.id).state.is_final())
    assert client.read_flow_run(run.id).state_name == "Failed"
    body = until(lambda: next((each for each in told[1] if "stage run" in each["text"]), None), 60)
    assert body["text"].endswith("is Failed")
    assert str(run.id) in body["run"]


def _training(served, client, until, name, seed):
    """A run that is in the middle of a long training, and its processes."""
    import psutil

    deployment = until(lambda: client.read_deployment_by_name("lifecycle/lifecycle"))
    config = {**deployment.parameters["config"], "name": name, "seed": seed}
    config["pretrain"][0]["train"]["steps"] = 100_000
    scratch = served[1] / ".scratch"
    before = set(scratch.glob("pretrain-32-*"))
    run = client.create_flow_run_from_deployment(deployment.id, parameters={"config": config})
    until(
        lambda: [
            each for each in scratch.glob("pretrain-32-*/work/checkpoints/step-*") if each.parents[2] not in before
        ]
    )
    process = next(each for each in psutil.process_iter(["environ"]) if _flow_run(each) == str(run.id))
    return run, [process, *process.children(recursive=True)]


def test_a_cancelled_run_leaves_no_process(served, client, until):
    from prefect.states import Cancelling

    run, family = _training(served, client, until, "cancelled", 7)
    client.set_flow_run_state(run.id, Cancelling())  # what the Cancel button does
    until(lambda: client.read_flow_run(run.id).state_name == "Cancelled", 30)
    until(lambda: not any(each.is_running() for each in family), 30)
    record = next(json.loads(path.read_text()) for path in (served[1] / "runs").glob("cancelled-*.json"))
    assert record["outcome"] == "interrupted"


def test_a_run_that_falls_silent_is_called_crashed_and_told(served, client, told, until):
    run, family = _training(served, client, until, "silent", 8)
    try:
        for each in family:
            each.suspend()  # neither dead nor alive: only the missing heartbeat tells
        until(lambda: client.read_flow_run(run.id).state_name == "Crashed", 300)
        assert "no heartbeat for 60 s" in client.read_flow_run(run.id).state.message
        until(lambda: any(str(run.id) in each["run"] and each["text"].endswith("Crashed") for each in told[1]), 60)
    finally:
        for each in family:
            each.kill()


def _flow_run(process):
    return (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID")
