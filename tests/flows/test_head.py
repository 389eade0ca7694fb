"""The Ray head as compose starts it, behind its token: what it tells Prometheus, and its death in the middle of training."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from infra.embedded import environment, free_port, quiet_environment
from infra.stages import Resources
from infra.storage import open_store
from tasks.ray_jobs import RayJobLauncher
from tasks.stage import silent

pytestmark = [pytest.mark.lifecycle, pytest.mark.ray, pytest.mark.timeout(900)]
DEPLOY = Path(__file__).parents[2] / "infra" / "deploy"
STEPS = ("pretrain.0.train.steps=600", "pretrain.0.train.checkpoint_every=10")


class Head:
    """`infra/deploy/start ray-head` on ports of its own; it can be killed with all it started, and started again."""

    def __init__(self, folder):
        self.jobs, self.metrics = free_port(), free_port()
        (folder / "ray_token").write_text(secrets.token_hex(32))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.values = {
            **quiet_environment(), "PATH": path, "PYTHONPATH": str(DEPLOY.parents[1]), "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": None, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None,
            "RAY_AUTH_TOKEN_PATH": str(folder / "ray_token"),
        }  # fmt: skip
        self.ports = {"SECRETS": str(folder), "HOST": "127.0.0.1", "PORT": str(self.jobs),
                      "METRICS_PORT": str(self.metrics), "GCS_PORT": str(free_port())}  # fmt: skip
        self.address = f"http://127.0.0.1:{self.jobs}"

    def start(self, until):
        self.process = subprocess.Popen(
            [str(DEPLOY / "start"), "ray-head"], env={**os.environ, **self.ports}, stdout=subprocess.DEVNULL
        )
        until(self.answers, 120)

    def answers(self):
        from ray.job_submission import JobSubmissionClient

        try:
            return JobSubmissionClient(self.address).list_jobs() is not None
        except (ConnectionError, RuntimeError):
            return False

    def kill(self):
        family = [self.process.pid, *(each.pid for each in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in family:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        self.process.wait()


@pytest.fixture
def head(tmp_path, until):
    folder = tmp_path / "secrets"
    folder.mkdir()
    made = Head(folder)
    with environment(made.values):
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        made.start(until)
        yield made
        made.kill()


def read(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@contextmanager
def prometheus(head, folder):
    """Prometheus with compose's configuration, but this head's port in the place of its names; its address."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (ray,) = [each for each in config["scrape_configs"] if each["job_name"] == "ray"]
    del ray["dns_sd_configs"]
    ray |= {"static_configs": [{"targets": [f"127.0.0.1:{head.metrics}"]}], "scrape_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [ray]}))
    port = free_port()
    process = subprocess.Popen(
        ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
         f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def asked(address, query):
    """Results of an instant query; none while it starts."""
    try:
        text = read(f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    except OSError:
        return []
    return json.loads(text)["data"]["result"]


def test_a_head_that_dies_costs_the_steps_since_the_last_checkpoint(smoke, curated, head, tmp_path, until):
    resources, told = Resources(launcher="rayjob", ray_address=head.address), []
    job = smoke.training(curated, resources, *STEPS)
    shutil.copytree(curated, tmp_path / "calm")
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(RayJobLauncher(resources).run, job, lambda *progress: told.append(progress[1]))
        until(lambda: ending.done() or (told and told[-1] > 20), 180)
        until(lambda: "ray_t2i_stage_progress" in read(f"http://127.0.0.1:{head.metrics}/metrics"), 30)
        if shutil.which("prometheus"):
            with prometheus(head, tmp_path) as address:
                (found,) = until(lambda: asked(address, 'ray_t2i_stage_progress{stage="pretrain-32"}'), 60)
                assert 0 < float(found["value"][1]) < 1
        head.kill()
        at, before = told[-1], len(told)
        head.start(until)
        artifact = ending.result(300)
    assert at < 600
    assert min(told[before:]) >= at - 10
    calm = smoke.training(tmp_path / "calm", resources, *STEPS)
    assert artifact.digest == RayJobLauncher(resources).run(calm, silent).digest
    assert open_store(str(curated)).find("pretrain-32", job.key).digest == artifact.digest
