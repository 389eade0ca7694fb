"""(short, long) pairs for the prompt enhancer from captions: what a person might type, and the caption it stands for.

A short prompt is the caption with parts left out: phrases after a preposition, relations, sizes, small words; what
names a thing, a number or a negation is never left out. Words that are not protected by list become slots in both
texts now and then, so that the model learns to place what it has never read. Every pair must keep the rules of
intent.py, as a rewrite must. What may be brought in (`addable`) is what the reductions took out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.engine.randomness import derive_seed
from models.networks.prompt_enhancer import SLOTS
from models.posttraining.intent import Intent, content
from models.posttraining.prompt_words import FUNCTION, stem, words

START = r"(?:on|in|at|with|against|during)"
PHRASE = re.compile(rf"\s*\b{START}\b(?: an?| the)? [^,.;]*?(?=\s+{START}\b|[,.;]|$)")
RELATION = re.compile(
    r"\b(?:left of|right of|next to|in front of|above|below|under|beside|behind|near)\b(?: an?\b| the\b)?"
)
SIZES = frozenset(("big", "large", "huge", "small", "little", "tiny", "single"))
PLACES = re.compile(r"\b(?:background|corner)\b")


@dataclass(frozen=True)
class Pair:
    """What is typed and what it is rewritten to."""

    short: str
    long: str


def shorten(caption: str, rng: np.random.Generator) -> str:
    """One way in which a person would have typed this caption."""
    text = caption.rstrip(".")
    if rng.random() < 0.1:
        return text
    text = PHRASE.sub(lambda m: "" if rng.random() < 0.45 else m.group(), text)
    if rng.random() < 0.35:
        text = RELATION.sub(lambda _: str(rng.choice(["and", ",", "and"])), text)
    if rng.random() < 0.5:
        text = " ".join(word for word in text.split() if word.lower() not in SIZES)
    if rng.random() < 0.5:
        text = PLACES.sub("", text)
    style = rng.random()
    if style < 0.35:  # keywords
        kept = [word for word in text.split() if word.strip(",").lower() not in FUNCTION]
        text = (", " if rng.random() < 0.4 else " ").join(word.strip(",") for word in kept if word.strip(","))
    elif style < 0.55:
        text = re.sub(r"\b(?:an?|the)\s+", "", text)
    text = re.sub(r"\s+,", ",", " ".join(text.split())).strip(" ,")
    return text[:1].upper() + text[1:] if rng.random() < 0.1 else text


def slotted(pair: Pair, never: frozenset[str], rng: np.random.Generator) -> Pair:
    """Words of the short text that name things, some turned into slots in both texts; words in `never` stay."""
    if rng.random() < 0.6:
        return pair
    short, long = pair.short, pair.long
    names = [w for w in dict.fromkeys(content(short)) if w.lower() not in never | SIZES]
    names = [w for w in names if re.search(rf"\b{re.escape(w)}\b", long)]
    for slot, name in zip(rng.permutation(SLOTS), names, strict=False):
        if rng.random() < 0.8:
            short, long = (re.sub(rf"\b{re.escape(name)}\b", str(slot), text) for text in (short, long))
    return Pair(short, long)


class PairSource:
    """Pairs as a pure function of (seed, step, slot) from captions (short, target)."""

    def __init__(self, captions: Sequence[tuple[str, str]], intent: Intent, seed: int) -> None:
        self.captions, self.seed = list(captions), seed
        self.intent = intent

    def pair(self, step: int, slot: int, row: int, slots: bool = True) -> Pair:
        """The pair of one place of a batch; the whole caption where a shorter one would break the rules."""
        short, target = self.captions[row]
        rng = np.random.default_rng(derive_seed(self.seed, "shorten", step, slot))
        typed = shorten(short, rng)
        if not content(typed) or self.intent.fault(typed, target) is not None:
            typed = short
        found = Pair(typed, target)
        return slotted(found, self.intent.addable or frozenset(), rng) if slots else found


def sound(captions: Sequence[tuple[str, str]], intent: Intent) -> list[tuple[str, str]]:
    """Caption pairs that keep the rules themselves; a long text with another count than its short one teaches a fault."""
    return [(short, long) for short, long in captions if short and long and intent.fault(short, long) is None]


def vocabulary(captions: Sequence[tuple[str, str]]) -> frozenset[str]:
    """Lower-case words of all captions."""
    return frozenset(word.lower() for pair in captions for text in pair for word in words(text))


def addable(captions: Sequence[tuple[str, str]], seed: int, tries: int = 4) -> frozenset[str]:
    """Words that targets have and their short texts lack, over a few reductions of every caption."""
    found: set[str] = set()
    for row, (short, target) in enumerate(captions):
        long = {stem(w): w.lower() for w in words(target)}
        for attempt in range(tries):
            rng = np.random.default_rng(derive_seed(seed, "addable", row, attempt))
            typed = {stem(w) for w in words(shorten(short, rng))}
            found |= {w for key, w in long.items() if key not in typed}
    return frozenset(found)
