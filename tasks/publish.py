"""Publish a checkpoint or an adapter: a stock pipeline folder (or the adapter's files) with a complete card and lineage.json."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

from infra.artifacts import Artifact, file_entry, files_under
from infra.errors import ConfigError, GateFailed
from infra.lineage import Graph
from infra.storage import Store
from tasks.card_facts import Judged, curation, judged, record_of, shareable, training
from tasks.cards import CardFacts, licence_of, render
from tasks.hub import push, ready
from tasks.lineage import target as named
from tasks.publish_place import LINEAGE, MAKER, earlier_files, move_in

HUB = "hf://"


@dataclass(frozen=True)
class Wish:
    """What a person asks for beside the model and the place."""

    run: str = "latest"
    steps: int | None = None  # of a student with several; none: its own
    base: str | None = None  # OWNER/NAME of the published model that an adapter or student belongs to
    licence: str | None = None
    merged: bool = False  # publish a personalised model whole, not its adapter
    anyway: bool = False
    public: bool = False


def publish(store: Store, what: str, target: str, wish: Wish) -> dict[str, Any]:
    """Write or push it; returns where it is, what it is and the gates it missed."""
    graph = Graph(store.list())
    artifact, steps = resolve(store, graph, what, wish)
    repo_id = _repo_id(target.removeprefix(HUB)) if target.startswith(HUB) else None
    if repo_id is None and "://" in target:
        raise ConfigError(f"target {target!r} is neither a folder nor {HUB}OWNER/NAME; give one of them")
    if repo_id is not None:
        ready(repo_id)
    place = Path(target).expanduser()
    earlier = set[str]() if repo_id else earlier_files(place)
    beside = None if repo_id else place.absolute().parent  # so that a new folder appears whole
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".t2i-publish-", dir=beside) as scratch:
        staged = Path(scratch) / (repo_id or place.name).split("/")[-1]
        steps, missed = stage(store, graph, artifact, steps, staged, repo_id or place.name, wish)
        if repo_id is None:
            where = move_in(staged, place, earlier)
        else:
            where = push(staged, repo_id, f"{artifact.stage} {artifact.digest[:12]}", private=not wish.public)
    return {"target": where, "stage": artifact.stage, "digest": artifact.digest, "steps": steps, "missed": missed}


def resolve(store: Store, graph: Graph, what: str, wish: Wish) -> tuple[Artifact, int | None]:
    """The checkpoint that `what` names, and the step count that an export of it was made for."""
    path = Path(what).expanduser()
    if (path / LINEAGE).is_file():
        about, sampled = (json.loads((path / name).read_text()) for name in (LINEAGE, "sampling.json"))
    elif (exported := _export(store, graph, what, wish.run)) is not None:
        about, sampled = (json.loads(store.read(exported, f"{what}/{name}")) for name in (LINEAGE, "sampling.json"))
    else:
        return _checkpoint(store, named(store, graph, what, wish.run)), wish.steps
    found = graph.by_digest.get(about["digest"])
    if found is None:
        raise ConfigError(
            f"{what!r} was made from {about['digest'][:12]}, which is not in {store.root}; name its --root"
        )
    return _checkpoint(store, found), wish.steps or (sampled["steps"] if sampled["distilled"] else None)


def _checkpoint(store: Store, artifact: Artifact) -> Artifact:
    if all(entry.path != "sampling.json" for entry in store.listing(artifact)):
        raise ConfigError(
            f"{artifact.stage} {artifact.digest[:12]} is a {artifact.kind}, not a checkpoint or adapter; "
            "`t2i status latest` lists the stages"
        )
    return artifact


def _export(store: Store, graph: Graph, what: str, run: str) -> Artifact | None:
    """The run's export artifact, if it has a folder of that name."""
    stages = store.read_run(run)["stages"] if store.list_runs() else []
    exports = [graph.by_digest.get(str(entry["digest"])) for entry in stages if entry["name"] == "export"]
    return next((e for e in exports if e is not None and what in e.facts.get("exports", {})), None)


