"""Stage function that trains with flow matching: pre-training, continued training, SFT. SPMD: every worker runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from tensorboardX import SummaryWriter

from infra.artifacts import EVENTS
from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.config import TrainConfig
from models.engine.distribute import world
from models.engine.loop import Trainer, train
from models.engine.objective import Batch, Objective, write_metrics
from models.engine.watch import Watch
from models.engine.weights import with_weights
from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.networks.codec import factor_of
from models.networks.config import Sd3Config
from models.networks.denoiser import Denoiser
from models.networks.text_features import sd3_text_parts
from models.pretraining.config import FlowMatchingConfig, ShiftConfig, TimestepConfig
from models.pretraining.curriculum import Phase, phase_at, phases_of, samples_seen
from models.pretraining.densities import histogram
from models.pretraining.early_stop import EarlyStop
from models.pretraining.encoder_free import Dispersive, SelfAlignment
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Alignment, Projector, Repa, projector_of
from models.pretraining.validation import Validation
from models.sampling.generate import Generator
from tasks import averages
from tasks.adapted import Finished, adapt
from tasks.training_checks import refuse_other_space, refuse_other_text, refuse_uneven
from tasks.training_data import TrainingData

GRID_PROMPTS = 12
PAST = "past-"  # roles of the training sets that continued training replays, the first one first


def averaged(trainer: Trainer, player: str, denoiser: Denoiser, prefix: str = "") -> Denoiser:
    """A copy of `denoiser` with the player's averaged weights; `prefix` is its name inside the player."""
    average = trainer.average(player)
    own = {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}
    if player in trainer.uncut:
        return with_weights(cast(Denoiser, trainer.uncut[player].get_submodule(prefix.removesuffix("."))), own)
    return with_weights(denoiser, own)


