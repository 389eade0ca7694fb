"""Stage function that distils a teacher checkpoint into a few-step student. SPMD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from infra.stages import StageContext
from models.distillation.build import Networks, Plan, build
from models.distillation.config import ConsistencyConfig, DistillConfig, InstaFlowConfig
from models.distillation.grid import Schedule
from models.distillation.instaflow import straightness
from models.engine.distribute import world
from models.engine.loop import Trainer
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card
from models.networks.denoiser import Denoiser
from models.personalization.lora import save_adapter
from models.pretraining.config import SelectConfig
from tasks.teacher_pairs import pair_batches
from tasks.training import averaged, fixed_prompts, refuse_distilled, run_training
from tasks.training_data import TrainingData


def distill(config: DistillConfig, ctx: StageContext) -> dict[str, Any]:
    """Student of `init` (the teacher), or of `start` (an earlier student of it), on pictures and captions or pairs."""
    refuse_distilled(ctx.inputs["init"], config.name)
    data = TrainingData(ctx.inputs["data"])
    nets = networks(config, ctx, data)
    plan = build(config, nets)
    batches = batches_of(config, ctx, data)
    card = student_card(config, ctx, plan)
    kept: list[Trainer] = []

    def model_of(trainer: Trainer) -> Denoiser:
        kept[:] = [trainer]
        return plan.model_of(trainer)

    facts = run_training(
        plan.objective, batches, config.train, ctx, model_of, card, fixed_prompts(data), frozen=ctx.inputs["init"]
    )
    if world()[0] == 0:
        for steps, other in plan.others_of(kept[0]).items():
            other.save(ctx.out / f"transformer-{steps}")
        facts |= write_extras(config, ctx, nets, kept[0], plan.model_of, batches)
    return facts | {"method": config.method.kind, "trained_steps": list(plan.trained_steps)}


def networks(config: DistillConfig, ctx: StageContext, data: TrainingData) -> Networks:
    """Every network the method may need, from the teacher's folder or an earlier student's."""
    folder, card = ctx.inputs["init"] / "transformer", read_card(ctx.inputs["init"])
    teacher = families.load(folder, card, data.text_mean, data.text_std)
    schedule = Schedule(card.shift_rule, teacher.patch_size)
    student = families.load(start_folder(config, ctx), card, data.text_mean, data.text_std)
    fake = families.load(folder, card, data.text_mean, data.text_std)
    tokens, mask = data.null()
    return Networks(student, teacher, fake, (tokens.to(teacher.device), mask.to(teacher.device)), schedule)


def start_folder(config: DistillConfig, ctx: StageContext) -> Path:
    """The weights the student starts from."""
    if "start" not in ctx.inputs:
        return ctx.inputs["init"] / "transformer"
    teacher = read_card(ctx.inputs["start"]).teacher
    if teacher != ctx.parents["init"].digest:
        raise ConfigError(
            f"{config.name}: {config.start} was distilled from another teacher ({teacher}) than "
            f"{ctx.parents['init'].digest}; distil it again"
        )
    return ctx.inputs["start"] / "transformer"


def student_card(config: DistillConfig, ctx: StageContext, plan: Plan) -> SamplingCard:
    """How the student is to be sampled."""
    return read_card(ctx.inputs["init"]).model_copy(
        update={
            "steps": config.student_steps, "guidance": 1.0, "distilled": True, "sampler": plan.sampler,
            "trained_steps": plan.trained_steps, "method": config.method.kind, "distilled_guidance": config.guidance,
            "teacher": ctx.parents["init"].digest, "scheduler": None,
        }
    )  # fmt: skip


def batches_of(config: DistillConfig, ctx: StageContext, data: TrainingData) -> Callable[[int], Batch]:
    """The training set's pictures, or the teacher's stored pairs."""
    if not config.needs_pairs:
        select = SelectConfig(resolutions=config.resolutions, long_captions=config.long_captions, empty_captions=0.0)
        return data.batches(select, config.train.batch_size, config.train.seed, teacher=False)
    if "pairs" not in ctx.inputs:
        raise ConfigError(f"{config.name}: {config.method.kind} learns from teacher pairs; set distill_pairs")
    teachers = [ctx.parents[role].digest for role in ("init", "start") if role in ctx.parents]
    return pair_batches(ctx.inputs["pairs"], teachers, data, config.train)


def write_extras(
    config: DistillConfig, ctx: StageContext, nets: Networks, trainer: Trainer,
    model_of: Callable[[Trainer], Denoiser], batches: Callable[[int], Batch],
) -> dict[str, Any]:  # fmt: skip
    """What some methods leave beside the weights: LCM-LoRA its adapter, a pure reflow the straightness it reached."""
    method = config.method
    if isinstance(method, ConsistencyConfig) and method.lora is not None:
        adapted = averaged(trainer, "student", nets.student)
        save_adapter(adapted, ctx.out / "adapter", {"base": ctx.parents["init"].digest})
    if isinstance(method, InstaFlowConfig) and method.reflow_share == 1:
        batch = batches(0).to(nets.teacher.device)
        rng = Randomness(config.train.seed, 0, batch.slots, nets.teacher.device)
        measured = {"teacher": nets.teacher, "student": model_of(trainer)}
        return {"straightness": {name: straightness(net, batch, rng) for name, net in measured.items()}}
    return {}
