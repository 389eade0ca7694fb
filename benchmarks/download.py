"""Download and commit against plain img2dataset: same list, same local server, same processes and threads, in turns.

value: pictures a second of our download stage, all guards on (address check, robots.txt, opt-out, byte cap, deadlines,
full decode in a bounded child, metadata stripped, page checksums), start-up included; peer: img2dataset's own command
with its defaults and Parquet output. Medians of three rounds; bar: ratio 0.9. `raw` in the detail is img2dataset with
re-encoding disabled, which then looks at no pixel. Kills: SIGKILL of the whole stage at random moments, then a rerun.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.record import record
from data_curation.config import DownloadConfig, ListSource
from data_curation.download import QUIET, download
from data_curation.sources import read_source
from infra.artifacts import folder_digest
from infra.stages import Resources, StageContext, fan_out_here, no_progress

SEED = 0
PICTURES = 2_000
ROUNDS = 3
KILLS = 10
PROCESSES, THREADS, SHARD = 2, 8, 500


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    bodies: list[bytes]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """One of a few hundred pictures, by its number."""
        number = self.path.strip("/").split(".")[0]
        body = self.server.bodies[int(number) % len(self.server.bodies)] if number.isdigit() else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


def photographs(count: int) -> list[bytes]:
    """JPEGs of 0.25 to 0.5 megapixels with a photograph's mixture of coarse and fine detail."""
    rng = np.random.default_rng(SEED)
    bodies = []
    for _ in range(count):
        width, height = int(rng.integers(560, 820)), int(rng.integers(450, 620))
        layers = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
                  for n in (4, 16, 64, 256)]  # fmt: skip
        picture = sum(np.asarray(layer, np.float32) / 2**i for i, layer in enumerate(layers)) / 1.875
        file = io.BytesIO()
        Image.fromarray(picture.astype(np.uint8)).save(file, "JPEG", quality=88)
        bodies.append(file.getvalue())
    return bodies


def ours(source: Path, work: Path) -> tuple[float, str]:
    """Seconds and digest of our stage."""
    context = stage_context(source, work)
    config = DownloadConfig(
        shard_rows=SHARD, processes=PROCESSES, threads=THREADS, allow_private=("127.0.0.1",), per_host=THREADS
    )
    began = time.monotonic()
    facts = download(config, context)
    seconds = time.monotonic() - began
    assert facts["kept"] == PICTURES, facts
    return seconds, folder_digest(context.out)[0]


def stage_context(source: Path, work: Path) -> StageContext:
    """A stage of its own in `work`."""
    for name in ("out", "scratch"):
        (work / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        "download", {"source": source}, {}, work / "out", work / "scratch", Resources(), no_progress, fan_out_here
    )


def img2dataset(urls: Path, work: Path, **more: Any) -> float:
    """Seconds of img2dataset's own command."""
    options = {
        "url_list": str(urls), "input_format": "parquet", "url_col": "url", "output_folder": str(work), "output_format": "parquet",
        "processes_count": PROCESSES, "thread_count": THREADS, "number_sample_per_shard": SHARD, "enable_wandb": False, **more,
    }  # fmt: skip
    code = f"import img2dataset; img2dataset.download(**{options!r})"
    began = time.monotonic()
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"]
    subprocess.run(command, check=True, env=os.environ | QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    rows = sum(
        pq.read_table(path, columns=["status"])["status"].to_pylist().count("success")
        for path in work.glob("*.parquet")
    )
    assert rows == PICTURES, rows
    return seconds


def kills(source: Path, folder: Path, length: float, digest: str) -> dict[str, Any]:
    """Kill the stage's whole process group until KILLS kills are done; every root is then finished and compared."""
    rng = random.Random(SEED)
    done, equal, roots, shards = 0, 0, 0, []
    while done < KILLS:
        work = folder / f"killed-{roots}"
        roots += 1
        while done < KILLS:
            command = [sys.executable, "-m", "benchmarks.download", str(source), str(work)]
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(0.2, 1.0) * length)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
                shards.append(len(list((work / "scratch").glob("rows-*.parquet"))))
        equal += ours(source, work)[1] == digest
    return {"kills": done, "roots": roots, "equal": equal, "shards_there_when_killed": shards}


def main() -> dict[str, Any]:
    """Three rounds of each, in turns; then the kills."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.bodies = photographs(300)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed = folder / "list.txt"
        listed.write_text("\n".join(f"http://127.0.0.1:{server.server_port}/{i}.jpg" for i in range(PICTURES)))
        source = stage_context(folder, folder / "source").out
        read_source(ListSource(path=str(listed)), stage_context(folder, folder / "source"))
        seconds: dict[str, list[float]] = {"ours": [], "img2dataset": [], "raw": []}
        for i in range(ROUNDS):
            spent, digest = ours(source, folder / f"ours-{i}")
            seconds["ours"].append(spent)
            seconds["img2dataset"].append(img2dataset(source / "urls.parquet", folder / f"plain-{i}"))
            raw = {"resize_mode": "no", "disable_all_reencoding": True}
            seconds["raw"].append(img2dataset(source / "urls.parquet", folder / f"raw-{i}", **raw))
        killed = kills(source, folder, statistics.median(seconds["ours"]), digest)
    server.shutdown()
    speed = {name: PICTURES / statistics.median(values) for name, values in seconds.items()}
    met = speed["ours"] >= 0.9 * speed["img2dataset"] and killed["equal"] == killed["roots"]
    detail = {"pictures": PICTURES, "processes": PROCESSES, "threads": THREADS, "killed": killed,
              "seconds": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
              "pictures_per_second": {name: round(v, 1) for name, v in speed.items()}}  # fmt: skip
    return record("download", [SEED], speed["ours"], speed["img2dataset"], 0.9, met, detail)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ours(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print(json.dumps(main()))
