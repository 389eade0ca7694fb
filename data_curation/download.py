"""Download: shards of the URL list, fetched by separate processes, each shard kept as soon as it is whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from data_curation.config import DownloadConfig
from data_curation.demo_web import HOST
from data_curation.manifest import funnel, read_manifest
from data_curation.web_server import serve
from infra.errors import DataRefused, LifecycleError

if TYPE_CHECKING:
    from infra.stages import StageContext

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
QUIET = {  # img2dataset's imports must not look anything up
    "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "WANDB_DISABLED": "true", "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def download(config: DownloadConfig, ctx: StageContext) -> dict[str, Any]:
    """Fetch every row of the source once; shards that an earlier, killed run finished are not fetched again."""
    source = ctx.inputs["source"]
    num_rows = pq.read_metadata(source / "urls.parquet").num_rows
    if not num_rows:
        raise DataRefused("download: the source has 0 rows; give a URL list or a folder with pictures")
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    targets = [
        (start, ctx.scratch / f"rows-{i:05d}.parquet") for i, start in enumerate(range(0, num_rows, config.shard_rows))
    ]
    missing = [(start, path) for start, path in targets if not path.exists()]
    if missing:
        with ExitStack() as stack:
            own_web = (source / "web.parquet").exists()  # the demo web, or the pictures of a folder
            pins = {HOST: stack.enter_context(serve(source, config.port))} if own_web else {}
            _fetch(missing, len(targets), pins, config, ctx)
    for _, path in targets:
        shutil.copyfile(path, ctx.out / path.name)
    facts = funnel(read_manifest(ctx.out), num_rows)
    if not facts["kept"]:
        raise DataRefused(
            f"download: none of {num_rows} rows gave a picture; reasons: {facts['errors'] | facts['dropped']}"
        )
    return facts | {"shards": len(targets), "shards_reused": len(targets) - len(missing)}


def _fetch(
    missing: Sequence[tuple[int, Path]], num_shards: int, pins: dict[str, str],
    config: DownloadConfig, ctx: StageContext,
) -> None:  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(min(config.processes, len(missing))):
            spec = ctx.scratch / f"spec-{i}.json"
            mine = [(start, str(path)) for start, path in missing[i :: config.processes]]
            urls = str(ctx.inputs["source"] / "urls.parquet")
            spec.write_text(json.dumps(
                {"config": config.model_dump(mode="json"), "pins": pins, "urls": urls, "shards": mine}
            ))  # fmt: skip
            command = [sys.executable, "-m", "data_curation.fetch_process", str(spec)]
            here = str(Path(__file__).parent.parent)
            path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
            processes.append(subprocess.Popen(command, env=os.environ | QUIET | {"PYTHONPATH": path}, cwd=ctx.scratch))
        while any(process.poll() is None for process in processes):
            _check(processes)
            time.sleep(POLL_SECONDS)
            done = num_shards - sum(not path.exists() for _, path in missing)
            ctx.progress(done, num_shards, {})
        _check(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _check(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll():
            raise LifecycleError(
                f"download: process {process.pid} ended with code {process.returncode}, see its messages above; "
                "finished shards are kept, run the same command again"
            )
