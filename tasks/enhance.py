"""Stage function that trains a prompt enhancer on the captions of a training set, or records a chat model as one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from data_curation.dataset import Split, TrainingSet
from infra.errors import DataRefused
from infra.local_files import weights_digest
from infra.stages import StageContext
from models.engine.distribute import one_thread, world
from models.engine.loop import train
from models.engine.objective import Batch, write_metrics
from models.engine.randomness import shuffled
from models.engine.weights import put_weights
from models.networks import prompt_enhancer as network
from models.posttraining.caption_pairs import PairSource, addable, sound, vocabulary
from models.posttraining.config import PromptEnhancerConfig
from models.posttraining.enhancer_files import CARD, EnhancerCard, listing_digest, load_enhancer
from models.posttraining.intent import Intent
from models.posttraining.prompt_enhancement import PromptRewriting, batch_of, spans_kept
from tasks.training_data import local_slots

LOOKED_AT = 100  # prompts made of validation captions that the finished enhancer rewrites


def prompt_enhancer(config: PromptEnhancerConfig, ctx: StageContext) -> dict[str, Any]:
    """Train the small model on (short, long) pairs, or name the chat model; facts say what it does to unseen captions."""
    with one_thread():
        if config.instruct is not None:
            return named(config, config.instruct, ctx)
        return trained(config, ctx)


def caption_pairs(data: TrainingSet, target: str, split: Split) -> list[tuple[str, str]]:
    """Distinct (short, target) captions of the rows of a split."""
    chosen = np.array(data.index["split"].to_pylist()) == split
    short, long = (data.index[f"caption_{kind}"].to_numpy()[chosen] for kind in ("short", target))
    ids = dict.fromkeys(zip(short.tolist(), long.tolist(), strict=True))
    return [(data.captions[a], data.captions[b]) for a, b in ids]


def trained(config: PromptEnhancerConfig, ctx: StageContext) -> dict[str, Any]:
    """The small model; rank 0 writes it."""
    data = TrainingSet.open(ctx.inputs["data"])
    every = caption_pairs(data, config.target, "train")
    captions = sound(every, Intent())
    if not captions:
        raise DataRefused(
            f"prompt enhancer: none of {len(every)} caption pairs keeps the rules of models/posttraining/intent.py "
            f"(target={config.target!r}); take the other target or better captions"
        )
    known, free = vocabulary(captions), addable(captions, config.train.seed)
    tokenizer = network.train_tokenizer((text for pair in captions for text in pair), config.vocabulary)
    model = network.build(len(tokenizer), config.width, config.depth, config.heads, config.train.seed)
    source = PairSource(captions, Intent(known, free), config.train.seed)
    batches = batches_of(source, tokenizer, config)
    trainer = train(PromptRewriting(model), batches, config.train, ctx.scratch, ctx.progress)
    put_weights(model, trainer.emas["enhancer"].average)
    facts = {"pairs": len(captions), "pairs_refused": len(every) - len(captions), "last": trainer.rows[-1]}
    if world()[0] != 0:
        return facts
    network.CaptionModel(model, tokenizer).save(ctx.out)
    card = EnhancerCard(
        kind="captions", fingerprint=weights_digest(ctx.out), known=tuple(sorted(known)), addable=tuple(sorted(free)),
        language=config.language, max_tokens=config.max_tokens,
    )  # fmt: skip
    (ctx.out / CARD).write_text(card.model_dump_json(indent=1))
    write_metrics(trainer.rows, ctx.out / "metrics.jsonl")
    return facts | looked_at(config, ctx, source, caption_pairs(data, config.target, "validation") or captions)


def batches_of(source: PairSource, tokenizer: Any, config: PromptEnhancerConfig) -> Callable[[int], Batch]:
    """This worker's pairs as a pure function of the step: every caption once an epoch, shortened anew each time."""
    size, seed = config.train.batch_size, config.train.seed
    slots = local_slots(size)

    def batch(step: int) -> Batch:
        rows = shuffled(seed, "caption order", len(source.captions), [step * size + slot for slot in slots])
        pairs = [source.pair(step, slot, int(row)) for slot, row in zip(slots, rows, strict=True)]
        examples = [network.example(tokenizer, pair.short, pair.long) for pair in pairs]
        return batch_of(examples, slots, network.SPECIAL.index(network.PAD))

    return batch


def looked_at(
    config: PromptEnhancerConfig, ctx: StageContext, source: PairSource, captions: list[tuple[str, str]]
) -> dict[str, Any]:
    """What the enhancer does to shortened captions that it was not trained on; examples.jsonl shows them."""
    unseen = PairSource(captions, source.intent, config.train.seed + 1)
    rows = np.random.default_rng([config.train.seed, 81]).integers(len(captions), size=LOOKED_AT)
    prompts = [unseen.pair(0, i, int(row), slots=False).short for i, row in enumerate(rows)]
    enhancer = load_enhancer(ctx.out)
    made = [enhancer.enhance(prompt) for prompt in prompts]
    kept = spans_kept(enhancer.intent, made)
    lines = [json.dumps({"original": e.original, "revised": e.revised, "reason": e.reason}) for e in made]
    (ctx.out / "examples.jsonl").write_text("".join(line + "\n" for line in lines))
    return {
        "looked_at": len(made), "rewritten": sum(e.reason is None for e in made),
        "returned": dict(Counter(str(e.reason) for e in made if e.reason is not None).most_common(5)),
        "protected": len(kept), "protected_kept": sum(kept),
    }  # fmt: skip


def named(config: PromptEnhancerConfig, model: str, ctx: StageContext) -> dict[str, Any]:
    """A chat model with our rules; it is not copied, only named with what identifies it."""
    card = EnhancerCard(
        kind="instruct", model=model, fingerprint=listing_digest(model), language=config.language,
        max_tokens=config.max_tokens, new_tokens=config.new_tokens, seconds=config.seconds,
    )  # fmt: skip
    if world()[0] == 0:
        (ctx.out / CARD).write_text(card.model_dump_json(indent=1))
    return {"instruct": model, "fingerprint": card.fingerprint}
