"""The lifecycle as a list of stages in the order they run; `plan` and the live run both read this list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar, assert_never

from data_curation.config import DataConfig, SubjectFolder
from flows.config import MODEL, LifecycleConfig
from infra.config import Config
from infra.errors import ConfigError
from infra.stages import StageSpec
from models.personalization.config import DreamBoothConfig, SweepConfig
from models.posttraining.config import GrpoConfig, NftConfig, ReflConfig
from tasks.catalog import spec_of
from tasks.config import FeaturesConfig, PicturesConfig

C = TypeVar("C", bound=Config)
CANDIDATE = "nightly"  # the stage that a night trains
SOURCES = {"demo_web": "publish_demo_web", "list": "read_list", "folder": "read_folder"}


def stage_specs(config: LifecycleConfig) -> list[StageSpec]:
    """Curate, pre-train, post-train, personalize, distil, evaluate, export, report: from scratch or on a foreign model."""
    specs = [
        *curation(config.data),
        *judging(config),
        *latents(config),
        *pretraining(config),
        *posttraining(config),
        *prompt_enhancement(config),
        *personalization(config),
        *distillation(config),
        *proof(config),
    ]
    known = {*(spec.name for spec in specs), CANDIDATE}
    if unknown := sorted(set(config.run.per_stage) - known):
        raise ConfigError(
            f"run.per_stage names {unknown[0]!r}, which is no stage; the stages are {', '.join(sorted(known))}"
        )
    return specs


def curation(data: DataConfig, **known: str) -> list[StageSpec]:
    """From URLs to a training set; `known` is the manifest of what was seen before and is not taken again."""
    last, more, images = "quality", list[StageSpec](), {"images": "download"}
    for name, stage, settings, beside in (
        ("captions", "filter_captions", data.captions, {}),
        ("redecide", "redecide", data.redecide, {}),
        ("decontaminate", "decontaminate", data.decontaminate, images),
        ("semantic", "semantic_dedup", data.semantic, images),
        ("safety", "filter_safety", data.safety, images),
        ("aesthetic", "filter_aesthetic", data.aesthetic, images),
        ("reconsider", "reconsider", data.reconsider, {}),
        ("recaption", "recaption", data.recaption, images),
    ):
        if settings is not None:
            more.append(spec_of(name, stage, settings, rows=last, **beside))
            last = name
    return [
        spec_of("source", SOURCES[data.source.kind], data.source, **known),
        spec_of("download", "download", data.download, source="source"),
        spec_of("dedup", "deduplicate", data.dedup, rows="download", **known),
        spec_of("quality", "filter_quality", data.quality, rows="dedup", images="download"),
        *more,
        spec_of("buckets", "assign_buckets", data.buckets, rows=last, truth="source", signatures="dedup"),
        spec_of("encode", "encode", data.encode, manifest="buckets", images="download"),
    ]


def judging(config: LifecycleConfig) -> list[StageSpec]:
    """The judge of the demo's scenes, where it is asked."""
    return [spec_of("judge", "train_judge", config.judge)] if config.by_scenes and config.judge is not None else []


def judge(config: LifecycleConfig) -> dict[str, str]:
    """Role -> stage of the judge; without it the stages take captions of one's own."""
    return {"judge": "judge"} if config.by_scenes else {}


def latents(config: LifecycleConfig) -> list[StageSpec]:
    """The foreign model or the VAE of one's own, if there is one, and the training set in its terms."""
    if config.model is not None:
        own = spec_of(MODEL, "import_model", config.model)
    elif config.autoencoder is not None:
        own = spec_of(config.autoencoder.name, "autoencoder", seeded(config.autoencoder, config.seed), data="encode")
    else:
        return []
    return [own, spec_of("features", "features", FeaturesConfig(), data="encode", model=own.name)]


def training_set(config: LifecycleConfig) -> str:
    """Stage whose training set the model reads: pictures, or these in a model's terms."""
    return "encode" if config.autoencoder is None and config.model is None else "features"


def opening(config: LifecycleConfig) -> dict[str, str]:
    """Role -> stage of what the first training stage begins with; a fresh model in pixels begins with nothing."""
    if config.model is not None:
        return {"init": MODEL}
    return {} if config.autoencoder is None else {"frozen": config.autoencoder.name}


def pretraining(config: LifecycleConfig) -> list[StageSpec]:
    """Each stage goes on from the one before."""
    specs, init = list[StageSpec](), opening(config)
    for stage in config.pretrain:
        specs.append(
            spec_of(stage.name, "flow_matching", seeded(stage, config.seed), data=training_set(config), **init)
        )
        init = {"init": stage.name}
    return specs


