"""Stage function of DreamBooth-LoRA: pictures of a subject in, an adapter and a merged checkpoint out. SPMD."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data_curation import scenes as demo
from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.distribute import world
from models.engine.loop import Trainer
from models.engine.randomness import derive_seed
from models.networks import prx, text_encoder
from models.networks.checkpoint import read_card
from models.networks.prx import Denoiser
from models.personalization.config import DreamBoothConfig
from models.personalization.dreambooth import DreamBooth, Pictures, mixed_batches
from models.personalization.lora import add_lora, merge, save_adapter
from models.sampling.generate import load_generator
from tasks.training import averaged, refuse_distilled, run_training, save_grid
from tasks.training_data import TrainingData, local_slots, to_model

INSTANCE_SCENES = (
    ("big", "white"), ("top left", "pink"), ("big", "blue"), ("bottom right", "green"), ("three", "gray"),
    ("big", "black"), ("top right", "white"), ("bottom left", "blue"),
)  # fmt: skip


def dreambooth(config: DreamBoothConfig, ctx: StageContext) -> dict[str, Any]:
    """Adapter of `init` that draws the subject when the token is in the prompt."""
    refuse_distilled(ctx.inputs["init"], config.name)
    if config.subject not in demo.SUBJECT_OBJECTS:
        raise ConfigError(
            f"personalize subject {config.subject!r} is unknown; choose one of {sorted(demo.SUBJECT_OBJECTS)}"
        )
    data = TrainingData(ctx.inputs["data"])
    card = read_card(ctx.inputs["init"]).model_copy(update={"trigger": config.token})
    instance, instance_images = _instance(config, card.side, card.prompt_max_tokens)
    prior = _prior(config, ctx, card.prompt_max_tokens)
    denoiser, base = (prx.load(ctx.inputs["init"] / "transformer", data.text_mean, data.text_std) for _ in range(2))
    add_lora(denoiser, config.lora, config.train.seed)
    objective = DreamBooth(denoiser, config.timesteps, base if config.prior == "prediction" else None)
    slots = local_slots(config.train.batch_size)
    batches = mixed_batches(instance, prior, config.prior_weight, slots, config.train.seed)
    trained: list[Denoiser] = []

    def model_of(trainer: Trainer) -> Denoiser:
        adapted = averaged(trainer, "denoiser", denoiser, "denoiser.")
        trained[:] = [adapted]
        return merge(adapted)

    prompts = [f"a big {config.token} {config.class_word} on a {color} background" for color in demo.BACKGROUNDS]
    facts = run_training(objective, batches, config.train, ctx, model_of, card, prompts)
    if world()[0] == 0:
        metadata = {"base": ctx.parents["init"].digest, "trigger": config.token, "class": config.class_word}
        save_adapter(trained[0], ctx.out / "adapter", metadata)
        save_grid(instance_images, ctx.out / "instance.png", columns=len(instance_images))
    pieces = _tokenizer().tokenize(config.token)
    return facts | {"instance_pictures": len(instance), "class_pictures": len(prior), "token_pieces": len(pieces)}


def _tokenizer() -> PreTrainedTokenizerBase:
    return text_encoder.modules()[1]


def _instance(config: DreamBoothConfig, side: int, max_tokens: int) -> tuple[Pictures, np.ndarray]:
    """The few pictures of the subject, captioned with token and class word."""
    places = [INSTANCE_SCENES[i % len(INSTANCE_SCENES)] for i in range(config.pictures)]
    scenes = [demo.Scene(layout, (config.subject,), color) for layout, color in places]
    images = demo.draw_batch(scenes, side, seed=derive_seed(config.train.seed, "instance") % 2**31)
    phrase = f"{config.token} {config.class_word}"
    captions = [demo.short_caption(scene).replace(config.subject, phrase) for scene in scenes]
    return _pictures(images, captions, max_tokens), images


def _prior(config: DreamBoothConfig, ctx: StageContext, max_tokens: int) -> Pictures:
    """The base model's pictures of ordinary prompts."""
    count = config.class_pictures if config.prior_weight > 0 else 0
    published = [scene for scene in demo.all_scenes("full") if not scene.held_out]
    rng = np.random.default_rng([config.train.seed, 78])
    captions = [demo.short_caption(published[i]) for i in rng.integers(0, len(published), max(count, 1))][:count]
    if not captions:
        return Pictures(torch.empty(0), torch.empty(0), torch.empty(0))
    generator = load_generator(ctx.inputs["init"])
    images = generator.sample(captions, [derive_seed(config.train.seed, "class", i) for i in range(count)])
    return _pictures(images, captions, max_tokens)


def _pictures(images: np.ndarray, captions: list[str], max_tokens: int) -> Pictures:
    tokens, mask = text_encoder.encode(captions, max_tokens)
    return Pictures(to_model(images), tokens, mask)
