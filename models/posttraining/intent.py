"""Is a rewritten prompt still what was asked? Checked by code, so that no model has to be believed.

Trigger words, rare tokens, quotes and negations must come back as written; numbers and colours are the same sets (a
colour may be added where none was asked) and are said of the same things, which stand left, above or in front as before
(binding.py); other words come back at least in another number; nothing new is denied. A rewrite that loops, changes the
language or does not fit the text encoder is refused. The first fault is the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from models.posttraining.binding import moved, turned
from models.posttraining.prompt_words import (
    COLOURS,
    FUNCTION,
    NEGATIONS,
    NUMBERS,
    QUOTED,
    digits,
    language,
    negated,
    of_kind,
    rare,
    scripts,
    stem,
    words,
)

RUN = 3  # words in a row whose return is a loop
RETURNS = 3
REPEATED = 4  # one word so often in a row


@dataclass(frozen=True)
class Intent:
    """The rules and what they need to know. `known`, `addable`: words of the captions; None: no limit."""

    known: frozenset[str] | None = None
    addable: frozenset[str] | None = None  # words that a rewrite may bring in
    triggers: tuple[str, ...] = ()
    language: str = "en"  # of a prompt too short to tell
    max_tokens: int = 64
    count_tokens: Callable[[str], int] = lambda text: len(text.split())

    def protected(self, prompt: str) -> list[str]:
        """Spans of the prompt that must be in a rewrite: as written, colours and numbers in any case."""
        asked = of_kind(prompt, NUMBERS | COLOURS)
        return [*rare(prompt, self.known, self.triggers), *negated(prompt), *sorted(asked)]

    def kept(self, prompt: str, revised: str) -> list[bool]:
        """Whether each protected span is in the rewrite: as written, colours and numbers in any case."""
        listed = of_kind(revised, NUMBERS | COLOURS)
        return [span in listed or span in revised for span in self.protected(prompt)]

    def fault(self, prompt: str, revised: str) -> str | None:
        """Why the rewrite may not replace the prompt; None if it may."""
        return next(self._faults(prompt, revised), None)

    def _faults(self, prompt: str, revised: str) -> Iterator[str]:
        if not revised.strip():
            yield "the rewrite is empty"
            return
        length = self.count_tokens(revised)
        if length > self.max_tokens:
            yield f"the rewrite has {length} tokens, the text encoder reads {self.max_tokens}"
        if looping(revised):
            yield "the rewrite repeats itself"
        yield from self._language(prompt, revised)
        yield from self._lost(prompt, revised)
        yield from self._invented(prompt, revised)
        yield from moved(prompt, revised)
        yield from turned(prompt, revised)

    def _language(self, prompt: str, revised: str) -> Iterator[str]:
        if new := scripts(revised) - scripts(prompt) - {"LATIN"}:
            yield f"the rewrite is written in {sorted(new)[0].lower()} letters, the prompt is not"
        wanted, got = language(prompt) or self.language, language(revised)
        if got is not None and got != wanted:
            yield f"the rewrite's language is {got}, the prompt's {wanted}"

    def _lost(self, prompt: str, revised: str) -> Iterator[str]:
        for spans in (rare(prompt, self.known, self.triggers), negated(prompt)):
            for span, count in Counter(spans).items():
                if revised.count(span) < count:
                    yield f"{span!r} is not in the rewrite"
        for kind, name in ((NUMBERS, "number"), (COLOURS, "colour")):
            if lost := of_kind(prompt, kind) - of_kind(revised, kind):
                yield f"the {name} {sorted(lost)[0]!r} is not in the rewrite"
        there = Counter(stem(word) for word in words(revised))
        asked = Counter(stem(word) for word in content(prompt))
        for name, count in asked.items():
            if there[name] < 1:
                yield f"{next(w for w in content(prompt) if stem(w) == name)!r} is not in the rewrite"
            elif there[name] > count:
                yield f"the rewrite says {next(w for w in content(prompt) if stem(w) == name)!r} {there[name]} times"

    def _invented(self, prompt: str, revised: str) -> Iterator[str]:
        if new := of_kind(revised, NUMBERS) - of_kind(prompt, NUMBERS) | digits(revised) - digits(prompt):
            yield f"the rewrite invents the number {sorted(new)[0]!r}"
        asked = of_kind(prompt, COLOURS)
        if asked and (new := of_kind(revised, COLOURS) - asked):
            yield f"the rewrite invents the colour {sorted(new)[0]!r}"
        if new := set(negated(revised)) - set(negated(prompt)):
            yield f"the rewrite denies {sorted(new)[0]!r}, which the prompt does not"
        if len(QUOTED.findall(revised)) > len(QUOTED.findall(prompt)):
            yield "the rewrite invents a quotation"
        if self.addable is not None:
            free, known = self.addable | FUNCTION, {stem(word) for word in words(prompt)}
            if new := {w.lower() for w in words(revised) if stem(w) not in known} - free:
                yield f"the rewrite invents {sorted(new)[0]!r}"


def content(prompt: str) -> list[str]:
    """Words that carry meaning and are in no other rule."""
    skipped = FUNCTION | NUMBERS | COLOURS | NEGATIONS
    return [word for word in words(prompt) if word.lower() not in skipped]


def looping(text: str, run: int = RUN) -> bool:
    """True when one run of words comes back too often, or one word comes many times in a row."""
    low = [word.lower() for word in words(text)]
    runs = Counter(tuple(low[i : i + run]) for i in range(len(low) - run + 1))
    row = 1
    for before, word in pairwise(low):
        row = row + 1 if word == before else 1
        if row >= REPEATED:
            return True
    return bool(runs) and max(runs.values()) >= RETURNS
