"""What the command line does with runs: a Prefect server around a flow, or none when nothing is left to run."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from flows.display import use_display
from flows.plan import PlanRow
from flows.run import Display, Record, Run
from infra.artifacts import Artifact
from infra.config import parse
from infra.disk import require_disk
from infra.embedded import prefect_server
from infra.errors import ConfigError
from infra.local_files import local_path
from infra.storage import Store, open_store
from models.networks.config import LoraConfig
from models.personalization.config import DreamBoothConfig, UntilLearntConfig

LONGEST, FASTER = 1.6, 1.6  # times steps and rate of the run's own subject, which may be an easier one

if TYPE_CHECKING:
    from models.posttraining.prompt_enhancement import Enhanced


def run_lifecycle(config: LifecycleConfig, rows: Sequence[PlanRow], force: list[str], display: Display) -> Record:
    """Run the lifecycle as a Prefect flow; when every stage is there already, only check and write the record."""
    use_display(display)
    if all(row.state == "HIT" for row in rows):
        about = {"name": config.name, "config": config.model_dump(mode="json"), "force": force}
        name = f"{config.name}-{uuid.uuid4().hex[:8]}"
        return Run(name, stage_specs(config), config.run, about, display=display).execute()
    require_disk(config.run.root, int(config.run.min_free_gb * 1e9))  # refuse before a server starts
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


def run_personalize(
    folder: Path, name: str, run_id: str, changes: Mapping[str, Any], root: str, display: Display
) -> Record:
    """Learn a subject of one's own on a finished run as a Prefect flow."""
    use_display(display)
    store = open_store(root, create=False)
    recorded = store.read_run(run_id)
    recorded = store.read_run(recorded.get("personalizes", recorded["run"]))  # the latest may be another subject's
    config = parse(LifecycleConfig, recorded["config"], f"the record of run {recorded['run']}")
    stage = own_stage(config, folder, name, changes)
    with prefect_server(home_of(root)):
        from flows.personalize import personalize_flow

        record: Record = personalize_flow(str(recorded["run"]), stage, root)
    return record


def own_stage(config: LifecycleConfig, folder: Path, name: str, changes: Mapping[str, Any]) -> DreamBoothConfig:
    """Settings of a subject of one's own: those of the run's first personalize stage, but for the subject and its length.

    Without `steps` it is looked at and learnt at a higher rate until nothing is gained, for `LONGEST` times the stage's steps
    at most; one that tunes text encoders takes the stage's own.
    """
    model = config.personalize[0] if config.personalize else DreamBoothConfig()
    fresh = {"name": f"dreambooth-{name}", "subject": f"{folder.expanduser().absolute()}/", "fingerprint": None,
             "token": None, "class_word": name.replace("-", " ")}  # fmt: skip
    given = {key: value for key, value in changes.items() if value is not None}
    train, until = model.train, model.until
    if "steps" in given or model.text is not None:
        train, until = train.model_copy(update={"steps": given.pop("steps", train.steps)}), None
    else:
        quicker = train.optimizer.model_copy(update={"adamw_lr": FASTER * train.optimizer.adamw_lr})
        train = train.model_copy(update={"steps": round(LONGEST * train.steps), "optimizer": quicker})
        until = until or UntilLearntConfig()
    given |= {"train": train.model_dump(), "until": None if until is None else until.model_dump()}
    if "rank" in given:
        given["lora"] = (model.lora or LoraConfig()).model_dump() | {"rank": given.pop("rank")}
    return parse(DreamBoothConfig, model.model_dump() | fresh | given, f"subject {name}")


def made(record: Record, root: str) -> dict[str, str]:
    """What learning a subject left behind: folders and files by what they are."""
    store = open_store(root, create=False)
    stages = {entry["name"]: entry for entry in record["stages"]}
    name = str(record["name"])
    learnt, exported = (store.find(each, stages[each]["key"]) for each in (name, f"{name}-export"))
    assert learnt is not None  # the run has just made sure of both
    assert exported is not None
    folder, pipelines = store.local(learnt), store.local(exported)
    adapter = {"adapter": str(folder / "adapter")} if (folder / "adapter").is_dir() else {}
    return adapter | {
        "run": str(record["run"]), "token": str(learnt.facts["token"]), "class": str(record["subject"]["class_word"]),
        "checkpoint": str(folder), "grid": str(folder / "grid.png"),
        "pipeline": str(next(path for path in pipelines.iterdir() if path.is_dir())),
    }  # fmt: skip


def home_of(root: str) -> Path:
    """Where Prefect keeps its database for runs under `root`."""
    if "://" in root and not root.startswith("file://"):
        return Path.home() / ".cache" / "t2i-lifecycle" / "prefect"
    return local_path(root) / ".prefect"


def draw(run_id: str, prompts: Sequence[str], stage: str | None, seed: int, out: Path, root: str) -> list[Path]:
    """Draw prompts with a checkpoint of a run, one PNG each."""
    store = open_store(root, create=False)
    checkpoint = _checkpoint(store, store.read_run(run_id), stage)
    folder = store.local(checkpoint)
    from PIL import Image

    from models.networks.text_features import warn_of_cut
    from models.sampling.generate import load_generator
    from tasks.lineage import stamp

    generator = load_generator(folder)
    warn_of_cut(prompts, generator.around.encode)
    pictures = generator.sample(list(prompts), [seed] * len(prompts))
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{number:02}-{seed}.png" for number in range(len(prompts))]
    for path, picture, prompt in zip(paths, pictures, prompts, strict=True):
        Image.fromarray(picture).save(path, pnginfo=stamp(checkpoint, prompt=prompt, seed=seed))
    return paths


def enhanced(run_id: str, prompts: Sequence[str], stage: str | None, root: str) -> list[Enhanced]:
    """Prompts as the run's enhancer rewrites them for a checkpoint, whose trigger words it keeps."""
    store = open_store(root, create=False)
    record = store.read_run(run_id)
    checkpoint = store.local(_checkpoint(store, record, stage))
    config = parse(LifecycleConfig, record["config"], f"the record of run {record['run']}").posttrain.prompt_enhancer
    entry: dict[str, Any] = next((e for e in record["stages"] if config is not None and e["name"] == config.name), {})
    found = store.find(str(entry["name"]), entry["key"]) if entry.get("digest") else None
    if found is None:
        raise ConfigError(
            f"run {record['run']} has no prompt enhancer; set posttrain.prompt_enhancer: {{}} in its preset and run it"
        )
    from models.networks.checkpoint import read_card
    from models.posttraining.enhancer_files import load_enhancer

    trigger = read_card(checkpoint).trigger
    kept = home_of(root).with_name(".prompts")  # a chat model is asked once for a prompt
    enhancer = load_enhancer(store.local(found), () if trigger is None else (trigger,), kept)
    return [enhancer.enhance(prompt) for prompt in prompts]


def _checkpoint(store: Store, record: dict[str, Any], stage: str | None) -> Artifact:
    config = parse(LifecycleConfig, record["config"], f"the record of run {record['run']}")
    known = (str(record["name"]),) if "personalizes" in record else config.checkpoints
    wanted = stage or (known[0] if "personalizes" in record else config.chain[-1])
    entries = {entry["name"]: entry for entry in record["stages"]}
    if wanted not in known:
        raise ConfigError(f"stage {wanted!r} makes no checkpoint; choose one of {', '.join(known)}")
    entry = entries.get(wanted, {})
    found = store.find(wanted, entry["key"]) if entry.get("digest") else None
    if found is None:
        raise ConfigError(f"run {record['run']} has no checkpoint of stage {wanted!r} yet; run it with t2i run")
    return found
