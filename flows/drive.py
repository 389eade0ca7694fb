"""What the command line does with runs: a Prefect server around a flow, or none when nothing is left to run."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from flows.display import use_display
from flows.plan import PlanRow
from flows.run import Display, Record, Run
from infra.artifacts import Artifact
from infra.config import parse
from infra.embedded import prefect_server
from infra.errors import ConfigError
from infra.local_files import local_path
from infra.storage import Store, open_store


def run_lifecycle(config: LifecycleConfig, rows: Sequence[PlanRow], force: list[str], display: Display) -> Record:
    """Run the lifecycle as a Prefect flow; when every stage is there already, only check and write the record."""
    use_display(display)
    if all(row.state == "HIT" for row in rows):
        about = {"name": config.name, "config": config.model_dump(mode="json"), "force": force}
        name = f"{config.name}-{uuid.uuid4().hex[:8]}"
        return Run(name, stage_specs(config), config.run, about, display=display).execute()
    with prefect_server(home_of(config.run.root)):
        from flows.lifecycle import lifecycle_flow

        record: Record = lifecycle_flow(config=config, force=force)
    return record


def run_stage(run_id: str, stage: str, force: bool, root: str, display: Display) -> Record:
    """Run one stage of a recorded run as a Prefect flow."""
    use_display(display)
    open_store(root, create=False).read_run(run_id)  # refuse an unknown run before a server starts
    with prefect_server(home_of(root)):
        from flows.stage import stage_flow

        record: Record = stage_flow(run_id=run_id, stage=stage, force=force, root=root)
    return record


def home_of(root: str) -> Path:
    """Where Prefect keeps its database for runs under `root`."""
    if "://" in root and not root.startswith("file://"):
        return Path.home() / ".cache" / "t2i-lifecycle" / "prefect"
    return local_path(root) / ".prefect"


def draw(run_id: str, prompts: Sequence[str], stage: str | None, seed: int, out: Path, root: str) -> list[Path]:
    """Draw prompts with a checkpoint of a run, one PNG each."""
    store = open_store(root, create=False)
    folder = store.local(_checkpoint(store, store.read_run(run_id), stage))
    from PIL import Image

    from models.sampling.generate import load_generator

    pictures = load_generator(folder).sample(list(prompts), [seed] * len(prompts))
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{number:02}-{seed}.png" for number in range(len(prompts))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def _checkpoint(store: Store, record: dict[str, Any], stage: str | None) -> Artifact:
    config = parse(LifecycleConfig, record["config"], f"the record of run {record['run']}")
    wanted = stage or config.chain[-1]
    entries = {entry["name"]: entry for entry in record["stages"]}
    if wanted not in config.checkpoints:
        raise ConfigError(f"stage {wanted!r} makes no checkpoint; choose one of {', '.join(config.checkpoints)}")
    entry = entries.get(wanted, {})
    found = store.find(wanted, entry["key"]) if entry.get("digest") else None
    if found is None:
        raise ConfigError(f"run {record['run']} has no checkpoint of stage {wanted!r} yet; run it with t2i run")
    return found
