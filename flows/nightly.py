"""Every night: take what is new, curate it against everything seen before, train the champion on, let the gate decide.

Two pointers carry one night to the next: `<name>-champion` (with what it learnt from) and `<name>-seen`, the watermark.
The watermark moves whatever the gate says: pictures of a refused night are not tried again. A night that broke moves
neither, and its retry goes on where it stopped.
"""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from data_curation.filter_config import RememberConfig
from flows.config import LifecycleConfig
from flows.dag import CANDIDATE, curation, seeded, training_set
from flows.judged import judge_of
from flows.prefect_call import PrefectCall, flow_run_id
from flows.run import Record, Run
from flows.shown import PrefectDisplay, show
from infra.artifacts import Artifact
from infra.errors import ConfigError, GateFailed
from infra.pointers import Move, champion_of, move, moves
from infra.records import lifecycles
from infra.stages import StageSpec
from infra.storage import Store, open_store
from models.pretraining.config import FlowMatchingConfig
from tasks.catalog import spec_of
from tasks.config import EvaluateConfig, FeaturesConfig, GateConfig, PromptSetConfig
from tasks.promote import PromoteConfig

Beside = dict[str, tuple[Artifact, ...]]
CURRENT, SEEN = "current", "seen"


@flow(name="nightly", flow_run_name="nightly of {config.name}", persist_result=False)
def nightly_flow(
    config: LifecycleConfig = LifecycleConfig(),
    max_loss: Annotated[float, Field(ge=-1, le=1)] = 0.02,
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    steps: Annotated[int, Field(ge=1)] | None = None,
    min_new: Annotated[int, Field(ge=1)] = 8,
    keep_sets: Annotated[int, Field(ge=1)] = 8,
) -> dict[str, Any]:
    """Train the champion on with tonight's new data, and promote the result if it is not worse.

    Args:
        config: The lifecycle's settings; its source is read as it is now, rows seen before are passed over
        max_loss: Promote unless prompt accuracy falls by more than this; below 0 it must rise
        replay: Share of the steps that draw from earlier training sets
        steps: Training steps; none: those of the preset's last pre-training stage
        min_new: Fewer new pictures are not worth a night; they are seen, but not trained on
        keep_sets: Earlier training sets that are replayed: the first one and the latest others
    """
    store = open_store(config.run.root)
    champion, seen = begin(store, config)
    night = Night(config, champion, seen, flow_run_id(f"{config.name}-nightly"), keep_sets)
    call = PrefectCall(config.run.root)
    looked = call.execute(night.run(night.curated()))
    if pictures(store, looked) < min_new:
        night.remember(store, looked)
        return looked
    try:
        record = call.execute(night.run(night.specs(max_loss, replay, steps)))
    except GateFailed:
        night.remember(store, store.read_run(night.run_id))
        raise
    night.promote(store, record)
    night.remember(store, record)
    return show(record)


