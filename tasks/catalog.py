"""Every stage function by name: what it makes, its configuration class, and the callable, imported when it is needed."""

from __future__ import annotations

import importlib
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

    kind: str  # of the artifact it makes
    config: str  # module:class
    function: str  # module:callable
    runs: Literal["local", "train"] = "local"
    version: int = 1


Catalog: TypeAlias = Callable[[str], StageFunction]

TRAITS: dict[str, Traits] = {
    "publish_demo_web": Traits("source", "data_curation.config:DemoWebConfig", "data_curation.demo_web:publish_demo_web", version=2),
    "read_list": Traits("source", "data_curation.config:ListSource", "data_curation.sources:read_source", version=2),
    "read_folder": Traits("source", "data_curation.config:FolderSource", "data_curation.sources:read_source", version=2),
    "read_subject": Traits("subject", "data_curation.config:SubjectFolder", "data_curation.subject:read_subject"),
    "download": Traits("manifest", "data_curation.config:DownloadConfig", "data_curation.download:download", version=3),
    "deduplicate": Traits("manifest", "data_curation.filter_config:DedupConfig", "data_curation.dedup:deduplicate", version=3),
    "remember": Traits("manifest", "data_curation.filter_config:RememberConfig", "data_curation.known:remember"),
    "filter_quality": Traits("manifest", "data_curation.filter_config:QualityConfig", "data_curation.quality:filter_quality"),
    "semantic_dedup": Traits("manifest", "data_curation.filter_config:SemanticConfig", "data_curation.semantic:semantic_dedup", version=2),
    "decontaminate": Traits("manifest", "data_curation.filter_config:DecontaminateConfig", "data_curation.decontaminate:decontaminate"),
    "filter_captions": Traits("manifest", "data_curation.filter_config:CaptionsConfig", "data_curation.captions:filter_captions"),
    "recaption": Traits("manifest", "data_curation.filter_config:RecaptionConfig", "data_curation.recaption:recaption"),
    "filter_safety": Traits("manifest", "data_curation.filter_config:SafetyConfig", "data_curation.safety:filter_safety", version=2),
    "filter_aesthetic": Traits("manifest", "data_curation.filter_config:AestheticConfig", "data_curation.aesthetic:filter_aesthetic"),
    "redecide": Traits("manifest", "data_curation.filter_config:RedecideConfig", "data_curation.redecide:redecide", version=2),
    "reconsider": Traits("manifest", "data_curation.filter_config:ReconsiderConfig", "data_curation.reconsider:reconsider"),
    "assign_buckets": Traits("manifest", "data_curation.config:BucketsConfig", "data_curation.buckets:assign_buckets", version=2),
    "encode": Traits("training-set", "data_curation.config:EncodeConfig", "data_curation.encode:encode", version=2),
    "autoencoder": Traits("autoencoder", "models.pretraining.autoencoder_config:AutoencoderConfig", "tasks.autoencoder:autoencoder", runs="train"),
    "import_model": Traits("checkpoint", "tasks.config:ModelConfig", "tasks.model_features:import_model"),
    "features": Traits("training-set", "tasks.config:FeaturesConfig", "tasks.model_features:features", version=2),
    "measure_distribution": Traits("scores", "tasks.config:DistributionConfig", "tasks.distribution:measure_distribution"),
    "train_judge": Traits("judge", "tasks.config:JudgeConfig", "tasks.judge:train_judge"),
    "flow_matching": Traits("checkpoint", "models.pretraining.config:FlowMatchingConfig", "tasks.training:flow_matching", runs="train"),
    "make_pairs": Traits("pairs", "models.posttraining.config:PairsConfig", "tasks.preference:make_pairs", version=2),
    "import_pairs": Traits("pairs", "models.posttraining.config:ImportPairsConfig", "tasks.preference:import_pairs"),
    "dpo": Traits("checkpoint", "models.posttraining.config:DpoConfig", "tasks.preference:dpo", runs="train", version=2),
    "reward_model": Traits("reward", "models.posttraining.config:RewardModelConfig", "tasks.reward_model:reward_model", version=2),
    "grpo": Traits("checkpoint", "models.posttraining.config:GrpoConfig", "tasks.online:grpo", runs="train"),
    "nft": Traits("checkpoint", "models.posttraining.config:NftConfig", "tasks.online:nft", runs="train"),
    "refl": Traits("checkpoint", "models.posttraining.config:ReflConfig", "tasks.online:refl", runs="train"),
    "prompt_enhancer": Traits("enhancer", "models.posttraining.config:PromptEnhancerConfig", "tasks.enhance:prompt_enhancer", runs="train", version=2),
    "prompt_check": Traits("scores", "models.posttraining.config:PromptCheckConfig", "tasks.prompt_check:prompt_check", version=2),
    "dreambooth": Traits("checkpoint", "models.personalization.config:DreamBoothConfig", "tasks.personalize:dreambooth", runs="train", version=6),
    "mix": Traits("checkpoint", "models.personalization.config:MixConfig", "tasks.mix:mix", version=2),
    "distill_mix": Traits("checkpoint", "models.personalization.config:MixConfig", "tasks.distill_mix:distill_mix", runs="train", version=2),
    "sweep_grid": Traits("sweep", "models.personalization.config:SweepGridConfig", "tasks.subject_sweep:sweep_grid"),
    "teacher_pairs": Traits("pairs", "models.distillation.config:PairStoreConfig", "tasks.teacher_pairs:teacher_pairs"),
    "distill": Traits("checkpoint", "models.distillation.config:DistillConfig", "tasks.distill:distill", runs="train", version=2),
    "compare": Traits("scores", "tasks.config:CompareConfig", "tasks.compare:compare"),
    "evaluate": Traits("scores", "tasks.config:EvaluateConfig", "tasks.evaluate:evaluate", version=3),
    "measure_prompts": Traits("scores", "tasks.config:EvaluateConfig", "tasks.prompt_scores:measure_prompts"),
    "draw_pictures": Traits("pictures", "tasks.config:PicturesConfig", "tasks.pictures:draw_pictures"),
    "export": Traits("pipelines", "tasks.config:ExportConfig", "tasks.export:export", version=5),
    "report": Traits("report", "tasks.config:ReportConfig", "tasks.report:report", version=3),
    "promote": Traits("pointer", "tasks.promote:PromoteConfig", "tasks.promote:promote"),
}  # fmt: skip


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
    traits = TRAITS.get(name)
    if traits is None:
        raise ConfigError(f"there is no stage function {name!r}; tasks/catalog.py lists {', '.join(TRAITS)}")
    return StageFunction(_named(traits.config), _named(traits.function))


def _named(place: str) -> Any:
    """What `module:name` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