def posttraining(config: LifecycleConfig) -> list[StageSpec]:
    """Supervised fine-tuning, then branches from it: preference pairs of its pictures and DPO, and the online methods."""
    post, seed, specs, data = config.posttrain, config.seed, list[StageSpec](), {"data": training_set(config)}
    if post.sft is not None:
        specs.append(spec_of(post.sft.name, "flow_matching", seeded(post.sft, seed), init=config.trunk[-2], **data))
    start, pairs = {"init": config.trunk[-1], **data}, post.pairs_name
    if post.needs_pairs and post.pairs_table is not None:
        specs.append(spec_of(pairs, "import_pairs", seeded(post.pairs_table, seed)))
    elif post.needs_pairs:
        specs.append(spec_of(pairs, "make_pairs", seeded(post.pairs, seed), **judge(config), **start))
    if post.reward_model is not None:
        specs.append(
            spec_of(post.reward_model.name, "reward_model", seeded(post.reward_model, seed), pairs=pairs, **data)
        )
    for stage in post.online:
        asked = rewards(stage, config)
        specs.append(spec_of(stage.name, online_function(stage), seeded(stage, seed), **start, **asked))
    if post.dpo is not None:
        guard = {} if post.dpo.guard is None else judge(config)
        specs.append(spec_of(post.dpo.name, "dpo", seeded(post.dpo, seed), pairs=pairs, **start, **guard))
    return specs


def prompt_enhancement(config: LifecycleConfig) -> list[StageSpec]:
    """The prompt enhancer, and what it does to the pictures of the checkpoint that post-training hands on."""
    stage = config.posttrain.prompt_enhancer
    if stage is None:
        return []
    specs = [spec_of(stage.name, "prompt_enhancer", seeded(stage, config.seed), data="encode")]
    if stage.check is not None:
        inputs = {"enhancer": stage.name, "init": config.chain[-1], "judge": "judge"}
        specs.append(spec_of(stage.check.name, "prompt_check", stage.check, **inputs))
    return specs


def online_function(stage: GrpoConfig | NftConfig | ReflConfig) -> str:
    """The stage function of an online method."""
    match stage:
        case GrpoConfig():
            return "grpo"
        case NftConfig():
            return "nft"
        case ReflConfig():
            return "refl"
        case _:
            assert_never(stage)


def rewards(stage: GrpoConfig | NftConfig | ReflConfig, config: LifecycleConfig) -> dict[str, str]:
    """Role -> stage of what rewards a branch: the judge where there is one (its shape part watches), the reward model if asked."""
    model = config.posttrain.reward_model
    if model is None or all(term.kind != "model" for term in stage.rewards):
        return judge(config)
    return judge(config) | {"reward": model.name}


def personalization(config: LifecycleConfig) -> list[StageSpec]:
    """One adapter per subject, each from the same checkpoint, then their mixes."""
    start, specs = config.personalize_from or config.chain[-1], list[StageSpec]()
    for stage in config.personalize:
        specs += personalized(stage, config.pretrain[-1].sampling.side, config.seed, start)
    for mix in config.mix:
        data = {"data": "encode"} if mix.draws else {}
        function = "distill_mix" if mix.method == "distilled" else "mix"
        specs.append(spec_of(mix.name, function, mix, init=start, **data, **{name: name for name in mix.adapters}))
    for sweep in config.sweep:
        specs += swept(sweep, config, start)
    return specs


def swept(sweep: SweepConfig, config: LifecycleConfig, start: str) -> list[StageSpec]:
    """Adapters of one subject side by side, and their grid; the pictures of a folder are read once."""
    stage = next(stage for stage in config.personalize if stage.name == sweep.stage)
    pictures = {} if stage.folder is None else {"subject": f"{stage.name}-pictures"}
    variants = sweep.variants(stage)
    specs = [
        spec_of(variant.name, "dreambooth", seeded(variant, config.seed), data="encode", init=start, **pictures)
        for variant in variants
    ]
    inputs = {"judge": "judge", "init": start, **pictures, **{variant.name: variant.name for variant in variants}}
    return [*specs, spec_of(sweep.name, "sweep_grid", sweep.grid(stage), **inputs)]


def personalized(stage: DreamBoothConfig, side: int, seed: int, start: str) -> list[StageSpec]:
    """The stage that learns a subject; the pictures of a folder are read in a stage before it."""
    inputs, specs = {"data": "encode", "init": start}, list[StageSpec]()
    if stage.folder is not None:
        inputs["subject"] = f"{stage.name}-pictures"
        folder = SubjectFolder(path=stage.folder, fingerprint=stage.fingerprint, least_side=side)
        specs.append(spec_of(inputs["subject"], "read_subject", folder))
    return [*specs, spec_of(stage.name, "dreambooth", seeded(stage, seed), **inputs)]