def stage(store: Store, graph: Graph, artifact: Artifact, steps: int | None, folder: Path, source: str, wish: Wish) -> tuple[int, list[str]]:  # fmt: skip
    """Write all files of a publication, return its step count and missed gates; refuses a checkpoint whose gate failed unless it is wanted anyway."""
    from models.networks.checkpoint import check_steps, read_card

    checkpoint = store.local(artifact)
    card = read_card(checkpoint)
    steps = card.steps if steps is None else steps
    try:
        check_steps(card, steps, card.guidance)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    run = _run_of(store, artifact, wish.run)
    found = judged(store, graph, artifact, steps, card.steps)
    _pass(artifact, found, run, wish.anyway)
    adapter = (checkpoint / "adapter").is_dir() and not wish.merged and not _with_text(checkpoint / "adapter")
    base = _base_of(card.origin) if wish.base is None else _repo_id(wish.base)
    usage, note, scheduler = _files(checkpoint, folder, artifact, steps, source, adapter, base, found.prompts)
    told = json.loads((folder / "sampling.json").read_text())
    (folder / "sampling.json").write_text(json.dumps(shareable(told), indent=2))
    lineage = record_of(store, graph, artifact)
    funnel, curated = curation(graph, artifact)
    if run.get("config"):
        preset = {name: value for name, value in run["config"].items() if name != "run"}
        (folder / "config.yaml").write_text(yaml.safe_dump(shareable(preset), sort_keys=True))
    if found.examples is not None:
        (folder / "examples.png").write_bytes(found.examples)
    facts = CardFacts(
        title=folder.name, usage=usage, note=note, sampling=card, steps=steps, scheduler=scheduler, adapter=adapter, base=base,
        licence=wish.licence or licence_of(lineage["licences"]), trained=training(graph, artifact), funnel=funnel,
        packaged_text_encoder=not adapter and not (checkpoint / "text_encoder").is_dir(), lineage=lineage,
        curation=shareable(curated), judged=found, preset=bool(run.get("config")), seed=run.get("config", {}).get("seed"),
        provenance=artifact.facts.get("provenance", {}),
    )  # fmt: skip
    (folder / "README.md").write_text(render(facts), encoding="utf-8")
    files = [
        [e.path, e.size, e.sha256]
        for e in (file_entry(path, folder) for path in files_under(folder))
        if e.path != LINEAGE
    ]
    about = lineage | {"published_by": MAKER, "steps_per_picture": steps, "files": files}
    (folder / LINEAGE).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    return steps, found.missed


def _pass(artifact: Artifact, found: Judged, run: dict[str, Any], anyway: bool) -> None:
    missed = list(found.missed)
    evaluation = next((entry for entry in run.get("stages", []) if entry["name"] == "evaluate"), None)
    unjudged = not found.verdicts and not found.scores
    if unjudged and evaluation is not None and evaluation["status"] == "failed":
        missed.append(f"the evaluation of run {run['run']} failed: {run.get('error')}")
    if missed and not anyway:
        raise GateFailed(
            f"{artifact.stage} {artifact.digest[:12]} is not published: {'; '.join(missed)}; "
            "publish another checkpoint, or this one with --anyway, which its card will say"
        )


def _with_text(adapter: Path) -> bool:
    """Whether text encoders belong to an adapter, so that only the whole model can be given away."""
    from models.personalization.text_tuning import tunes_text

    return tunes_text(adapter)


def _files(checkpoint: Path, folder: Path, artifact: Artifact, steps: int, source: str, adapter: bool, base: str | None, prompts: Sequence[str]) -> tuple[str, str, str]:  # fmt: skip
    """The model's own files; returns the code that uses them, a note on it and the scheduler's name."""
    from models.networks.checkpoint import read_card
    from models.networks.export import export_pipeline

    if not adapter:
        export_pipeline(checkpoint, folder, steps)
        code, note = (folder / "README.md").read_text().split("```python\n")[1].split("```\n")
        scheduler = folder / "scheduler" / "scheduler_config.json"
        name = (
            json.loads(scheduler.read_text())["_class_name"]
            if scheduler.exists()
            else "Euler steps, as in the code above"
        )
        return code.replace('"this folder"', json.dumps(source)), note.strip(), name
    if base is None:
        raise ConfigError(
            f"{artifact.stage} is an adapter and its card must name the model it belongs to; publish that first, then "
            "give --base OWNER/NAME, or publish the merged model with --merged"
        )
    from tasks.adapter_files import write_adapter

    prompt = _prompt_of(artifact, read_card(checkpoint).trigger, prompts)
    return *write_adapter(checkpoint, folder, prompt, source, base), "that of the base model"


def _prompt_of(artifact: Artifact, trigger: str | None, prompts: Sequence[str]) -> str:
    """A prompt that the adapter was judged by, else the plainest one."""
    if trigger is None:
        return prompts[0] if prompts else "a picture"
    plainest = f"a {trigger} {artifact.facts.get('config', {}).get('class_word') or ''}".strip()
    return next((prompt for prompt in prompts if trigger in prompt.split()), plainest)


def _run_of(store: Store, artifact: Artifact, run: str) -> dict[str, Any]:
    """The record of the run that the artifact belongs to, the named one first; empty where none has it."""
    runs = store.list_runs()
    runs = [*(r for r in runs if r["run"] == run), *runs]
    return next((r for r in runs if any(s.get("digest") == artifact.digest for s in r.get("stages", []))), {})


def _base_of(origin: dict[str, Any] | None) -> str | None:
    """The Hub's model that a taken-over pipeline came from; a folder of this machine is none."""
    try:
        return None if origin is None else _repo_id(str(origin.get("source", "")).split("@")[0])
    except ConfigError:
        return None


def _repo_id(text: str) -> str:
    """`OWNER/NAME` as the Hub takes it."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ConfigError(f"{text!r} is no OWNER/NAME of the Hub: {error}") from error
    if text.count("/") != 1:
        raise ConfigError(f"{text!r} is no OWNER/NAME of the Hub; give both, such as me/my-model")
    return text
