"""Stage function that distils a teacher checkpoint into a few-step student. SPMD."""

from __future__ import annotations

from typing import Any, assert_never

from infra.stages import StageContext
from models.distillation.config import DistillConfig
from models.distillation.consistency import ConsistencyDistillation
from models.distillation.progressive import ProgressiveDistillation
from models.engine.loop import Trainer
from models.networks import prx
from models.networks.checkpoint import read_card
from models.networks.prx import Denoiser
from models.pretraining.config import SelectConfig
from tasks.training import averaged, fixed_prompts, refuse_distilled, run_training
from tasks.training_data import TrainingData


def distill(config: DistillConfig, ctx: StageContext) -> dict[str, Any]:
    """Student of `init` (the teacher) on the training set's pictures and captions."""
    refuse_distilled(ctx.inputs["init"], config.name)
    data = TrainingData(ctx.inputs["data"])
    folder = ctx.inputs["init"] / "transformer"
    teacher = prx.load(folder, data.text_mean, data.text_std)
    student = prx.load(folder, data.text_mean, data.text_std)
    objective: ConsistencyDistillation | ProgressiveDistillation
    match config.method:
        case "consistency":
            objective = ConsistencyDistillation(student, teacher, data.null(), config)
        case "progressive":
            objective = ProgressiveDistillation(student, teacher, data.null(), config)
        case _:
            assert_never(config.method)
    select = SelectConfig(resolutions=config.resolutions, long_captions=config.long_captions, empty_captions=0.0)
    batches = data.batches(select, config.train.batch_size, config.train.seed, teacher=False)
    card = read_card(ctx.inputs["init"]).model_copy(
        update={"steps": config.student_steps, "guidance": 1.0, "distilled": True}
    )

    def model_of(trainer: Trainer) -> Denoiser:
        return averaged(trainer, "student", student)

    return run_training(objective, batches, config.train, ctx, model_of, card, fixed_prompts(data))
