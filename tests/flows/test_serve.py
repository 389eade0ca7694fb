"""`t2i serve` as a person has it: the command over a finished run, and the page in a real browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run: a student without training."""
    import torch

    from infra.storage import open_store
    from models.networks import prx
    from models.networks.checkpoint import SamplingCard, write_checkpoint
    from models.networks.config import PrxConfig

    folder = tmp_path_factory.mktemp("serve")
    store = open_store(folder / "root")
    network = PrxConfig(hidden_size=32, depth=2, num_heads=2, patch_size=4, text_dim=384, prompt_max_tokens=32)
    card = SamplingCard(steps=1, guidance=1.0, side=16, prompt_max_tokens=32, distilled=True, trained_steps=(1,))
    (folder / "out").mkdir()
    write_checkpoint(folder / "out", prx.build(network, torch.zeros(384), torch.ones(384), seed=0), card)
    made = store.commit("fast", "f" * 64, "checkpoint", folder / "out", [], {"function": "toy", "inputs": {}})
    store.write_run("toy", {"stages": [{"name": "fast", "key": "f" * 64, "digest": made.digest}], "outcome": "ok"})
    return folder / "root"


def served(root: Path, *more: str) -> Iterator[str]:
    """Start the command, wait until it answers, and end it as Ctrl-C does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flows.cli", "serve", "toy", "--root", str(root), "--port", str(port), *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 150
    try:
        while time.monotonic() < until:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            try:
                urllib.request.urlopen(f"{url}/healthz", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        yield url
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def here(run_root: Path) -> Iterator[str]:
    yield from served(run_root)


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_draws_as_one_types_and_asks_nobody_else(here: str, browser, width: int):
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked, faults = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(here)
    page.wait_for_selector("#stage img")
    first = page.get_attribute("#stage img", "src")
    page.fill("#prompt", f"two cats {SCRIPT}")
    page.wait_for_selector(f"#stage img:not([src='{first}'])")
    page.click("#four")
    page.wait_for_selector("#stage figure:nth-child(4) img")
    page.click("#lineage")
    page.wait_for_selector("#origin:not([hidden])")
    assert '"stage": "fast"' in page.inner_text("#origin")
    assert page.title() == "t2i playground"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert faults == []
    assert all(url.startswith((here, "data:")) for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_no_serious_barrier(here: str, browser, barriers, scheme: str):
    page = browser.new_page(color_scheme=scheme)
    page.goto(here)
    page.click("#four")
    page.wait_for_selector("#stage figure:nth-child(4) img")
    assert barriers(page) == []
    page.evaluate("document.querySelector('label').style.color = document.body.style.background = '#888'")
    assert any(each.startswith("color-contrast") for each in barriers(page))  # the check sees what it should


@pytest.mark.lifecycle
@pytest.mark.ray
def test_ray_serve_gives_the_same_pictures(here: str, run_root: Path):
    body = json.dumps({"prompt": "a big apple", "seed": 3, "n": 2}).encode()

    def ask(url: str) -> list[dict]:
        request = urllib.request.Request(
            f"{url}/v1/images/generations", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    for url in served(run_root, "--replicas", "1"):
        assert ask(url) == ask(here)