class Night:
    """One night: what it starts from, the stages it runs, and how it moves the pointers."""

    def __init__(self, config: LifecycleConfig, champion: Move, seen: Move, run_id: str, keep_sets: int = 8) -> None:
        self.config, self.champion, self.seen, self.run_id = config, champion, seen, run_id
        sets = champion.beside["sets"]
        self.sets = (sets[0], *sets[max(1, len(sets) - keep_sets + 1) :])
        self.past = {f"past-{number:02}": artifact for number, artifact in enumerate(self.sets)}

    def run(self, specs: list[StageSpec]) -> Run:
        """The run of these stages; the champion, its judge, truth and training sets are given."""
        beside = {role: self.champion.beside[role][0] for role in ("judge", "truth")}
        about = {"name": self.config.name, "flow": "nightly", "config": self.config.model_dump(mode="json"),
                 "current": self.champion.artifact.digest, "generation": self.champion.generation}  # fmt: skip
        given = {CURRENT: self.champion.artifact, SEEN: self.seen.artifact, **beside, **self.past}
        return Run(self.run_id, specs, self.config.run, about, display=PrefectDisplay(), given=given)

    def curated(self) -> list[StageSpec]:
        """Curation up to the manifest, and the new watermark."""
        first = [spec for spec in curation(self.config.data, known=SEEN) if spec.name != "encode"]
        return [*first, spec_of("remembered", "remember", RememberConfig(), known=SEEN, manifest="buckets")]

    def specs(self, max_loss: float, replay: float, steps: int | None) -> list[StageSpec]:
        """All stages of the night."""
        encoded = [curation(self.config.data, known=SEEN)[-1]]
        if self.config.autoencoder is not None:
            encoded.append(spec_of("features", "features", FeaturesConfig(), data="encode", model=CURRENT))
        stage = seeded(continued(self.config, replay, steps), self.config.seed)
        judged = {CURRENT: CURRENT, CANDIDATE: CANDIDATE}
        past = {name: name for name in self.past}
        return [
            *self.curated(), *encoded,
            spec_of(CANDIDATE, "flow_matching", stage, data=training_set(self.config), init=CURRENT, **past),
            spec_of("nightly-scores", "evaluate", nightly_gate(self.config, max_loss), judge="judge", data="past-00",
                    truth="truth", **judged),
            spec_of("promoted", "promote", PromoteConfig(), scores="nightly-scores", candidate=CANDIDATE),
        ]  # fmt: skip

    def promote(self, store: Store, record: Record) -> None:
        """Point at the candidate, unless another run has moved the champion since this one began."""
        beside: Beside = self.champion.beside | {"sets": (*self.sets, made(store, record, training_set(self.config)))}
        why = f"passed its gate against generation {self.champion.generation}"
        move(store, champion_of(self.config.name), self.champion.generation, made(store, record, CANDIDATE), self.run_id, why,
             beside)  # fmt: skip

    def remember(self, store: Store, record: Record) -> None:
        """Move the watermark behind tonight's rows."""
        manifest = made(store, record, "remembered")
        move(store, seen_of(self.config), self.seen.generation, manifest, self.run_id, "seen")


def continued(config: LifecycleConfig, replay: float, steps: int | None) -> FlowMatchingConfig:
    """The last stage of pre-training, at its gentle learning rate and without REPA, on every domain."""
    last = config.pretrain[-1]
    select = last.select.model_copy(update={"domains": None, "replay": replay})
    train = last.train if steps is None else last.train.model_copy(update={"steps": steps})
    return last.model_copy(update={"name": CANDIDATE, "repa": None, "select": select, "train": train})


def nightly_gate(config: LifecycleConfig, max_loss: float) -> EvaluateConfig:
    """The first prompt list of the lifecycle, asked of both models."""
    first = config.evaluate.sets[0] if config.evaluate.sets else PromptSetConfig()
    gate = GateConfig(stage=CANDIDATE, metric="prompt_accuracy", parent=CURRENT, parent_drop=max_loss)
    sets = (first.model_copy(update={"stages": None}),)
    return config.evaluate.model_copy(update={"sets": sets, "subjects": (), "gates": (gate,)})


def seen_of(config: LifecycleConfig) -> str:
    """Name of the pointer at the manifest of everything seen."""
    return f"{config.name}-seen"


def begin(store: Store, config: LifecycleConfig) -> tuple[Move, Move]:
    """Where champion and watermark are; the first time, the newest finished lifecycle of this name sets them."""
    judge_of(config, "a night is")
    champion, seen = moves(store, champion_of(config.name)), moves(store, seen_of(config))
    if champion and seen:
        return champion[-1], seen[-1]
    finished = lifecycles(store.list_runs(), config.name)
    if not finished:
        raise ConfigError(
            f"root {store.root} has no finished run called {config.name!r}; run it once first: t2i run PRESET"
        )
    run, start = finished[0], LifecycleConfig.model_validate(finished[0]["config"])
    beside: Beside = {"judge": (made(store, run, "judge"),), "truth": (made(store, run, "source"),),
              "sets": (made(store, run, training_set(start)),)}  # fmt: skip
    why, model = "the first one", made(store, run, start.chain[-1])
    first = champion[-1] if champion else move(store, champion_of(config.name), 0, model, run["run"], why, beside)
    mark = seen[-1] if seen else move(store, seen_of(config), 0, made(store, run, "buckets"), run["run"], why)
    return first, mark


def made(store: Store, record: Record, stage: str) -> Artifact:
    """What a recorded run made in a stage."""
    entry: Record = next((each for each in record["stages"] if each["name"] == stage), {})
    found = store.find(stage, entry["key"]) if entry.get("digest") else None
    if found is None:
        raise ConfigError(f"run {record['run']} has no result of stage {stage!r}; finish it with t2i run first")
    return found


def pictures(store: Store, record: Record) -> int:
    """New pictures that curation kept."""
    return int(made(store, record, "buckets").facts.get("kept", 0))
