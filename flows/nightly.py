"""Every night: fetch what is new, curate it, train the promoted model on, and promote the result if it passes its gate."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.config import LifecycleConfig
from flows.dag import curation, seeded
from flows.display import current_display
from flows.plan import history
from flows.prefect_call import PrefectCall, flow_run_id
from flows.run import Run
from infra.artifacts import Artifact
from infra.errors import ConfigError
from infra.stages import StageSpec
from infra.storage import Store, open_store
from models.pretraining.config import FlowMatchingConfig
from tasks.catalog import spec_of
from tasks.config import EvaluateConfig, GateConfig, PromptSetConfig
from tasks.promote import PromoteConfig

CURRENT, CANDIDATE = "current", "nightly"


@flow(name="nightly", flow_run_name="nightly of {config.name}", persist_result=False)
def nightly_flow(
    config: LifecycleConfig = LifecycleConfig(),
    max_loss: float = 0.02,
) -> dict[str, Any]:
    """Curate `config.data.source` as it is now, train on, promote unless prompt accuracy falls by more than `max_loss`."""
    store = open_store(config.run.root)
    current, judge = model_in_use(store, config), _last(store, "judge")
    run = Run(
        flow_run_id(f"{config.name}-nightly"),
        nightly_specs(config, max_loss),
        config.run,
        {"name": config.name, "flow": "nightly", "config": config.model_dump(mode="json"), "current": current.digest},
        display=current_display(),
        given={CURRENT: current, "judge": judge},
    )
    return run.execute(PrefectCall(config.run.root))


def nightly_specs(config: LifecycleConfig, max_loss: float) -> list[StageSpec]:
    """The stages of one night; `current` and `judge` are given."""
    return [
        *curation(config.data),
        spec_of(CANDIDATE, "flow_matching", seeded(continued(config), config.seed), data="encode", init=CURRENT),
        spec_of(
            "nightly-scores", "evaluate", nightly_gate(config, max_loss), judge="judge", data="encode", truth="source",
            **{CURRENT: CURRENT, CANDIDATE: CANDIDATE},
        ),
        spec_of("promoted", "promote", PromoteConfig(), scores="nightly-scores", candidate=CANDIDATE),
    ]  # fmt: skip


def continued(config: LifecycleConfig) -> FlowMatchingConfig:
    """The last stage of pre-training, at its gentle learning rate and without REPA, on every domain."""
    last = config.pretrain[-1]
    select = last.select.model_copy(update={"domains": None})
    return last.model_copy(update={"name": CANDIDATE, "repa": None, "select": select})


def nightly_gate(config: LifecycleConfig, max_loss: float) -> EvaluateConfig:
    """The first prompt list of the lifecycle, asked of both models."""
    first = config.evaluate.sets[0] if config.evaluate.sets else PromptSetConfig()
    gate = GateConfig(stage=CANDIDATE, metric="prompt_accuracy", parent=CURRENT, parent_drop=max_loss)
    sets = (first.model_copy(update={"stages": None}),)
    return config.evaluate.model_copy(update={"sets": sets, "subjects": (), "gates": (gate,)})


def model_in_use(store: Store, config: LifecycleConfig) -> Artifact:
    """The checkpoint promoted last, or the end of the last lifecycle's chain."""
    promoted = history(store).get("promoted")
    if promoted is not None:
        return Artifact.model_validate(promoted.facts["promoted"])
    return _last(store, config.chain[-1])


def _last(store: Store, stage: str) -> Artifact:
    found = history(store).get(stage)
    if found is None:
        raise ConfigError(
            f"root {store.root} has no artifact of stage {stage!r}; run the whole lifecycle first: t2i run PRESET"
        )
    return found
