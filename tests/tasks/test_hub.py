"""Pushing to a local server that speaks the few routes of the Hub, in a process of its own: no token may show."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_notarealtoken"
PUSH = "import sys\nfrom pathlib import Path\nfrom tasks.hub import push\nprint(push(Path(sys.argv[1]), 'me/x', 'it'))"


class Hub(ThreadingHTTPServer):
    """Keeps what was asked, the blobs and the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.there: list[str] = [".gitattributes"]
        self.asked: list[tuple[str, str, str | None]] = []
        self.blobs: dict[str, bytes] = {}
        self.commit: list[dict[str, Any]] = []
        self.made: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Routes(BaseHTTPRequestHandler):
    server: Hub

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, self.headers.get("authorization")))
        found: Any = {}
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            found = {"url": f"{self.server.address}/me/x", "name": "me/x", "id": "1"}
        elif "/tree/" in self.path:
            found = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.there]
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            found = {"files": [{"path": f["path"], "uploadMode": modes[f["path"].endswith("safetensors")], "shouldIgnore": False} for f in files]}  # fmt: skip
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            found = {"objects": [{**o, "actions": {"upload": {"href": f"{self.server.address}/blob/{o['oid']}"}}} for o in objects]}  # fmt: skip
        elif self.path.startswith("/blob/"):
            self.server.blobs[self.path.removeprefix("/blob/")] = body
        elif "/commit/" in self.path:
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            found = {"commitUrl": f"{self.server.address}/me/x/commit/abc", "commitOid": "abc", "success": True}
        sent = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names that http.server calls

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model" / "lineage.json").write_text("{}")
    (tmp_path / "model" / "transformer" / "a.safetensors").write_bytes(bytes(range(256)) * 9)
    return tmp_path / "model"


def pushed(folder: Path, hub: Hub, **environment: str) -> subprocess.CompletedProcess[str]:
    repository = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": repository, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1",
           "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(folder.parent / "home"), **environment}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)], capture_output=True, text=True, check=False, env=env
    )


def test_one_commit_has_every_file_and_the_token_stays_in_its_header(folder: Path, hub: Hub) -> None:
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


def test_a_repository_of_others_is_not_touched(folder: Path, hub: Hub) -> None:
    hub.there += ["theirs.safetensors"]
    done = pushed(folder, hub)
    assert "1 file(s) that `t2i publish` did not write, such as theirs.safetensors" in done.stderr
    assert hub.commit == [] and hub.blobs == {}
    assert TOKEN not in done.stdout + done.stderr


def test_without_a_token_or_the_network_nothing_is_asked(folder: Path, hub: Hub) -> None:
    assert "HF_TOKEN is not set" in pushed(folder, hub, HF_TOKEN="").stderr
    assert "HF_HUB_OFFLINE is set" in pushed(folder, hub, HF_HUB_OFFLINE="1").stderr
    assert hub.asked == []
