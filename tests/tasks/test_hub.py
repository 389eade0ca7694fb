"""Pushing to a local server that speaks the few routes of the Hub, in a process of its own: no token may show."""

import base64
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_notarealtoken"
PUSH = "import sys\nfrom pathlib import Path\nfrom tasks.hub import push\nprint(push(Path(sys.argv[1]), 'me/x', 'it'))"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model" / "lineage.json").write_text("{}")
    (tmp_path / "model" / "transformer" / "a.safetensors").write_bytes(bytes(range(256)) * 9)
    return tmp_path / "model"


def pushed(folder: Path, hub: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    env = hub.environment(folder.parent / "home", HF_TOKEN=TOKEN) | environment
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)], capture_output=True, text=True, check=False, env=env
    )


def test_one_commit_has_every_file_and_the_token_stays_in_its_header(folder: Path, hub: Any) -> None:
    hub.there += ["lineage.json", "old.safetensors"]
    done = pushed(folder, hub)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{hub.address}/me/x"
    assert hub.made["visibility"] == "private"
    kinds = {(line["key"], line["value"].get("path")): line["value"] for line in hub.commit}
    assert set(kinds) == {("header", None), ("file", "README.md"), ("file", "lineage.json"),
                          ("lfsFile", "transformer/a.safetensors"), ("deletedFile", "old.safetensors")}  # fmt: skip
    assert base64.b64decode(kinds[("file", "README.md")]["content"]) == (folder / "README.md").read_bytes()
    weights = (folder / "transformer" / "a.safetensors").read_bytes()
    assert hub.blobs == {hashlib.sha256(weights).hexdigest(): weights}
    assert {sent for _, path, sent in hub.asked if not path.startswith("/blob/")} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr


def test_a_repository_of_others_is_not_touched(folder: Path, hub: Any) -> None:
    hub.there += ["theirs.safetensors"]
    done = pushed(folder, hub)
    assert "1 file(s) that `t2i publish` did not write, such as theirs.safetensors" in done.stderr
    assert hub.commit == [] and hub.blobs == {}
    assert TOKEN not in done.stdout + done.stderr


def test_without_a_token_or_the_network_nothing_is_asked(folder: Path, hub: Any) -> None:
    assert "HF_TOKEN is not set" in pushed(folder, hub, HF_TOKEN="").stderr
    assert "HF_HUB_OFFLINE is set" in pushed(folder, hub, HF_HUB_OFFLINE="1").stderr
    assert hub.asked == []


def test_a_refusal_of_the_hub_is_said_without_the_token(folder: Path, hub: Any) -> None:
    hub.refuses = 403
    done = pushed(folder, hub, HF_HUB_VERBOSITY="debug", HF_DEBUG="1")
    assert "LifecycleError: the Hub refused hf://me/x: 403" in done.stderr
    assert "/api/repos/create" in done.stderr  # it did talk
    assert TOKEN not in done.stdout + done.stderr
    assert hub.commit == [] and hub.blobs == {}
