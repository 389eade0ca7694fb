"""Stage function of DreamBooth: pictures of a subject in, a checkpoint and, unless all weights are trained, an adapter out. SPMD."""

from __future__ import annotations

import json
from dataclasses import replace
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
from models.networks import families, text_encoder
from models.networks.checkpoint import SamplingCard, read_card
from models.networks.denoiser import Denoiser
from models.networks.text_features import Encode, PrxText
from models.personalization import lora_files
from models.personalization.config import DreamBoothConfig
from models.personalization.dreambooth import DreamBooth, Pictures, focus_of, mixed_batches
from models.personalization.lora import add_lora, save_forms, since
from models.personalization.lora_files import Adapter
from models.personalization.pivotal import PivotalDreamBooth
from models.personalization.rare_token import find_tokens, rarest, refuse_token, words_of
from models.personalization.text_tuning import TextTuning, save_rows, words_of_token
from models.sampling.generate import Generator, load_generator, sample_together
from tasks.adapted import merged
from tasks.subject_pictures import Subject, demo_subject, own_subject
from tasks.subject_watch import Asked, watch_of
from tasks.training import averaged, refuse_distilled, run_training, save_grid
from tasks.training_data import TrainingData, local_slots, to_model

SHOWN = 8  # pictures of the subject in grid.png
FOREIGN = 48  # other rare tokens in prior prompts


def dreambooth(config: DreamBoothConfig, ctx: StageContext) -> dict[str, Any]:
    """Adapter of `init`, or all of it, that draws the subject when the token is in the prompt."""
    refuse_distilled(ctx.inputs["init"], config.name)
    data = TrainingData(ctx.inputs["data"])
    token, found = token_of(config, ctx, data.set.captions)
    card = read_card(ctx.inputs["init"]).model_copy(update={"trigger": token})
    if card.family != "prx-pixel":
        raise ConfigError(
            f"{config.name}: {ctx.inputs['init']} is a {card.family}, subjects are learnt by prx-pixel alone; "
            "set personalize to []"
        )
    text, around = text_of(config, ctx, token, card), families.surroundings(ctx.inputs["init"], card)
    subject = subject_of(config, ctx, token, card)
    instance = _pictures(subject.images, subject.captions, around.encode if text is None else text.text)
    if subject.masks is not None:
        instance = replace(instance, focus=focus_of(torch.from_numpy(subject.masks), config.unmasked_weight))
    prompts, images = _prior(config, ctx, data.set.captions, token)
    prior = _pictures(images, prompts, around.encode)
    denoiser, base = (
        families.load(ctx.inputs["init"] / "transformer", card, data.text_mean, data.text_std) for _ in range(2)
    )
    start = None
    if config.lora is not None:
        add_lora(denoiser, config.lora, config.train.seed)
        start = lora_files.from_module(denoiser.transformer, {}) if config.lora.init == "pissa" else None
    objective = objective_of(config, denoiser, base, text, [*subject.captions, *prompts])
    slots = local_slots(config.train.batch_size)
    batches = mixed_batches(instance, prior, config.prior_weight, slots, config.train.seed)
    trained: list[Denoiser] = []

    def model_of(trainer: Trainer) -> Denoiser:
        adapted = averaged(trainer, "denoiser", denoiser, "denoiser.")
        trained[:] = [adapted]
        return adapted if config.lora is None else merged(adapted, config.lora, ctx.inputs["init"])

    watch = None
    if config.until is not None:
        asked = Asked(subject.captions, instance.images)
        watch = watch_of(config, ctx, denoiser, base, asked, data.set.captions)
    shown = [f"a big {token} {config.class_word} on a {color} background" for color in demo.BACKGROUNDS]
    facts = run_training(
        objective, batches, config.train, ctx, model_of, card, [] if text is not None else shown, watch
    )
    if world()[0] == 0:
        if text is not None:
            text.save(ctx.out)
        if config.lora is not None:
            about = {"base": ctx.parents["init"].digest, "trigger": token, "class": config.class_word,
                     "captions": json.dumps(list(dict.fromkeys(subject.captions)))}  # fmt: skip
            write_adapter(lora_files.from_module(trained[0].transformer, about), start, text, ctx)
        show(subject, load_generator(ctx.out), load_generator(ctx.inputs["init"]), ctx)
    learning = {} if watch is None else watch.report()
    return facts | learning | {"instance_pictures": len(instance), "class_pictures": len(prior), "token": token} | found


def objective_of(
    config: DreamBoothConfig, denoiser: Denoiser, base: Denoiser, text: TextTuning | None, prompts: list[str]
) -> DreamBooth:
    """DreamBooth, with the text encoders where they learn too; `prompts` are those of instance and prior pictures."""
    kept = base if config.prior == "prediction" else None
    if text is None:
        return DreamBooth(denoiser, config.timesteps, kept)
    return PivotalDreamBooth(denoiser, config.timesteps, kept, text, prompts, config.train.steps)


def text_of(config: DreamBoothConfig, ctx: StageContext, token: str, card: SamplingCard) -> TextTuning | None:
    """The text encoder with what is learnt of it, or nothing where its features are taken as they are."""
    if config.text is None:
        return None
    words = token.split() if config.text.vectors else []
    encoder = PrxText(ctx.inputs["init"], card.prompt_max_tokens, clean=False)
    return TextTuning(encoder, config.text, words, config.text.initial or config.class_word, config.train.seed)


