"""Stages as jobs of a real Ray cluster of two nodes behind a token: same digests, lost drivers and nodes, cancel, racers."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from infra.embedded import environment, free_port, quiet_environment
from infra.stages import Resources
from tasks.ray_jobs import RayJobLauncher
from tasks.stage import silent

pytestmark = [pytest.mark.lifecycle, pytest.mark.ray, pytest.mark.prefect, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
LONG = ("pretrain.0.train.steps=100000", "pretrain.0.train.checkpoint_every=10")


class Nodes:
    """A head and a second node of one CPU each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        port = free_port()
        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port,
                "dashboard_agent_listen_port": free_port()}  # fmt: skip
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 200_000_000})
        self.jobs_address = f"http://127.0.0.1:{port}"
        self.add_second()

    def add_second(self):
        self.second = self.cluster.add_node(
            num_cpus=1, object_store_memory=100_000_000, dashboard_agent_listen_port=free_port()
        )

    def lose_second(self):
        self.cluster.remove_node(self.second, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    values = {**quiet_environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": None,
              "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}  # fmt: skip
    with environment(values):
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        made = Nodes()
        yield made
        made.cluster.shutdown()


def on(nodes):
    return ["run.resources.launcher=rayjob", f"run.resources.ray_address={nodes.jobs_address}"]


def states(nodes, key):
    """States of the jobs that were submitted for a stage key."""
    from ray.job_submission import JobSubmissionClient

    jobs = JobSubmissionClient(nodes.jobs_address).list_jobs()
    return [str(job.status.value) for job in jobs if (job.metadata or {}).get("key") == key]


def at_work():
    """Processes of this cluster that train or drive a training job."""
    lines = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or [])
        ours = (process.info["environ"] or {}).get("RAY_AUTH_TOKEN") == os.environ["RAY_AUTH_TOKEN"]
        if ours and any(name in line for name in ("tasks.worker", "RayTrainWorker", "ray::TrainController")):
            lines.append(line)
    return lines


def checkpoints(root):
    return list((root / ".scratch").glob("pretrain-32-*/work/checkpoints/step-*"))


def test_a_killed_driver_s_job_goes_on_and_the_lifecycle_ends_with_the_local_digests(
    smoke, local, nodes, tmp_path, until
):
    from ray.job_submission import JobSubmissionClient

    root = tmp_path / "cluster"
    first = subprocess.Popen(smoke.command(root, *on(nodes)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    running = until(lambda: [job for job in JobSubmissionClient(nodes.jobs_address).list_jobs() if job.metadata["stage"] == "pretrain-32"], 300)  # fmt: skip
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.run(smoke.command(root, *on(nodes)), capture_output=True, text=True, check=False)
    assert smoke.finished(second) == local[1]
    assert states(nodes, running[0].metadata["key"]) == ["SUCCEEDED"]  # found again, not started again


def test_eight_at_once_make_one_job_and_one_artifact(smoke, curated, nodes):
    resources = Resources(launcher="rayjob", ray_address=nodes.jobs_address)
    job = smoke.training(curated, resources, "pretrain.0.train.seed=5")  # a key that no other test has
    launchers = [RayJobLauncher(job.resources) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda launcher: launcher.run(job, silent), launchers))
    assert len({artifact.digest for artifact in made}) == 1
    assert states(nodes, job.key) == ["SUCCEEDED"]


def test_an_interrupted_run_leaves_nothing_at_work(smoke, curated, nodes, until):
    job = smoke.training(curated, Resources(), *LONG)
    run = subprocess.Popen(
        smoke.command(curated, *LONG, *on(nodes)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: run.poll() is not None or checkpoints(curated), 180)
        assert at_work()
        run.send_signal(signal.SIGTERM)
        until(lambda: not at_work(), 30)
        assert run.wait(30) == 143
    finally:
        run.kill()
    assert states(nodes, job.key) == ["STOPPED"]


def test_a_lost_node_is_made_up_for_and_changes_no_digest(smoke, curated, nodes, tmp_path, until):
    steps = ("pretrain.0.train.steps=300", "pretrain.0.train.checkpoint_every=10")
    shutil.copytree(curated, tmp_path / "calm")
    resources, told = Resources(launcher="rayjob", ray_address=nodes.jobs_address, num_workers=2), []
    with ThreadPoolExecutor(1) as pool:
        launcher, job = RayJobLauncher(resources), smoke.training(curated, resources, *steps)
        ending = pool.submit(launcher.run, job, lambda *progress: told.append(progress[1]))
        until(lambda: ending.done() or (told and told[-1] > 20), 180)
        at, before = told[-1], len(told)
        nodes.lose_second()
        nodes.add_second()
        artifact = ending.result(300)
    assert at < 300
    assert min(told[before:]) >= at - 10  # it went on from the last checkpoint
    calm = smoke.training(tmp_path / "calm", resources, *steps)  # two workers again: one adds in another order
    assert artifact.digest == RayJobLauncher(resources).run(calm, silent).digest
