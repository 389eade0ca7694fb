"""Stage function that mixes adapters of several personalize stages into one checkpoint of their common base."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
from models.personalization.lora_files import Adapter
from models.personalization.mixing import Part
from models.sampling.generate import Generator, sample_together

TEMPLATES = ("a {}", "a big {}", "a small {}", "a picture of a {}")  # where no caption names the class
ORDINARY = ""  # of readings: the base on ordinary prompts


@dataclass(frozen=True)
class Ingredients:
    """What a mix is made of: the base with its weights, and every adapter as much as it counts."""

    card: SamplingCard
    digest: str
    base: Denoiser
    parts: dict[str, Part]
    weights: dict[str, Tensor]

    @property
    def triggers(self) -> dict[str, str]:
        return {name: part.adapter.about.get("trigger", "") for name, part in self.parts.items()}

    @property
    def about(self) -> dict[str, str]:
        """What the mixed adapter's file says about itself."""
        words = " and ".join(trigger for _, trigger in sorted(self.triggers.items()) if trigger)
        return {"base": self.digest, "trigger": words}

    @property
    def counting(self) -> list[str]:
        """Names of the adapters whose weight is not 0."""
        return [name for name, part in sorted(self.parts.items()) if part.weight != 0]

    @property
    def low_rank(self) -> bool:
        """Whether their sum and their fit have the sum of their ranks; DoRA's changes have every rank."""
        return not any(part.adapter.magnitudes for part in self.parts.values())

    def tuned(self, name: str) -> Denoiser:
        """The base with one adapter merged, as much as it counts."""
        by_layer = mixing.weighted_changes({name: self.parts[name]}, self.weights)
        return with_changes(self.base, {layer: found[name] for layer, found in by_layer.items()})


@dataclass(frozen=True)
class Reading:
    """A model, what it drew (uint8 [N, side, side, 3]) for which prompts, and C of what its layers read meanwhile."""

    denoiser: Denoiser
    prompts: list[str]
    pictures: np.ndarray
    moments: fusion.Moments


def mix(config: MixConfig, ctx: StageContext) -> dict[str, Any]:
    """Write the merged checkpoint, mix.json, and the mix as one adapter in three forms where it has a low rank."""
    made_of = ingredients(config, ctx)
    mixed = mixed_by(config, made_of, readings_of(config, ctx, made_of) if config.draws else {})
    words = made_of.about["trigger"]
    merged = with_changes(made_of.base, mixed.changes)
    write_checkpoint(ctx.out, merged, made_of.card.model_copy(update={"trigger": words}), ctx.inputs["init"])
    adapter = as_adapter(config, made_of, mixed)
    if adapter is not None:
        save_forms(adapter, ctx.out / "adapter", config.name)
    return write_record(config, ctx, made_of, mixed)


def ingredients(config: MixConfig, ctx: StageContext) -> Ingredients:
    """The base and the adapters, which must be its own and have different tokens."""
    init = ctx.inputs["init"]
    card, digest = read_card(init), ctx.parents["init"].digest
    base = families.load(init / "transformer", card)
    parts = {
        name: Part(lora_import.read(ctx.inputs[name] / "adapter", base.transformer, digest), weight,
                   config.blocks.get(name, {}))
        for name, weight in config.adapters.items()
    }  # fmt: skip
    found = Ingredients(card, digest, base, parts, lora_files.stock_weights(base.transformer))
    for one, two in itertools.combinations(sorted(found.triggers), 2):
        if found.triggers[one] and found.triggers[one] == found.triggers[two]:
            raise ConfigError(
                f"mix {config.name}: {one} and {two} have the same token {found.triggers[one]!r}; give each its own"
            )
    return found


def mixed_by(config: MixConfig, made_of: Ingredients, readings: Mapping[str, Reading]) -> mixing.Mix:
    """The mixed changes; those a distilled mix starts from are the fused ones."""
    fit = fit_of(config, readings) if readings else None
    return mixing.mix(made_of.parts, made_of.weights, config.method, config.rank, config.density, config.seed, fit)


def as_adapter(config: MixConfig, made_of: Ingredients, mixed: mixing.Mix) -> Adapter | None:
    """The mix as one LoRA, or nothing where its changes have no low rank."""
    match config.method:
        case "sum" if made_of.low_rank:
            return mixing.concatenated(made_of.parts, made_of.about)
        case "svd":
            return mixing.reduced(mixed.changes, config.rank or 1, made_of.about)
        case "fused" | "distilled" if made_of.low_rank:
            ranks = mixing.concatenated(made_of.parts, made_of.about).ranks
            return mixing.reduced(mixed.changes, ranks, made_of.about)
        case _:
            return None