def write_adapter(adapter: Adapter, start: Adapter | None, text: TextTuning | None, ctx: StageContext) -> None:
    """The adapter's forms; with a LoRA on the text encoder diffusers' alone, and learnt rows beside them."""
    adapter, folder = adapter if start is None else since(adapter, start), ctx.out / "adapter"
    on_text = {} if text is None else text.adapters()
    if on_text:
        lora_files.save_diffusers(adapter, folder, on_text)
    else:
        save_forms(adapter, folder, ctx.name)
    if text is not None and text.words:
        save_rows(folder, text.words, text.rows())


def token_of(config: DreamBoothConfig, ctx: StageContext, captions: list[str]) -> tuple[str, dict[str, Any]]:
    """The subject's token, given and sound or the finder's first, and the finder's list for the facts."""
    tokenizer: PreTrainedTokenizerBase = text_encoder.modules()[1]
    if config.learnt_words:
        word = config.token or f"{config.label.replace('-', '')}0"
        if word.lower() in words_of(captions):
            raise ConfigError(f"token {word!r} is in captions the model was trained on; give the subject a new word")
        return " ".join(words_of_token(word, config.learnt_words)), {}
    if config.token is not None:
        refuse_token(config.token, tokenizer, captions, config.class_word)
        return config.token, {}
    found = find_tokens(load_generator(ctx.inputs["init"]), tokenizer, captions, config.class_word)
    listed = [{"token": each.token, "id": each.id, "response": round(each.response, 4)} for each in found[:SHOWN]]
    return found[0].token, {"tokens_found": listed}


def subject_of(config: DreamBoothConfig, ctx: StageContext, token: str, card: SamplingCard) -> Subject:
    """The pictures of the subject with their captions: drawn for a demo subject, else those of the folder."""
    if "subject" not in ctx.inputs:
        return demo_subject(config, token, card.side)
    tokenizer: PreTrainedTokenizerBase = text_encoder.modules()[1]
    return own_subject(config, ctx.inputs["subject"], token, card.side, tokenizer, card.prompt_max_tokens)


def show(subject: Subject, tuned: Generator, base: Generator, ctx: StageContext) -> None:
    """grid.png: pictures of the subject, what the adapted model draws for their captions, and what the base draws."""
    captions = subject.captions[:SHOWN]
    rows = [subject.images[:SHOWN]] + [model.sample(captions, list(range(len(captions)))) for model in (tuned, base)]
    save_grid(np.concatenate(rows), ctx.out / "grid.png", columns=len(captions))


def _prior(
    config: DreamBoothConfig, ctx: StageContext, captions: list[str], token: str
) -> tuple[list[str], np.ndarray]:  # fmt: skip
    """Ordinary prompts, and the base model's pictures of them."""
    count = config.class_pictures if config.prior_weight > 0 else 0
    if count == 0:
        return [], np.empty(0)
    prompts = class_prompts(config, captions, token, count)
    seeds = [derive_seed(config.train.seed, "class", i) for i in range(count)]
    return prompts, sample_together(load_generator(ctx.inputs["init"]), prompts, seeds)


def class_prompts(config: DreamBoothConfig, captions: list[str], token: str, count: int) -> list[str]:
    """Published scenes for a demo subject, else training captions and every fourth the bare class; a share is foreign.

    A foreign prompt has another rare token before the class or, for a demo subject, every other time before its noun.
    """
    rng = np.random.default_rng([config.train.seed, 78])
    if config.folder is None:
        published = [scene for scene in demo.all_scenes("full") if not scene.held_out]
        scenes = [published[i] for i in rng.integers(0, len(published), count)]
        prompts, nouns = [demo.short_caption(scene) for scene in scenes], [scene.objects[0] for scene in scenes]
        frames = [prompt.replace(noun, "{subject}") for prompt, noun in zip(prompts, nouns, strict=True)]
    else:
        frames = [config.templates[i % len(config.templates)] for i in range(count)]
        nouns = [config.class_word] * count
        picked = rng.integers(1, len(captions), count) if len(captions) > 1 else np.zeros(count, int)  # 0 is empty
        bare = [frame.replace("{subject}", config.class_word) for frame in frames]
        prompts = [bare[i] if i % 4 == 0 else captions[int(picked[i])] for i in range(count)]
    tokenizer: PreTrainedTokenizerBase = text_encoder.modules()[1]
    others = [other for other in rarest(tokenizer, captions, config.class_word, FOREIGN) if other != token]
    if not others:
        return prompts
    foreign, other = rng.random(count) < config.foreign_share, rng.integers(0, len(others), count)
    phrases = [f"{others[int(other[i])]} {nouns[i] if i % 2 else config.class_word}" for i in range(count)]
    return [frames[i].replace("{subject}", phrases[i]) if foreign[i] else prompts[i] for i in range(count)]


def _pictures(images: np.ndarray, captions: list[str], encode: Encode) -> Pictures:
    if not captions:
        return Pictures(torch.empty(0), torch.empty(0), torch.empty(0))
    return Pictures(to_model(images), *encode(captions))
