"""Every stage function by name: what it makes, its configuration class, and the callable, imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from infra.config import Config, versioned
from infra.errors import ConfigError
from infra.stages import StageContext, StageSpec


@dataclass(frozen=True)
class StageFunction:
    """A stage function with the class of its configuration."""

    config: type[Config]
    run: Callable[[Any, StageContext], dict[str, Any]]


@dataclass(frozen=True)
class Traits:
    """What a plan must know of a function without importing it; raise `version` when its meaning changes."""

    kind: str
    runs: Literal["local", "train"] = "local"
    version: int = 1


Catalog: TypeAlias = Callable[[str], StageFunction]

TRAITS: dict[str, Traits] = {
    "publish_demo_web": Traits("source", version=2),
    "read_list": Traits("source", version=2),
    "read_folder": Traits("source", version=2),
    "read_subject": Traits("subject"),
    "download": Traits("manifest", version=3),
    "deduplicate": Traits("manifest", version=2),
    "filter_quality": Traits("manifest"),
    "assign_buckets": Traits("manifest"),
    "encode": Traits("training-set"),
    "train_judge": Traits("judge"),
    "flow_matching": Traits("checkpoint", runs="train"),
    "make_pairs": Traits("pairs", version=2),
    "dpo": Traits("checkpoint", runs="train", version=2),
    "reward_model": Traits("reward"),
    "grpo": Traits("checkpoint", runs="train"),
    "nft": Traits("checkpoint", runs="train"),
    "refl": Traits("checkpoint", runs="train"),
    "dreambooth": Traits("checkpoint", runs="train", version=4),
    "mix": Traits("checkpoint"),
    "teacher_pairs": Traits("pairs"),
    "distill": Traits("checkpoint", runs="train", version=2),
    "compare": Traits("scores"),
    "evaluate": Traits("scores", version=2),
    "export": Traits("pipelines", version=5),
    "report": Traits("report"),
    "promote": Traits("pointer"),
}


def spec_of(name: str, function: str, config: Config, /, **inputs: str) -> StageSpec:
    """The spec of one stage; `inputs` are role=stage."""
    traits = TRAITS.get(function)
    if traits is None:
        raise ConfigError(f"stage {name!r} asks for the function {function!r}, which tasks/catalog.py does not list")
    return StageSpec(
        name=name,
        function=function,
        version=traits.version,
        kind=traits.kind,
        runs=traits.runs,
        config=config.model_dump(mode="json"),
        versioned=versioned(config),
        inputs=inputs,
    )


def stage_function(name: str) -> StageFunction:
    """One stage function; only the process that runs it pays for its imports."""
    match name:
        case (
            "publish_demo_web"
            | "read_list"
            | "read_folder"
            | "read_subject"
            | "download"
            | "deduplicate"
            | "filter_quality"
            | "assign_buckets"
            | "encode"
        ):
            return _curation(name)
        case "flow_matching" | "dreambooth" | "mix" | "teacher_pairs" | "distill":
            return _training(name)
        case "make_pairs" | "dpo" | "reward_model" | "grpo" | "nft" | "refl":
            return _preference(name)
        case "train_judge" | "compare" | "evaluate" | "export" | "report" | "promote":
            return _proof(name)
        case _:
            raise ConfigError(f"there is no stage function {name!r}; tasks/catalog.py lists {', '.join(TRAITS)}")


def _curation(name: str) -> StageFunction:
    from data_curation import config

    match name:
        case "publish_demo_web":
            from data_curation.demo_web import publish_demo_web

            return StageFunction(config.DemoWebConfig, publish_demo_web)
        case "read_list" | "read_folder":
            from data_curation.sources import read_source

            return StageFunction(config.ListSource if name == "read_list" else config.FolderSource, read_source)
        case "read_subject":
            from data_curation.subject import read_subject

            return StageFunction(config.SubjectFolder, read_subject)
        case "download":
            from data_curation.download import download

            return StageFunction(config.DownloadConfig, download)
        case "deduplicate":
            from data_curation.dedup import deduplicate

            return StageFunction(config.DedupConfig, deduplicate)
        case "filter_quality":
            from data_curation.quality import filter_quality

            return StageFunction(config.QualityConfig, filter_quality)
        case "assign_buckets":
            from data_curation.buckets import assign_buckets

            return StageFunction(config.BucketsConfig, assign_buckets)
        case _:
            from data_curation.encode import encode

            return StageFunction(config.EncodeConfig, encode)


def _training(name: str) -> StageFunction:
    match name:
        case "flow_matching":
            from models.pretraining.config import FlowMatchingConfig
            from tasks.training import flow_matching

            return StageFunction(FlowMatchingConfig, flow_matching)
        case "dreambooth":
            from models.personalization.config import DreamBoothConfig
            from tasks.personalize import dreambooth

            return StageFunction(DreamBoothConfig, dreambooth)
        case "mix":
            from models.personalization.config import MixConfig
            from tasks.mix import mix

            return StageFunction(MixConfig, mix)
        case "teacher_pairs":
            from models.distillation.config import PairStoreConfig
            from tasks.teacher_pairs import teacher_pairs

            return StageFunction(PairStoreConfig, teacher_pairs)
        case _:
            from models.distillation.config import DistillConfig
            from tasks.distill import distill

            return StageFunction(DistillConfig, distill)


def _preference(name: str) -> StageFunction:
    from models.posttraining import config

    match name:
        case "make_pairs":
            from tasks.preference import make_pairs

            return StageFunction(config.PairsConfig, make_pairs)
        case "dpo":
            from tasks.preference import dpo

            return StageFunction(config.DpoConfig, dpo)
        case "reward_model":
            from tasks.reward_model import reward_model

            return StageFunction(config.RewardModelConfig, reward_model)
        case "grpo":
            from tasks.online import grpo

            return StageFunction(config.GrpoConfig, grpo)
        case "nft":
            from tasks.online import nft

            return StageFunction(config.NftConfig, nft)
        case _:
            from tasks.online import refl

            return StageFunction(config.ReflConfig, refl)


def _proof(name: str) -> StageFunction:
    from tasks import config

    match name:
        case "train_judge":
            from tasks.judge import train_judge

            return StageFunction(config.JudgeConfig, train_judge)
        case "compare":
            from tasks.compare import compare

            return StageFunction(config.CompareConfig, compare)
        case "evaluate":
            from tasks.evaluate import evaluate

            return StageFunction(config.EvaluateConfig, evaluate)
        case "export":
            from tasks.export import export

            return StageFunction(config.ExportConfig, export)
        case "promote":
            from tasks.promote import PromoteConfig, promote

            return StageFunction(PromoteConfig, promote)
        case _:
            from tasks.report import report

            return StageFunction(config.ReportConfig, report)
