"""What tests of flows share: waiting for something with a limit, a browser, and smoke runs to compare with."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from infra.config import load_yaml, parse
from infra.stages import Resources
from infra.storage import open_store
from tasks.stage import Job, job_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync")


def _until(ask: Callable[[], Any], seconds: float = 300.0) -> Any:
    from prefect.exceptions import ObjectNotFound

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := ask():
                return answer
        except ObjectNotFound:
            pass
        time.sleep(0.5)
    raise AssertionError("not within the time")


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """Ask until the answer is true, and give it."""
    return _until


@pytest.fixture
def browser() -> "Iterator[Browser]":
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def barriers() -> "Callable[[Page], list[str]]":
    """What axe-core finds serious or worse on a page with everything unfolded."""
    from axe_playwright_python.sync_playwright import Axe

    def found(page: "Page") -> list[str]:
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        violations = Axe().run(page).response["violations"]
        return [f"{each['id']}: {each['nodes'][0]['html']}" for each in violations
                if each["impact"] in ("serious", "critical")]  # fmt: skip

    return found


class Smoke:
    """Runs of presets/smoke.yaml without what a cluster has no say in."""

    preset = str(REPOSITORY / "presets" / "smoke.yaml")
    short = ("personalize=[]", "mix=[]", "distill=[]", "distill_pairs=[]", "compare=null", "evaluate.subjects=[]",
             "posttrain.grpo=null", "posttrain.prompt_enhancer=null")  # fmt: skip
    dated = ("report",)  # it shows times

    def command(self, root: Path, *more: str) -> list[str]:
        settings = [part for each in (*self.short, *more) for part in ("--set", each)]
        return [sys.executable, "-m", "flows.cli", "run", self.preset, "--root", str(root), "--json", *settings]

    def finished(self, done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
        """Stage -> digest of a command's run."""
        assert done.returncode == 0, done.stderr[-3000:]
        stages = json.loads(done.stdout.strip().splitlines()[-1])["stages"]
        return {stage["name"]: stage["digest"] for stage in stages if stage["name"] not in self.dated}

    def training(self, root: Path, resources: Resources, *changes: str) -> Job:
        """The job of pretrain-32 on what a root has."""
        config = parse(LifecycleConfig, load_yaml(self.preset, [*self.short, *changes]), "smoke")
        spec = next(spec for spec in stage_specs(config) if spec.name == "pretrain-32")
        store = open_store(str(root))
        return job_of(spec, store, {artifact.stage: artifact for artifact in store.list()}, resources)


@pytest.fixture(scope="session")
def smoke() -> Smoke:
    return Smoke()


@pytest.fixture(scope="session")
def local(smoke: Smoke, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The root of a whole smoke run on this machine, and its digests."""
    root = tmp_path_factory.mktemp("smoke") / "local"
    values = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(smoke.command(root), capture_output=True, text=True, check=False, env=values)
    return root, smoke.finished(done)


@pytest.fixture
def curated(local: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A root that has the smoke run's training set and nothing after it."""
    for stage in ("source", "download", "dedup", "quality", "buckets", "encode"):
        shutil.copytree(local[0] / stage, tmp_path / "curated" / stage)
    return tmp_path / "curated"


@pytest.fixture(scope="session")
def captioned() -> Callable[[Path, int, int], Path]:
    """Write so many scenes with this many pixels a side into a folder, each with its caption beside it."""

    def write(folder: Path, count: int, side: int) -> Path:
        from PIL import Image

        from data_curation.scenes import all_scenes, draw_batch, short_caption

        scenes = all_scenes("full")[::37][:count]
        for i, (scene, image) in enumerate(zip(scenes, draw_batch(scenes, side, 0), strict=True)):
            Image.fromarray(image).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(short_caption(scene))
        return folder

    return write
