"""Stage function of a distilled mix: starts where the fused mix ends, then learns from the models it is made of. SPMD."""

from __future__ import annotations

from typing import Any

from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.distribute import world
from models.engine.loop import Trainer
from models.networks import families
from models.networks.denoiser import Denoiser
from models.personalization import lora_files, mixing
from models.personalization.config import MixConfig, MixDistillationConfig
from models.personalization.dreambooth import Pictures
from models.personalization.lora import merge, save_forms, with_changes
from models.personalization.mix_distillation import MixDistillation, lesson_batches
from tasks.mix import ORDINARY, Reading, as_adapter, ingredients, mixed_by, readings_of, write_record
from tasks.training import averaged, run_training
from tasks.training_data import local_slots, to_model

SHOWN = 12  # prompts of the grids


def distill_mix(config: MixConfig, ctx: StageContext) -> dict[str, Any]:
    """Write the checkpoint, mix.json and the adapter in three forms; its rank is the sum of the ranks."""
    made_of, settings = ingredients(config, ctx), config.distillation or MixDistillationConfig()
    readings = readings_of(config, ctx, made_of)
    start = as_adapter(config, made_of, mixed_by(config, made_of, readings))
    if start is None:
        raise ConfigError(f"mix {config.name}: distilled trains a low rank, which a DoRA's change has not; use fused")
    denoiser = with_changes(made_of.base, {}).requires_grad_(False)
    lora_files.attach(denoiser.transformer, start)
    train = settings.train.model_copy(update={"seed": settings.train.seed + config.seed})
    around = families.surroundings(ctx.inputs["init"], made_of.card)
    lessons = [Pictures(to_model(each.pictures), *around.encode(each.prompts)) for each in readings.values()]
    null, teachers = around.encode([""]), [each.denoiser for each in readings.values()]
    objective = MixDistillation(denoiser, settings.timesteps, teachers, null, made_of.card.guidance)
    trained: list[Denoiser] = []

    def model_of(trainer: Trainer) -> Denoiser:
        trained[:] = [averaged(trainer, "denoiser", denoiser, "denoiser.")]
        return merge(trained[0])

    card = made_of.card.model_copy(update={"trigger": made_of.about["trigger"]})
    batches = lesson_batches(lessons, null, settings.empty_share, local_slots(train.batch_size), train.seed)
    facts = run_training(objective, batches, train, ctx, model_of, card, shown(readings))
    if world()[0] != 0:
        return facts
    adapter = lora_files.from_module(trained[0].transformer, made_of.about)
    save_forms(adapter, ctx.out / "adapter", config.name)
    changes = {layer: b @ a for layer, (a, b) in adapter.layers.items()}
    total = mixing.mix(made_of.parts, made_of.weights).changes
    return facts | write_record(config, ctx, made_of, mixing.compared(changes, total))


def shown(readings: dict[str, Reading]) -> list[str]:
    """As many prompts of each subject as fit in a grid."""
    subjects = [reading for name, reading in readings.items() if name != ORDINARY]
    return [prompt for reading in subjects for prompt in reading.prompts[: SHOWN // len(subjects)]]