def write_record(config: MixConfig, ctx: StageContext, made_of: Ingredients, mixed: mixing.Mix) -> dict[str, Any]:
    """mix.json, and the facts."""
    pairs = {
        f"{one} + {two}": asdict(interference(made_of.parts[one].adapter, made_of.parts[two].adapter))
        for one, two in itertools.combinations(sorted(made_of.parts), 2)
    }
    record = {"method": config.method, "weights": config.adapters, "error": mixed.error, "triggers": made_of.triggers,
              "error_by_layer": mixed.error_by_layer, "interference": pairs}  # fmt: skip
    (ctx.out / "mix.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return {"method": config.method, "error": mixed.error, "triggers": made_of.triggers, "interference": pairs}


def readings_of(config: MixConfig, ctx: StageContext, made_of: Ingredients) -> dict[str, Reading]:
    """What every tuned model draws for its subject, and under ORDINARY the base for ordinary prompts."""
    settings, captions = config.fusion or FusionConfig(), TrainingSet.open(ctx.inputs["data"]).captions[1:]
    around = families.surroundings(ctx.inputs["init"], made_of.card)
    layers = list(mixing.weighted_changes(made_of.parts, made_of.weights))

    def reading(denoiser: Denoiser, prompts: list[str]) -> Reading:
        generator, pictures = Generator(denoiser, made_of.card, around=around), list[np.ndarray]()
        seeds = [config.seed + number for number in range(len(prompts))]
        moments = fusion.second_moments(
            denoiser.transformer, layers,
            lambda: pictures.append(sample_together(generator, prompts, seeds, settings.steps)),
        )  # fmt: skip
        return Reading(denoiser, prompts, pictures[0], moments)

    rng, found = np.random.default_rng([config.seed, 81]), dict[str, Reading]()
    for name in made_of.counting:
        about = made_of.parts[name].adapter.about
        prompts = subject_prompts(about, captions, settings.prompts, rng, settings.stand_in, settings.own_share)
        found[name] = reading(made_of.tuned(name), prompts)
    plain = drawn_from(captions, settings.ordinary, rng)
    return {ORDINARY: reading(with_changes(made_of.base, {}), plain), **found}


def fit_of(config: MixConfig, readings: Mapping[str, Reading]) -> Callable[[str, Mapping[str, Tensor]], Tensor]:
    """How a fused mix makes a layer's change from what every model's layers read."""
    settings = config.fusion or FusionConfig()

    def fit(layer: str, changes: Mapping[str, Tensor]) -> Tensor:
        read = {name: reading.moments[layer] for name, reading in readings.items() if name != ORDINARY}
        plain = readings[ORDINARY].moments[layer]
        return fusion.fused(changes, read, plain, settings.ordinary_weight, settings.ridge)

    return fit


def subject_prompts(
    about: Mapping[str, str], captions: list[str], count: int, rng: np.random.Generator, stand_in: str | None = None,
    own_share: float = 0.5,
) -> list[str]:  # fmt: skip
    """A share of the captions the adapter names as its own; else captions of the training set with the subject in them.

    Those name the class, or else `stand_in`, with token and class in its place; templates where there are none. They alone
    would ask for the subject where the training set has that word, which may be nearly always beside something else.
    """
    trigger, name = about.get("trigger", ""), about.get("class", "")
    if not trigger:
        raise ConfigError(
            "a fused or distilled mix draws each adapter's subject, and one has no token; give it one or use sum"
        )
    own: list[str] = json.loads(about.get("captions", "[]"))
    taught = drawn_from(own, round(own_share * count), rng) if own else []
    phrase = f"{trigger} {name}".strip()
    for word in (name, stand_in):
        place = re.compile(rf"\b{re.escape(word)}\b") if word else None
        texts = [place.sub(phrase, text) for text in captions if place is not None and place.search(text)]
        if texts:
            return taught + drawn_from(texts, count - len(taught), rng)
    return taught + drawn_from([each.format(phrase) for each in TEMPLATES], count - len(taught), rng)


def drawn_from(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """So many of the texts, each as often as the others but for one."""
    return [texts[int(place)] for place in np.resize(rng.permutation(len(texts)), count)]
