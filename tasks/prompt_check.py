"""Stage `prompt_check`: short prompts drawn as typed and as rewritten with the same noise, judged by what was typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_curation.scenes import BACKGROUNDS, CORNERS, OBJECTS, plural
from infra.stages import StageContext
from models.engine.distribute import one_thread
from models.engine.randomness import derive_seed
from models.evaluation.gates import paired_difference
from models.evaluation.intervals import wilson
from models.evaluation.judge import Judge
from models.evaluation.prompt_categories import Asked, by_category, seen
from models.networks.checkpoint import read_card
from models.posttraining.config import PromptCheckConfig
from models.posttraining.enhancer_files import load_enhancer
from models.posttraining.prompt_enhancement import Enhanced, spans_kept
from models.sampling.generate import load_generator

SHOWN = 16  # prompts whose pictures are kept


@dataclass(frozen=True)
class Typed:
    """A short prompt, its kind and what it asks for; whatever it leaves open is free."""

    kind: str
    text: str
    asked: Asked


def short_prompts(count: int, seed: int) -> list[Typed]:
    """Prompts as people type them, every kind equally often; none has the form of a training caption."""
    rng = np.random.default_rng([seed, 83])

    def pick(names: Any) -> str:
        return str(rng.choice(list(names)))

    def two() -> tuple[str, str]:
        first, last = rng.choice(list(OBJECTS), 2, replace=False)
        return str(first), str(last)

    def object_only() -> Typed:
        name = pick(OBJECTS)
        return Typed("object", name, Asked((name,)))

    def on_colour() -> Typed:
        name, colour = pick(OBJECTS), pick(BACKGROUNDS)
        return Typed("object on colour", f"{name} on {colour}", Asked((name,), background=colour))

    def counted() -> Typed:
        name = pick(OBJECTS)
        return Typed("count", f"three {plural(name)}", Asked((name,), count=3))

    def placed() -> Typed:
        name, corner = pick(OBJECTS), pick(CORNERS)
        return Typed("place", f"{name} {corner}", Asked((name,), layout=corner))

    def beside() -> Typed:
        pair = two()
        return Typed("relation", f"{pair[0]} left of {pair[1]}", Asked(pair, layout="beside", ordered=True))

    def both() -> Typed:
        pair = two()
        return Typed("two objects", f"{pair[0]} and {pair[1]}", Asked(pair))

    kinds: list[Callable[[], Typed]] = [object_only, on_colour, counted, placed, beside, both]
    return [kinds[i % len(kinds)]() for i in range(count)]


def prompt_check(config: PromptCheckConfig, ctx: StageContext) -> dict[str, Any]:
    """Draw both, judge both against the typed prompt; prompts.json and a few pictures in the output."""
    judge, typed = Judge.load(ctx.inputs["judge"]), short_prompts(config.prompts, config.seed)
    card = read_card(ctx.inputs["init"])
    enhancer = load_enhancer(ctx.inputs["enhancer"], () if card.trigger is None else (card.trigger,))
    seeds = [derive_seed(config.seed, "prompt check", i) for i in range(len(typed))]
    with one_thread():
        made = [enhancer.enhance(prompt.text) for prompt in typed]
        generator = load_generator(ctx.inputs["init"])
        drawn = {
            "typed": generator.sample([e.original for e in made], seeds, batch_size=config.batch_size),
            "rewritten": generator.sample([e.revised for e in made], seeds, batch_size=config.batch_size),
        }
        right = {name: judged(judge, typed, images) for name, images in drawn.items()}
    kept = spans_kept(enhancer.intent, made)
    facts = scores(typed, right) | {
        "rewritten": sum(e.reason is None for e in made), "protected": len(kept), "protected_kept": sum(kept),
    }  # fmt: skip
    write(ctx, typed, made, drawn, right, facts)
    return facts


def judged(judge: Judge, typed: list[Typed], images: np.ndarray) -> dict[str, np.ndarray]:
    """Right or not [N], and by category."""
    return by_category([prompt.asked for prompt in typed], seen(judge, images))


def scores(typed: list[Typed], right: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Accuracy of both with intervals, by kind too, and the paired difference."""
    kinds = np.array([prompt.kind for prompt in typed])
    both = {name: values["all"] for name, values in right.items()}
    return {
        "short_prompt_accuracy": {name: wilson(values) for name, values in both.items()},
        "difference": paired_difference(both["rewritten"], both["typed"]),
        "by_kind": {str(kind): {name: wilson(values[kinds == kind]) for name, values in both.items()}
                    for kind in dict.fromkeys(kinds)},
        "by_category": {category: {name: wilson(right[name][category]) for name in right}
                        for category in right["typed"] if category != "all"},
    }  # fmt: skip


def write(
    ctx: StageContext, typed: list[Typed], made: list[Enhanced], drawn: dict[str, np.ndarray],
    right: dict[str, dict[str, np.ndarray]], facts: dict[str, Any],
) -> None:  # fmt: skip
    """Every prompt as JSON, the pictures of the first few as PNG."""
    rows = [
        {"kind": t.kind, "original": e.original, "revised": e.revised, "reason": e.reason,
         "right": {name: bool(values["all"][i]) for name, values in right.items()}}
        for i, (t, e) in enumerate(zip(typed, made, strict=True))
    ]  # fmt: skip
    (ctx.out / "prompts.json").write_text(json.dumps({"scores": facts, "rows": rows}, indent=1, sort_keys=True) + "\n")
    for name, images in drawn.items():
        (ctx.out / name).mkdir()
        for i, image in enumerate(images[:SHOWN]):
            Image.fromarray(image).save(ctx.out / name / f"{i}.png")
