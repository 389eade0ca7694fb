"""What stages of post-training start from, small and random; a local server that speaks the few routes of the Hub."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from data_curation.scenes import SUBJECT_OBJECTS, Scene, all_scenes
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.evaluation.judge import Judge, Vocabulary
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A judge, an encoded training set of random pictures, and a random checkpoint."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    subjects = [Scene("big", (name,), "white") for name in SUBJECT_OBJECTS]
    Judge.build(Vocabulary.of([*all_scenes("full"), *subjects]), 4, 16, 0.5).save(root / "judge")
    small = PrxConfig(hidden_size=32, depth=1, num_heads=2, patch_size=4, mlp_ratio=2.0)
    denoiser = prx.build(small, torch.zeros(small.text_dim), torch.ones(small.text_dim), 0)
    torch.nn.init.normal_(denoiser.transformer.final_layer.linear.weight)
    write_checkpoint(root / "sft", denoiser, SamplingCard(steps=2))
    data, dim = root / "data", small.text_dim
    data.mkdir()
    row = {
        "resolution": 32,
        "width": 32,
        "height": 32,
        "caption_short": 1,
        "caption_long": 1,
        "domain": "basic",
        "split": "train",
    }
    write_table([{**row, "row_id": str(i), "position": i} for i in range(8)], INDEX_SCHEMA, data / "index.parquet")
    captions = ("", "a cat", *(f"a cat and {n} dogs" for n in range(10)))
    write_table(
        [{"id": i, "text": text} for i, text in enumerate(captions)], CAPTIONS_SCHEMA, data / "captions.parquet"
    )
    rng = np.random.default_rng(0)
    text = {"tokens": rng.normal(size=(15, dim)).astype(np.float16), "offsets": np.array([0, 2, 5, *range(6, 16)])}
    save_file(text | {"mean": np.zeros(dim, np.float32), "std": np.ones(dim, np.float32)}, data / "text.safetensors")
    images = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    save_file({"images": images, "teacher": np.zeros((8, 8, 8, 0), np.float16)}, data / "images-32x32.safetensors")
    return {"judge": root / "judge", "init": root / "sft", "data": data}


@pytest.fixture(scope="session")
def context() -> Callable[..., StageContext]:
    """A stage's context with its own folders."""

    def make(name: str, inputs: dict[str, Path], folder: Path) -> StageContext:
        out, scratch = folder / f"{name}-out", folder / f"{name}-scratch"
        out.mkdir()
        scratch.mkdir()
        return StageContext(name, inputs, {}, out, scratch, Resources(), no_progress, fan_out_here)

    return make


class Hub(ThreadingHTTPServer):
    """Keeps what was asked, the blobs and the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.there: list[str] = [".gitattributes"]
        self.asked: list[tuple[str, str, str | None]] = []
        self.blobs: dict[str, bytes] = {}
        self.commit: list[dict[str, Any]] = []
        self.made: dict[str, Any] = {}
        self.refuses = 0  # status of every answer, if not 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Of a process that takes this server for the Hub."""
        repository = str(Path(__file__).resolve().parents[2])
        return {**os.environ, "PYTHONPATH": repository, "HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(home), **more}  # fmt: skip


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
        self.send_response(self.server.refuses or 200)
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