def run_training(
    objective: Objective,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    ctx: StageContext,
    model_of: Callable[[Trainer], Denoiser],
    card: SamplingCard,
    prompts: list[str],
    watch: Watch | None = None,
    frozen: Path | None = None,
    measure: Callable[[int, bool], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Train, drawing the fixed prompts on the way, and write the checkpoint folder (rank 0); returns facts.

    `frozen` is the folder of the text encoders and the VAE that are not packaged.
    """
    grids = ctx.scratch / "grids"
    drawing = bool(prompts) and world()[0] == 0
    around = families.surroundings(frozen, card) if drawing and frozen is not None else None

    def draw(step: int, trainer: Trainer) -> None:
        if drawing:
            grids.mkdir(parents=True, exist_ok=True)
            pictures = Generator(model_of(trainer), card, around=around).sample(prompts, list(range(len(prompts))))
            save_grid(pictures, grids / f"step-{step:06d}.png", columns=6)

    events = SummaryWriter(str(ctx.scratch / EVENTS)) if world()[0] == 0 else None

    def progress(done: int, total: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            if events is not None and name != "seconds":
                events.add_scalar(f"{ctx.name}/{name}", value, done)
        ctx.progress(done, total, numbers)

    trainer = train(objective, batches, config, ctx.scratch, progress, draw, watch, measure)
    if events is not None:
        events.close()
    if world()[0] == 0:
        write_checkpoint(ctx.out, model_of(trainer), card, frozen)
        write_metrics(trainer.rows, ctx.out / "metrics.jsonl")
        if grids.exists():
            shutil.copytree(grids, ctx.out / "grids", dirs_exist_ok=True)
    snapshots = ctx.scratch / "snapshots"
    if world()[0] == 0 and snapshots.exists():
        shutil.copytree(snapshots, ctx.out / averages.FOLDER, dirs_exist_ok=True)
        averages.keep_text_scale(ctx.out / averages.FOLDER, model_of(trainer))
    speed = {name: round(value, 4) for name, value in trainer.meter.numbers().items()}
    last = trainer.rows[-1] if trainer.rows else {}  # a watch may end a run before its first row
    return {"steps": trainer.step, "samples": trainer.step * config.batch_size, "last": last, "speed": speed}


def flow_matching(config: FlowMatchingConfig, ctx: StageContext) -> dict[str, Any]:
    """Train a denoiser from scratch or from `init` on the rows the config selects; with `lora`, an adapter of it."""
    data = TrainingData(ctx.inputs["data"])
    past = [TrainingData(folder) for role, folder in sorted(ctx.inputs.items()) if role.startswith(PAST)]
    scale = past[0] if past else data  # a model keeps the scale of its text features from its first training set on
    train_config, init = config.train, ctx.inputs.get("init")
    card, frozen = card_of(config, init), init or ctx.inputs.get("frozen")
    network = init or frozen if isinstance(config.network, Sd3Config) else init
    for each in (data, *past):
        folder = None if network is None else network / "transformer"
        refuse_other_text(config.network, folder, each, card.prompt_max_tokens, config.name)
    if init is not None:
        denoiser = families.load(init / "transformer", card, scale.text_mean, scale.text_std)
        refuse_distilled(init, config.name)
    else:
        side, seed = config.sampling.side, train_config.seed
        denoiser = families.build(config.network, frozen, data.text_mean, data.text_std, side, seed)
    if config.objective.kind != "x_0":
        raise ConfigError(
            f"{config.name}: objective.kind={config.objective.kind} trains a network the stock pipeline would sample wrongly; "
            "use x_0 here, whatever the family predicts itself, and the others through FlowMatching and Predictor, for comparison"
        )
    refuse_other_space(denoiser, data, config.name)
    adapt(denoiser, config.lora, train_config.seed, init)
    phases = phases_of(config)
    refuse_uneven(phases, train_config.accumulate, config.name)
    for each in (data, *past):
        each.text_parts = text_parts(config, phases, card, frozen, each)
    repa = alignment(config, denoiser, data, phases)
    objective = FlowMatching(denoiser, config.timesteps, repa, config.objective, phases, config.log_bins)
    cached = repa is not None and repa.config.needs_cached_features
    batches = curriculum_batches(data, phases, train_config.seed, cached, past)

    def trained(trainer: Trainer) -> Denoiser:
        return averaged(trainer, "denoiser", denoiser, "denoiser.")

    model_of = Finished(trained, config.lora, init)
    prompts, validation, watch = fixed_prompts(data), None, None
    if config.validation is not None:
        held_out = data.held_out(phases[-1].select, config.validation.pictures)
        validation = Validation(denoiser, held_out, config.validation.every, train_config.seed)
        watch = None if config.validation.patience is None else EarlyStop(validation, config.validation.patience)
    facts = run_training(objective, batches, train_config, ctx, model_of, card, prompts, watch, frozen, validation)
    if validation is not None:
        facts["validation"] = {k: v for k, v in facts["last"].items() if k.startswith("validation")}
    if watch is not None:
        facts["early_stop"] = watch.report()
    model_of.write_adapter(ctx)
    times = times_shown(config, denoiser, 1 if frozen is None else factor_of(frozen))
    return facts | {"samples": samples_seen(phases, facts["steps"]), "times": times}


def card_of(config: FlowMatchingConfig, init: Path | None) -> SamplingCard:
    """How the trained model is sampled: as the config says, or as the foreign pipeline at its root is."""
    before = None if init is None else read_card(init)
    if before is not None and before.origin is not None:
        return before
    kept = (
        families.family_of(config.network)
        if before is None
        else {"family": before.family, "prediction": before.prediction}
    )
    return SamplingCard.model_validate({
        "steps": config.sampling.steps, "guidance": config.sampling.guidance, "side": config.sampling.side,
        "sampler": config.sampling.sampler, "prompt_max_tokens": config.network.prompt_max_tokens, **kept,
        **{name: getattr(last_times(config), name) for name in ShiftConfig.model_fields},
    })  # fmt: skip


def last_times(config: FlowMatchingConfig) -> TimestepConfig:
    """The times the stage ends with, whose shift the trained model is sampled with."""
    return phases_of(config)[-1].timesteps


def text_parts(
    config: FlowMatchingConfig, phases: Sequence[Phase], card: SamplingCard, frozen: Path | None, data: TrainingData
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Which part of the text each encoder made, where a phase drops encoders one by one."""
    if all(phase.select.empty_encoders == 0 for phase in phases):
        return ()
    if card.family != "sd3" or frozen is None:
        raise ConfigError(
            f"{config.name}: select.empty_encoders is for SD3, which reads a prompt with several encoders; this model "
            "has one, use select.empty_captions"
        )
    _, num_rows, dim = data.null()[0].shape
    return sd3_text_parts(frozen, num_rows, dim)


def curriculum_batches(
    data: TrainingData, phases: Sequence[Phase], seed: int, teacher: bool, past: Sequence[TrainingData] = ()
) -> Callable[[int], Batch]:
    """This worker's batch as a pure function of the step; each phase reads its own rows from the start."""
    parts = [data.batches(phase.select, phase.batch_size, seed, teacher, phase.first_step, past) for phase in phases]
    return lambda step: parts[phases.index(phase_at(phases, step))](step)


def alignment(
    config: FlowMatchingConfig, denoiser: Denoiser, data: TrainingData, phases: Sequence[Phase]
) -> Alignment | None:
    """The auxiliary term the settings ask for."""
    repa, steps, seed = config.repa, config.train.steps, config.train.seed
    if repa is None:
        return None
    width, patch = denoiser.width, denoiser.patch_size
    if repa.kind == "teacher" and not repa.needs_cached_features and data.scaling is not None:
        raise ConfigError(
            f"stage {config.name!r}: repa.teacher={repa.teacher!r} looks at pictures, but this training set hands out latents; "
            "use cached features, kind dispersive or self, or set repa to null"
        )
    match repa.kind:
        case "dispersive":
            return Dispersive(repa, steps)
        case "self":
            return SelfAlignment(repa, Projector(width, repa.hidden, width, seed), denoiser, steps)
        case "teacher" if repa.teacher == "cached":
            widths = {data.teacher_dim(phase.select) for phase in phases if phase.repa}
            return Repa(repa, projector_of(repa, width, widths.pop(), seed), steps, patch_size=patch)
        case "teacher":
            from models.pretraining.teachers import teacher_of

            teacher, features = teacher_of(repa.teacher, repa.teacher_revision)
            return Repa(repa, projector_of(repa, width, features, seed), steps, teacher, patch)


def times_shown(config: FlowMatchingConfig, denoiser: Denoiser, factor: int) -> list[float]:
    """Shares of the last phase's times in tenths of [0, 1], data to noise, at the sampling side; `factor` px per latent."""
    tokens = (config.sampling.side // factor // denoiser.patch_size) ** 2
    return histogram(tokens, last_times(config))


def fixed_prompts(data: TrainingData) -> list[str]:
    """Captions spread evenly over the training set's, for the grids."""
    captions = data.set.captions[1:]
    return [captions[i] for i in np.linspace(0, len(captions) - 1, min(GRID_PROMPTS, len(captions))).astype(int)]


def refuse_distilled(folder: Path, stage: str) -> None:
    """Training a distilled student further with a diffusion loss undoes the distillation."""
    if read_card(folder).distilled:
        raise ValueError(f"{stage}: {folder} is a distilled student; train its teacher and distil again")


def save_grid(pictures: np.ndarray, path: Path, columns: int, scale: int = 3) -> None:
    """uint8 [N, H, W, 3] as one PNG, row by row, enlarged without smoothing."""
    n, h, w, _ = pictures.shape
    rows = -(-n // columns)
    padded = np.zeros((rows * columns, h, w, 3), np.uint8)
    padded[:n] = pictures
    sheet = padded.reshape(rows, columns, h, w, 3).transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, 3)
    Image.fromarray(sheet).resize((columns * w * scale, rows * h * scale), Image.Resampling.NEAREST).save(path)
