"""Stage function that mixes adapters of several personalize stages into one checkpoint of their common base."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from data_curation.dataset import TrainingSet
from infra.errors import ConfigError
from infra.stages import StageContext
from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.networks.denoiser import Denoiser
from models.personalization import fusion, lora_files, lora_import, mixing
from models.personalization.config import FusionConfig, MixConfig
from models.personalization.interference import interference
from models.personalization.lora import save_forms, with_changes
from models.personalization.mixing import Part
from models.sampling.generate import Generator

TEMPLATES = ("a {}", "a big {}", "a small {}", "a picture of a {}")  # where no caption names the class


def mix(config: MixConfig, ctx: StageContext) -> dict[str, Any]:
    """Write the merged checkpoint, mix.json, and for sum and svd the mix as one adapter in three forms."""
    init = ctx.inputs["init"]
    card, digest = read_card(init), ctx.parents["init"].digest
    base = families.load(init / "transformer", card)
    parts = {
        name: Part(lora_import.read(ctx.inputs[name] / "adapter", base.transformer, digest), weight,
                   config.blocks.get(name, {}))
        for name, weight in config.adapters.items()
    }  # fmt: skip
    triggers = {name: part.adapter.about.get("trigger", "") for name, part in parts.items()}
    for one, two in itertools.combinations(sorted(triggers), 2):
        if triggers[one] and triggers[one] == triggers[two]:
            raise ConfigError(
                f"mix {config.name}: {one} and {two} have the same token {triggers[one]!r}; give each its own"
            )
    weights = lora_files.stock_weights(base.transformer)
    fit = fit_of(config, ctx, base, card, parts, weights) if config.method == "fused" else None
    mixed = mixing.mix(parts, weights, config.method, config.rank, config.density, config.seed, fit)
    words = " and ".join(trigger for _, trigger in sorted(triggers.items()) if trigger)
    write_checkpoint(ctx.out, with_changes(base, mixed.changes), card.model_copy(update={"trigger": words}), init)
    about = {"base": digest, "trigger": words}
    match config.method:
        case "sum" if not any(part.adapter.magnitudes for part in parts.values()):
            save_forms(mixing.concatenated(parts, about), ctx.out / "adapter", config.name)
        case "svd":
            save_forms(mixing.reduced(mixed.changes, config.rank or 1, about), ctx.out / "adapter", config.name)
        case _:
            pass  # no low rank
    pairs = {
        f"{one} + {two}": asdict(interference(parts[one].adapter, parts[two].adapter))
        for one, two in itertools.combinations(sorted(parts), 2)
    }
    record = {"method": config.method, "weights": config.adapters, "error": mixed.error, "triggers": triggers,
              "error_by_layer": mixed.error_by_layer, "interference": pairs}  # fmt: skip
    (ctx.out / "mix.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return {"method": config.method, "error": mixed.error, "triggers": triggers, "interference": pairs}


def fit_of(
    config: MixConfig, ctx: StageContext, base: Denoiser, card: SamplingCard, parts: Mapping[str, Part],
    weights: Mapping[str, Tensor],
) -> Callable[[str, Mapping[str, Tensor]], Tensor]:  # fmt: skip
    """How a fused mix makes a layer's change: every model has drawn its prompts, and what its layers read is known."""
    settings, captions = config.fusion or FusionConfig(), TrainingSet.open(ctx.inputs["data"]).captions[1:]
    around, by_layer = families.surroundings(ctx.inputs["init"], card), mixing.weighted_changes(parts, weights)

    def inputs_of(changes: mixing.Changes, prompts: list[str]) -> fusion.Moments:
        generator = Generator(with_changes(base, changes), card, around=around)
        seeds = [config.seed + number for number in range(len(prompts))]
        return fusion.second_moments(
            generator.denoiser.transformer, by_layer, lambda: generator.draw(prompts, seeds, steps=settings.steps)
        )

    rng = np.random.default_rng([config.seed, 81])
    read = {
        name: inputs_of({layer: found[name] for layer, found in by_layer.items() if name in found},
                      subject_prompts(part.adapter.about, captions, settings.prompts, rng))
        for name, part in sorted(parts.items()) if part.weight != 0
    }  # fmt: skip
    plain = inputs_of({}, drawn_from(captions, settings.ordinary, rng))

    def fit(layer: str, changes: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: moments[layer] for name, moments in read.items()}
        return fusion.fused(changes, inputs, plain[layer], settings.ordinary_weight, settings.ridge)

    return fit


def subject_prompts(about: Mapping[str, str], captions: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Captions that name the class, with the token before it; templates where there are none."""
    trigger, name = about.get("trigger", ""), about.get("class", "")
    if not trigger:
        raise ConfigError("a fused mix draws each adapter's subject, and one has no token; give it one or use sum")
    phrase = f"{trigger} {name}".strip()
    word = re.compile(rf"\b{re.escape(name)}\b") if name else None
    known = [text for text in captions if word is not None and word.search(text)]
    texts = [word.sub(phrase, text) for text in known if word is not None]
    return drawn_from(texts or [each.format(phrase) for each in TEMPLATES], count, rng)


def drawn_from(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """So many of the texts, each as often as the others but for one."""
    return [texts[int(place)] for place in np.resize(rng.permutation(len(texts)), count)]
