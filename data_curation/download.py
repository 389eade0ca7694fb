"""Download: shards of the URL list, fetched by separate processes, each shard kept as soon as it is whole.

The plan (which rows are in which shard, fetched with what settings) is ours and is written down: what an earlier, killed
run left is used only under the same plan. Shards are fanned out over Ray, one process per fan-out item.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_curation.config import DownloadConfig
from data_curation.demo_web import HOST
from data_curation.local_pictures import BODIES, judge_shard
from data_curation.manifest import ROWS_SCHEMA, funnel, read_manifest
from data_curation.web_server import serve
from infra.config import digest_of, versioned
from infra.errors import DataRefused, LifecycleError
from infra.stages import fan_out_here

if TYPE_CHECKING:
    from infra.stages import StageContext

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
PLAN = "plan.json"
QUIET = {  # img2dataset's imports must not look anything up
    "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "WANDB_DISABLED": "true", "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
Target = tuple[int, Path]  # first row, file of the shard


def download(config: DownloadConfig, ctx: StageContext) -> dict[str, Any]:
    """Fetch every row of the source once; shards that an earlier, killed run finished are not fetched again."""
    source = ctx.inputs["source"]
    num_rows = pq.read_metadata(source / "urls.parquet").num_rows
    if not num_rows:
        raise DataRefused("download: the source has 0 rows; give a URL list or a folder with pictures")
    keep_plan(config, source, ctx.scratch)
    targets = [
        (start, ctx.scratch / f"rows-{i:05d}.parquet") for i, start in enumerate(range(0, num_rows, config.shard_rows))
    ]
    missing = [(start, path) for start, path in targets if not is_whole(path, min(config.shard_rows, num_rows - start))]
    if missing:
        with told_progress([path for _, path in targets], ctx):
            if (source / BODIES).exists():
                ctx.fan_out(judge_shard, [(source, start, path, config) for start, path in missing])
            else:
                _fetch(missing, config, ctx)
    for _, path in targets:
        shutil.copyfile(path, ctx.out / path.name)
    facts = funnel(read_manifest(ctx.out), num_rows)
    if not facts["kept"]:
        raise DataRefused(
            f"download: none of {num_rows} rows gave a picture; reasons: {facts['errors'] | facts['dropped']}; "
            "check the URLs, the network and data.download"
        )
    return facts | {"shards": len(targets), "shards_reused": len(targets) - len(missing)}


def keep_plan(config: DownloadConfig, source: Path, scratch: Path) -> None:
    """Clear away what was fetched under another plan: another list, or other settings."""
    scratch.mkdir(parents=True, exist_ok=True)
    listed = pq.read_table(source / "urls.parquet", columns=["row_id", "url"])
    urls = digest_of([listed["row_id"].to_pylist(), listed["url"].to_pylist()])
    plan = {"config": versioned(config), "rows": len(listed), "urls": urls}
    path = scratch / PLAN
    if not path.exists() or json.loads(path.read_text()) != plan:
        for old in scratch.glob("rows-*"):
            old.unlink()
        path.write_text(json.dumps(plan, sort_keys=True))


def is_whole(path: Path, num_rows: int) -> bool:
    """Whether a shard is there and can be read to its last row."""
    if not path.exists():
        return False
    try:
        with pq.ParquetFile(path) as file:
            whole = bool(file.metadata.num_rows == num_rows and file.schema_arrow.equals(ROWS_SCHEMA))
    except (pa.ArrowException, OSError):
        whole = False
    if not whole:
        log.warning("%s is damaged; its rows are fetched again", path.name)
        path.unlink()
    return whole


@contextlib.contextmanager
def told_progress(paths: Sequence[Path], ctx: StageContext) -> Iterator[None]:
    """Report how many shards are there, for as long as the context lasts."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            ctx.progress(sum(path.exists() for path in paths), len(paths), {})

    thread = threading.Thread(target=watch, daemon=True, name="download-progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _fetch(missing: Sequence[Target], config: DownloadConfig, ctx: StageContext) -> None:
    source = ctx.inputs["source"]
    with ExitStack() as stack:
        own_web = (source / "web.parquet").exists()
        pins = {HOST: stack.enter_context(serve(source, config.port))} if own_web else {}
        specs = []
        for i in range(min(config.processes, len(missing))):
            specs.append(ctx.scratch / f"spec-{i}.json")
            mine = [(start, str(path)) for start, path in missing[i :: config.processes]]
            specs[-1].write_text(json.dumps({
                "config": config.model_dump(mode="json"), "pins": pins, "urls": str(source / "urls.parquet"),
                "shards": mine,
            }))  # fmt: skip
        if ctx.fan_out is fan_out_here:
            _side_by_side(specs)
        else:
            ctx.fan_out(run_process, specs)


def _side_by_side(specs: Sequence[Path]) -> None:
    """Without Ray, threads wait for the processes: a fan-out in this process would run them one after the other."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(specs)) as pool:
        try:
            for future in [pool.submit(run_process, spec, stop) for spec in specs]:
                future.result()
        finally:
            stop.set()


def run_process(spec: Path, stop: threading.Event | None = None) -> None:
    """One download process from start to end; it is killed when `stop` is set or this call is interrupted."""
    command = [sys.executable, "-m", "data_curation.fetch_process", str(spec)]
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env=os.environ | QUIET | {"PYTHONPATH": path}, cwd=spec.parent)
    try:
        while process.poll() is None and not (stop is not None and stop.is_set()):
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
    if process.returncode and not (stop is not None and stop.is_set()):
        raise LifecycleError(
            f"download: process {process.pid} ended with code {process.returncode}, see its messages above; "
            "finished shards are kept, run the same command again"
        )
