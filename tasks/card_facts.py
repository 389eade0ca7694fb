"""What a model card says, gathered from records alone: training stages, curation, scores, verdicts. No weight is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.artifacts import Artifact
from infra.lineage import Graph, roles_of
from infra.storage import Store
from tasks.lineage import lineage
from tasks.report_tables import COLUMNS, funnel_rows

TECHNIQUES = {
    "flow_matching": "flow matching",
    "autoencoder": "autoencoder",
    "import_model": "taken over from a diffusers pipeline",
    "dpo": "Diffusion-DPO",
    "reward_model": "reward model",
    "grpo": "Flow-GRPO",
    "nft": "DiffusionNFT",
    "refl": "ReFL",
    "dreambooth": "DreamBooth with LoRA",
    "mix": "mix of LoRA adapters",
    "distill_mix": "distilled mix of LoRA adapters",
}
UNTRAINED = ("import_model", "mix", "distill_mix")  # make a checkpoint, and have no `train` of their own
SETS = {"_full": "held-out, full vocabulary", "_long": "held-out, long wording"}


@dataclass(frozen=True)
class Score:
    """One measured value with its 95 % interval and the number of pictures behind it."""

    metric: str
    value: float
    low: float
    high: float
    n: int

    @property
    def label(self) -> str:
        """Its name in words."""
        return COLUMNS.get(self.metric, self.metric.replace("_", " "))

    @property
    def asked(self) -> str:
        """Which prompts it was measured on."""
        if self.metric.startswith("subject"):
            return "prompts of the subject"
        suffix = next((suffix for suffix in SETS if self.metric.endswith(suffix)), None)
        return "held-out, basic vocabulary" if suffix is None else SETS[suffix]


@dataclass(frozen=True)
class Judged:
    """How a checkpoint was judged at the step count that is published."""

    scores: tuple[Score, ...] = ()
    verdicts: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[str, ...] = ()
    examples: bytes | None = None  # PNG: the prompts' pictures in a row

    @property
    def missed(self) -> list[str]:
        """Gates that were missed, in words."""
        return [f"{gate['metric']}: {gate['reason']}" for gate in self.verdicts if not gate["passed"]]


@dataclass(frozen=True)
class Trained:
    """One training stage behind the model."""

    stage: str
    technique: str
    start: str
    steps: int | None
    batch_size: int | None
    rates: str
    samples: int | None
    seconds: float
    config: Mapping[str, Any] = field(default_factory=dict)


def judged(store: Store, graph: Graph, artifact: Artifact, steps: int, own_steps: int) -> Judged:
    """Gates of the newest evaluation and comparison that read the checkpoint, and the scores at `steps` steps."""
    verdicts, scores, prompts, examples = list[Mapping[str, Any]](), list[Score](), list[str](), None
    evaluation, role = _reader(graph, artifact, "evaluate")
    if evaluation is None:
        evaluation, role = _reader(graph, artifact, "measure_prompts")
    if evaluation is not None:
        record = json.loads(store.read(evaluation, "scores.json"))
        verdicts += [v for v in (*record.get("gates", []), *record.get("collapse", [])) if v["stage"] == role]
        if steps == own_steps:
            scores = _scores(record["scores"].get(role, {}))
            prompts, examples = _examples(store, evaluation, role)
    drawn, role = _reader(graph, artifact, "draw_pictures")
    if drawn is not None and examples is None and steps == own_steps:
        prompts, examples = _examples(store, drawn, role)
    comparison, role = _reader(graph, artifact, "compare")
    if comparison is not None:
        record, label = json.loads(store.read(comparison, "comparison.json")), f"{role}@{steps}"
        verdicts += [verdict for verdict in record["verdicts"] if verdict["row"] == label]
        if not scores:
            scores = _scores(record["rows"].get(label, {}))
    return Judged(tuple(scores), tuple(verdicts), tuple(prompts), examples)


def _reader(graph: Graph, artifact: Artifact, function: str) -> tuple[Artifact | None, str]:
    """The stage of a function that read the artifact last, and the role it had there."""
    found: tuple[Artifact | None, str] = (None, "")
    for each in sorted(graph.by_digest.values(), key=lambda each: str(each.facts.get("finished", ""))):
        if each.facts.get("function") == function:
            found = next(((each, role) for role, digest in roles_of(each).items() if digest == artifact.digest), found)
    return found


def _scores(found: Mapping[str, Any]) -> list[Score]:
    """Scores with an interval, in the report's order."""
    names = [*(name for name in COLUMNS if name in found), *(name for name in sorted(found) if name not in COLUMNS)]
    rows = [(name, found[name]) for name in names if isinstance(found[name], dict)]
    return [Score(name, s["value"], s["low"], s["high"], int(s["n"])) for name, s in rows]


