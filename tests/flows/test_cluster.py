"""Stages as jobs of a real Ray cluster of two nodes behind a token: lost drivers and nodes, cancel, eight at once."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from flows.config import LifecycleConfig, RunConfig
from flows.dag import stage_specs
from flows.run import Run
from infra.config import load_yaml, parse
from infra.embedded import environment, free_port, quiet_environment
from infra.errors import LifecycleError
from infra.stages import Resources
from infra.storage import open_store
from tasks.launchers import RayJobLauncher
from tasks.stage import job_of, silent

pytestmark = [pytest.mark.lifecycle, pytest.mark.ray, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
SMOKE = REPOSITORY / "presets" / "smoke.yaml"
CURATION = ("source", "download", "dedup", "quality", "buckets", "encode")


@pytest.fixture(scope="module")
def cluster():
    """A head with one CPU and a second node with one; both ask for a token."""
    values = {**quiet_environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
              "RAY_ADDRESS": None, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}  # fmt: skip
    with environment(values):
        from ray._raylet import AuthenticationTokenLoader, Config
        from ray.cluster_utils import Cluster

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        port = free_port()
        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port,
                "object_store_memory": 200_000_000}  # fmt: skip
        made = Cluster(initialize_head=True, head_node_args=head)
        made.second = made.add_node(num_cpus=1, object_store_memory=100_000_000)
        made.jobs_address = f"http://127.0.0.1:{port}"
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A root with the smoke lifecycle's training set."""
    root = tmp_path_factory.mktemp("cluster") / "root"
    specs = [spec for spec in stage_specs(parse(LifecycleConfig, load_yaml(SMOKE), "smoke")) if spec.name in CURATION]
    Run("curation", specs, RunConfig(root=str(root)), {"name": "smoke"}).execute()
    return str(root)


def training(curated, cluster, steps, workers=1, seed=0):
    """A training job that is not done before."""
    more = [f"pretrain.0.train.steps={steps}", "pretrain.0.train.checkpoint_every=10", f"seed={seed}"]
    config = parse(LifecycleConfig, load_yaml(SMOKE, more), "smoke")
    spec = next(spec for spec in stage_specs(config) if spec.name == "pretrain-32")
    store = open_store(curated)
    artifacts = {artifact.stage: artifact for artifact in store.list() if artifact.stage in CURATION}
    resources = Resources(launcher="rayjob", ray_address=cluster.jobs_address, num_workers=workers)
    return job_of(spec, store, artifacts, resources)


def jobs_of(launcher, job):
    return [each for each in launcher.client.list_jobs() if (each.metadata or {}).get("key") == job.key]


def workers_alive():
    """Processes that still train: job drivers and Ray's training workers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        text = " ".join(process.info["cmdline"] or [])
        if "tasks.worker" in text or "RayTrainWorker" in text or "ray::TrainController" in text:
            found.append(text)
    return found


def until(ask, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.2)
    return answer


def test_eight_at_once_make_one_job_and_one_artifact(curated, cluster):
    job = training(curated, cluster, 4)
    launchers = [RayJobLauncher(job.resources) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda launcher: launcher.run(job, silent), launchers))
    assert len({artifact.digest for artifact in made}) == 1
    assert len(jobs_of(launchers[0], job)) == 1


def test_cancel_leaves_no_orphan(curated, cluster):
    job, told = training(curated, cluster, 100_000, seed=1), []
    launcher = RayJobLauncher(job.resources)

    def run():
        with pytest.raises(LifecycleError, match="ended as STOPPED"):
            launcher.run(job, lambda *p: told.append(p))

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: told)
    begun = time.monotonic()
    launcher.close()
    until(lambda: not workers_alive(), 30)
    assert time.monotonic() - begun < 30
    thread.join(30)
    assert [str(each.status.value) for each in jobs_of(launcher, job)] == ["STOPPED"]


DRIVER = """
import sys
from tasks.launchers import RayJobLauncher
from tasks.stage import Job
job = Job.model_validate_json(open(sys.argv[1]).read())
def report(*told): print("progress", told[1], flush=True)
print("made", RayJobLauncher(job.resources).run(job, report).digest, flush=True)
"""


def test_a_killed_driver_s_job_goes_on_and_the_next_driver_finds_it(curated, cluster, tmp_path):
    job = training(curated, cluster, 1500, seed=2)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "job.json")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stdout.readline().startswith("progress")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    second = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    launcher = RayJobLauncher(job.resources)
    assert len(jobs_of(launcher, job)) == 1
    assert second.stdout.strip().splitlines()[-1] == f"made {open_store(curated).find('pretrain-32', job.key).digest}"


def test_a_lost_node_is_replaced_and_the_stage_ends_as_if_nothing_had_been(curated, cluster):
    job, told = training(curated, cluster, 1200, workers=2, seed=3), []
    launcher = RayJobLauncher(job.resources)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(launcher.run, job, lambda *p: told.append(p[1]))
        until(lambda: told and told[-1] > 20)
        cluster.remove_node(cluster.second, allow_graceful=False)
        at = told[-1]
        cluster.second = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        artifact = ending.result(300)
    assert artifact.facts["steps"] == 1200
    again = [done for done in told[told.index(at) :] if done < at - 200]
    assert not again  # it went on from a checkpoint, not from the start