def distillation(config: LifecycleConfig) -> list[StageSpec]:
    """Students of one teacher; a pair store comes before the first student that learns from it."""
    teacher, specs = config.distill_from or config.chain[-1], list[StageSpec]()
    stores = {store.name: store for store in config.distill_pairs}
    for stage in config.distill:
        inputs = {"data": "encode", "init": teacher} | ({"start": stage.start} if stage.start else {})
        if stage.needs_pairs:
            store = stores[stage.pairs or next(iter(stores))]
            inputs["pairs"] = store.name
            if all(spec.name != store.name for spec in specs):
                source = store.source or teacher
                specs.append(
                    spec_of(store.name, "teacher_pairs", seeded(store, config.seed), data="encode", init=source)
                )
        specs.append(spec_of(stage.name, "distill", seeded(stage, config.seed), **inputs))
    if config.compare is not None and config.distill:
        students = {stage.name: stage.name for stage in config.distill}
        specs.append(spec_of("compare", "compare", config.compare, judge="judge", teacher=teacher, **students))
    return specs


def distances(config: LifecycleConfig, checkpoints: Iterable[str]) -> list[StageSpec]:
    """Pictures against held-out ones, where that is asked for."""
    if config.distribution is None:
        return []
    drawn = {name: name for name in checkpoints}
    return [spec_of("distribution", "measure_distribution", config.distribution, data="encode", **drawn)]


def proof(config: LifecycleConfig) -> list[StageSpec]:
    """Scores of every checkpoint, the pipelines to give away, and the page."""
    checkpoints = {name: name for name in config.checkpoints}
    measured = [*distances(config, checkpoints), *scores(config, checkpoints)]
    post, before = config.posttrain, (*curation(config.data), *judging(config), *measured)
    shown = {"scores" if spec.name == "evaluate" else spec.name: spec.name for spec in before}
    shown |= {"pairs": post.pairs_name} if post.needs_pairs else {}
    if config.compare is not None and config.distill:
        shown["compare"] = "compare"
    if post.prompt_enhancer is not None and post.prompt_enhancer.check is not None:
        shown |= {"prompts": post.prompt_enhancer.check.name}
    return [
        *measured,
        spec_of("export", "export", config.export, **exports(config)),
        spec_of("report", "report", config.report, **shown, export="export", **checkpoints),
    ]


def scores(config: LifecycleConfig, checkpoints: Mapping[str, str]) -> list[StageSpec]:
    """What the judge says of the demo's scenes; without it pictures of captions of one's own, and scores of a prompt file."""
    asked = config.evaluate
    if config.by_scenes:
        return [spec_of("evaluate", "evaluate", asked, judge="judge", data="encode", truth="source", **checkpoints)]
    shown = PicturesConfig(prompts=asked.grid_prompts, seed=asked.seed)
    drawn = [spec_of("pictures", "draw_pictures", shown, data="encode", **checkpoints)]
    return drawn if asked.geneval is None else [*drawn, spec_of("evaluate", "measure_prompts", asked, **checkpoints)]


def exports(config: LifecycleConfig) -> dict[str, str]:
    """Folder -> stage: what was tuned of a foreign model; else the teacher, its students, adapters and their mixes."""
    if config.model is not None:
        return {name: name for name in (config.trunk[-1], *config.posttrain.branches)}
    found = {"teacher": config.distill_from or config.chain[-1]} | student_exports(config)
    found |= {f"lora-{stage.label}": stage.name for stage in config.personalize}
    return found | {f"lora-{mix.name}": mix.name for mix in config.mix}


def student_exports(config: LifecycleConfig) -> dict[str, str]:
    """Folder -> stage. The comparison, if there is one, names the best student for each step count at run time."""
    if config.compare is not None and config.distill:
        return {"compare": "compare"} | {f"student-{stage.name}": stage.name for stage in config.distill}
    return {f"student-{stage.student_steps}": stage.name for stage in config.distill}


def seeded(stage: C, seed: int) -> C:
    """The stage with the lifecycle's seed added to its own."""
    if seed == 0:
        return stage
    if "train" in type(stage).model_fields:
        train = getattr(stage, "train")  # noqa: B009 - the field is checked above, the class is any of several
        return stage.model_copy(update={"train": train.model_copy(update={"seed": train.seed + seed})})
    return stage.model_copy(update={"seed": getattr(stage, "seed", 0) + seed})