def _examples(store: Store, evaluation: Artifact, stage: str) -> tuple[list[str], bytes | None]:
    listed = {entry.path for entry in store.listing(evaluation)}
    if not {"grid.json", f"samples/{stage}.png"} <= listed:
        return [], None
    return json.loads(store.read(evaluation, "grid.json"))["prompts"], store.read(evaluation, f"samples/{stage}.png")


def training(graph: Graph, artifact: Artifact) -> list[Trained]:
    """The training stages behind a checkpoint, first to last."""
    stages = [each for each in graph.ancestors(artifact) if "train" in each.facts.get("config", {})]
    named = [each for each in graph.ancestors(artifact) if each.facts.get("function") in UNTRAINED]
    return [_trained(graph, each) for each in graph.ancestors(artifact) if each in (*stages, *named)]


def _trained(graph: Graph, artifact: Artifact) -> Trained:
    facts, config = artifact.facts, artifact.facts.get("config", {})
    train = config.get("train", {})
    optimizer = train.get("optimizer", {})
    rates = [f"{name} {optimizer[f'{name}_lr']:g}" for name in ("muon", "adamw") if optimizer.get(f"{name}_lr")]
    method = config.get("method", {}).get("kind")
    start = next((each.stage for role, each in graph.inputs(artifact).items() if role in ("start", "init")), "")
    return Trained(
        stage=artifact.stage, start=start, steps=train.get("steps"), batch_size=train.get("batch_size"),
        technique=f"distillation: {method}" if method else TECHNIQUES.get(facts.get("function", ""), "training"),
        rates=", ".join(rates), samples=facts.get("samples"), seconds=float(facts.get("seconds", 0)), config=shareable(config),
    )  # fmt: skip


def curation(graph: Graph, artifact: Artifact) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The funnel from URLs to pictures, and the settings of its stages."""
    stages = {each.stage: each for each in graph.ancestors(artifact) if each.kind in ("source", "manifest")}
    return funnel_rows(stages), {name: each.facts.get("config", {}) for name, each in stages.items()}


def record_of(store: Store, graph: Graph, artifact: Artifact) -> dict[str, Any]:
    """lineage.json: every stage behind the artifact by digest, pictures in numbers; no address of this machine."""
    found = lineage(store, graph, artifact)
    steps = [{name: value for name, value in step.items() if name != "uri"} for step in found["steps"]]
    about = {"stage": artifact.stage, "digest": artifact.digest, "parents": list(artifact.parents)}
    return about | {"steps": steps} | {name: found[name] for name in ("missing", "pictures", "licences", "domains")}


def shareable(value: Any) -> Any:
    """A configuration without what is private: absolute paths keep their last name, addresses lose user and query."""
    match value:
        case dict():
            return {name: shareable(each) for name, each in value.items()}
        case list():
            return [shareable(each) for each in value]
        case str() if re.match(r"[a-z0-9+]+://", value):
            return re.sub(r"^([a-z0-9+]+://)[^/@]*@", r"\1", value.split("?")[0])
        case str() if re.match(r"(/|~|[A-Za-z]:\\)", value):
            return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        case _:
            return value
