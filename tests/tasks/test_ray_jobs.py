"""The driver's end of Ray jobs, against a small server that speaks the Jobs API; tests/flows/test_cluster.py has real Ray."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from infra.errors import DataRefused, LifecycleError
from infra.stages import Resources, StageSpec
from infra.storage import open_store
from tasks import ray_jobs
from tasks.ray_jobs import ERROR_MARK, PROGRESS_MARK, RayJobLauncher, packed, unpacked
from tasks.stage import Job, silent

KEY = "a" * 64


class Head:
    """A head whose first job has a state and a log, and which notes later ones; it can go away and come back."""

    def __init__(self, port=0):
        head, self.state, self.log, self.asked, self.stopped = self, "RUNNING", "", threading.Event(), False
        self.later = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/api/version":  # asked by the client before all else
                    import ray

                    return self.answer(
                        {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
                    )
                head.asked.set()
                if self.path.endswith("/logs"):
                    return self.answer({"logs": head.log})
                name = self.path.rpartition("/")[2]
                state = head.state if name.endswith("-0") else head.later.get(name)
                if state is None:
                    return self.answer({}, 404)
                return self.answer({"type": "SUBMISSION", "status": state, "entrypoint": "x", "submission_id": name})

            def do_POST(self):
                if self.path.endswith("/stop"):
                    head.stopped, head.state = True, "STOPPED"
                    return self.answer({"stopped": True})
                job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                head.later[job["submission_id"]], head.runtime_env = "RUNNING", job["runtime_env"]
                return self.answer({"job_id": job["submission_id"], "submission_id": job["submission_id"]})

            def answer(self, body, status=200):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_): ...

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(ray_jobs, "JOB_POLL_SECONDS", 0.05)
    made = Head()
    yield made
    made.close()


@pytest.fixture
def job(tmp_path):
    spec = StageSpec(name="train", function="pretrain", kind="toy", runs="train")
    return Job(spec=spec, key=KEY, root=str(tmp_path / "root"))


def launched(head, job, report=silent):
    """A run of the job on a thread, and what came of it."""
    launcher, came = RayJobLauncher(Resources(launcher="rayjob", ray_address=head.url)), []

    def run():
        try:
            came.append(launcher.run(job, report))
        except LifecycleError as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert head.asked.wait(10)
    while launcher.running is None:  # it asked before it knew that the job is its own
        time.sleep(0.01)
    return launcher, thread, came


def finish(job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("a")
    return open_store(job.root).commit("train", KEY, "toy", tmp_path / "out", [], {})


def test_a_job_survives_the_way_to_it_and_is_packed_small(job):
    assert unpacked(packed(job)) == job
    config = {"noise": [hash((i, "x")) for i in range(30_000)]}
    with pytest.raises(LifecycleError, match="more than the 120000 that a Ray job takes"):
        packed(job.model_copy(update={"spec": job.spec.model_copy(update={"config": config})}))


def test_a_head_that_goes_away_for_a_while_is_waited_for(head, job, tmp_path):
    told = []
    head.log = f'{PROGRESS_MARK}[3, 9, {{"loss": 0.5}}]\n{PROGRESS_MARK}[4, 9'
    heard = threading.Event()
    _, thread, came = launched(head, job, lambda *progress: (told.append(progress), heard.set()))
    assert heard.wait(10)
    head.close()
    thread.join(0.3)
    assert thread.is_alive()
    back = Head(head.server.server_port)
    made = finish(job, tmp_path)
    back.state = "SUCCEEDED"
    thread.join(20)
    back.close()
    assert came[0].digest == made.digest
    assert {each[:3] for each in told} == {("train", 3, 9)}  # not the line that is cut off


def test_a_head_that_stays_away_leaves_the_job_alone(head, job, monkeypatch):
    monkeypatch.setattr(ray_jobs, "UNREACHABLE_SECONDS", 0.3)
    launcher, thread, came = launched(head, job)
    head.close()
    thread.join(20)
    assert "has not answered for 0 s" in str(came[0])
    back = Head(head.server.server_port)
    launcher.close()
    back.close()
    assert not back.stopped


def test_close_stops_the_job_and_errors_keep_their_kind(head, job):
    launcher, thread, came = launched(head, job)
    head.log = f'{ERROR_MARK}{{"error": "DataRefused", "message": "no rows"}}\n'
    launcher.close()
    thread.join(20)
    assert head.stopped
    assert isinstance(came[0], DataRefused)
    assert str(came[0]) == "no rows"


def test_the_job_s_log_is_passed_on_once_and_keeps_its_levels(head, job, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ray_jobs, "LOOK_PAUSE", 0.0)
    caplog.set_level("INFO", "tasks.ray_jobs")
    head.log = f"2026-01-01 10:00:00,000 WARNING tasks.x: short of rows\nplain\n{PROGRESS_MARK}[3, 9, {{}}]\nhalf a"
    heard = threading.Event()
    _, thread, _ = launched(head, job, lambda *_: heard.set())
    assert heard.wait(10)
    head.log += " line\nlast\n"
    finish(job, tmp_path)
    head.state = "SUCCEEDED"
    thread.join(20)
    lines = [(each.levelname, each.getMessage()) for each in caplog.records if each.name == "tasks.ray_jobs"]
    assert [level for level, text in lines if text.endswith("short of rows")] == ["WARNING"]
    assert [text for level, text in lines if level == "INFO"][-3:] == ["plain", "half a line", "last"]


def test_a_job_that_was_lost_goes_on_in_a_new_one(head, job, tmp_path):
    job = job.model_copy(update={"resources": Resources(launcher="rayjob", image="registry.example/t2i:2")})
    _, thread, came = launched(head, job)
    head.state = "FAILED"  # and its log tells no error: the process was killed, or its node is gone
    until = time.monotonic() + 10
    while not head.later and time.monotonic() < until:
        time.sleep(0.01)
    (name,) = head.later
    made = finish(job, tmp_path)
    head.later[name] = "SUCCEEDED"
    thread.join(20)
    assert name.endswith("-1")
    assert head.runtime_env["image_uri"] == "registry.example/t2i:2"
    assert came[0].digest == made.digest


def test_a_job_that_is_lost_again_and_again_is_given_up(head, job, monkeypatch):
    monkeypatch.setattr(ray_jobs, "RESTARTS", 0)
    head.log = "Killed\n"
    _, thread, came = launched(head, job)
    head.state = "FAILED"
    thread.join(20)
    assert not head.later
    assert "ended as FAILED: Killed" in str(came[0])


def test_two_roots_with_one_key_have_jobs_of_two_names(head, job, tmp_path):
    names = []
    for root in (tmp_path / "one", tmp_path / "two"):
        launcher, thread, _ = launched(head, job.model_copy(update={"root": str(root)}))
        names.append(launcher.running)
        head.asked.clear()
        launcher.close()
        thread.join(20)
        head.state = "RUNNING"
    assert len(set(names)) == 2
