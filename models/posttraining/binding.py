"""Does a rewrite say the same colour and number of the same thing, and put the same thing left, above or in front?

The rules of intent.py compare sets of words, which "a red cube on a blue sphere" and "a blue cube on a red sphere" share. Here
a text is cut into phrases, runs of words between small words and punctuation: "two red cats" says `two` and `red` of `cat`. A
colour or number alone belongs to the thing before it ("a cube that is red", "key, red"), after "on" to none ("key on
red"). Where things stand is read from "left of" and the like and from sides ("on the left there is a cat"); words that say
it otherwise are let through. Left out: verbs with a subject and an object ("a man riding a horse"), other languages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from models.posttraining.prompt_words import COLOURS, FUNCTION, NEGATIONS, NUMBERS, WORD, stem

PLACES = frozenset((
    "left", "right", "above", "below", "under", "beneath", "underneath", "beside", "front", "top", "bottom", "near", "next",
    "background", "side", "half",
))  # fmt: skip
LINKS = frozenset(("is", "are", "that", "which", "in", ","))  # between a thing and what is said of it
BREAK = re.compile(r"[,.;:!?()]")
CLAUSE = re.compile(r"[,.;:!?()]|\band\b", re.IGNORECASE)
ORDERED = {
    "left of": ("left", True), "right of": ("left", False), "above": ("above", True), "on top of": ("above", True),
    "below": ("above", False), "under": ("above", False), "beneath": ("above", False), "underneath": ("above", False),
    "in front of": ("front", True), "behind": ("front", False), "on": ("on", True), "inside": ("in", True), "in": ("in", True),
}  # fmt: skip
SIDES = {"left": ("left", True), "right": ("left", False), "upper": ("above", True), "top": ("above", True),
         "lower": ("above", False), "bottom": ("above", False)}  # fmt: skip
SIDE = re.compile(
    rf"\b(?:on|in|at) the ({'|'.join(SIDES)})(?: side| half)?\b(?! (?:of|corner|left|right)\b)", re.IGNORECASE
)
FOLLOWS = re.compile(r"\s*(?:there|is|are|stands?|sits?|lies?)\b", re.IGNORECASE)
RELATION = re.compile(rf"\b({'|'.join(sorted(ORDERED, key=len, reverse=True))})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Phrase:
    """What is said, lower case, of which things, stems; `own`: they stand in the phrase itself, after what is said;
    `apart`: something stands between it and the phrase before."""

    said: tuple[str, ...]
    things: frozenset[str]
    own: bool = True
    apart: bool = True


@dataclass(frozen=True)
class Relation:
    """`first` is left of, above, in front of, on or in `second`; both are stems of what stands there."""

    kind: str
    first: frozenset[str]
    second: frozenset[str]
    words: str


class _Cutter:
    """The phrases so far, and the one being read."""

    def __init__(self) -> None:
        self.found: list[Phrase] = []
        self.said: list[str] = []
        self.things: list[str] = []
        self.lead: list[str] = []  # small words and commas before the phrase being read

    def close(self, boundary: str) -> None:
        if self.said or self.things:
            linked = bool(self.found) and set(self.lead) <= LINKS
            before = self.found[-1].things if linked and not self.things else frozenset()
            self.found.append(
                Phrase(tuple(self.said), frozenset(self.things) or before, bool(self.things), bool(self.lead))
            )
            self.said, self.things, self.lead = [], [], []
        if boundary:
            self.lead.append(boundary)

    def joined(self, following: str | None) -> bool:
        """Whether the next word goes on with what is said: "red and blue balls"."""
        if following is None or self.things or not self.said:
            return False
        return any(self.said[-1] in kind and following in kind for kind in (COLOURS, NUMBERS))

    def open(self, following: str, mark: str) -> bool:
        """Whether punctuation before the next word leaves the phrase open: a number waits for its thing ("three, cats")."""
        waits = bool(self.said) and not self.things and self.said[-1] not in COLOURS
        return self.joined(following) or (waits and mark == ",")


def phrases(text: str) -> list[Phrase]:
    """What is said of which things, in the order of the text."""
    cutter, found, end = _Cutter(), list(WORD.finditer(text)), 0
    low = [match.group().lower() for match in found]
    for i, (match, word) in enumerate(zip(found, low, strict=True)):
        following = low[i + 1] if i + 1 < len(low) else None
        if (found_break := BREAK.search(text[end : match.start()])) and not cutter.open(word, found_break.group()):
            cutter.close(",")
        end = match.end()
        if word in NUMBERS | COLOURS or word.isdigit():
            if cutter.things:
                cutter.close("")
            cutter.said.append(word)
        elif word not in FUNCTION | NEGATIONS | PLACES:
            cutter.things.append(stem(word))
        elif not (word in ("and", "or") and cutter.joined(following)) and not (word == "of" and cutter.said):
            cutter.close(word)
    cutter.close("")
    return cutter.found


def named(text: str) -> frozenset[str]:
    """All things of a text."""
    return frozenset[str]().union(*(phrase.things for phrase in phrases(text)))


def relations(text: str) -> list[Relation]:
    """What stands where, between two things that are named."""
    found, start, plain = sided(text), 0, SIDE.sub(",", text)
    for match in RELATION.finditer(plain):
        before, after = plain[start : match.start()], BREAK.split(plain[match.end() :])[0]
        kind, forward = ORDERED[match.group().lower()]
        first, second = named(BREAK.split(before)[-1]), first_of(after)
        if re.match(r"\s*(?:it|them)\b", after):  # what the part of the sentence before this one is about
            *earlier, own = CLAUSE.split(before)
            first, second = (
                named(own),
                next((there for part in reversed(earlier) if (there := named(part))), frozenset()),
            )
        else:
            start = match.end()
        if first and second:
            sides = (first, second) if forward else (second, first)
            found.append(Relation(kind, *sides, match.group().lower()))
    return found


def first_of(text: str) -> frozenset[str]:
    """The things of the first phrase that names some, and of those that follow at once: "large" and "blue sphere"."""
    found = frozenset[str]()
    for phrase in phrases(text):
        if found and phrase.apart:
            break
        found |= phrase.things
    return found


def sided(text: str) -> list[Relation]:
    """What is on the left with what is on the right, what is in the upper half with what is in the lower one."""
    sides: dict[tuple[str, bool], frozenset[str]] = {}
    for clause in CLAUSE.split(text):
        for match in SIDE.finditer(clause):
            before, after = clause[: match.start()], clause[match.end() :]
            placed = first_of(after) if FOLLOWS.match(after) else named(before) or first_of(after)
            side = SIDES[match.group(1).lower()]
            sides[side] = sides.get(side, frozenset()) | placed
    return [Relation(kind, sides[kind, True], sides[kind, False], "side")
            for kind in ("left", "above") if sides.get((kind, True)) and sides.get((kind, False))]  # fmt: skip


def moved(prompt: str, revised: str) -> Iterator[str]:
    """What the rewrite says of another thing than the prompt, or no longer says of its thing."""
    asked, got = phrases(prompt), phrases(revised)
    counts = Counter(thing for phrase in asked if phrase.own for thing in phrase.things)
    every = {thing for thing, count in counts.items() if count == 1}  # "big" of two big things tells them not apart
    for word in dict.fromkeys(word for phrase in asked for word in phrase.said if word != "both"):
        of = [phrase.things & every for phrase in asked if word in phrase.said]
        now = [phrase.things for phrase in got if word in phrase.said]
        for things in now:
            if (here := things & every) and not any(here & mine for mine in of):
                yield f"the rewrite says {word!r} of {min(here)!r}, the prompt does not"
        bound = [phrase.things & every for phrase in asked if word in phrase.said and phrase.own]
        for mine in bound:
            if now and mine and not any(mine & things for things in now):
                yield f"the rewrite does not say {word!r} of {min(mine)!r}"


def turned(prompt: str, revised: str) -> Iterator[str]:
    """What stands the other way round, or no longer where the prompt puts it."""
    got = relations(revised)
    for asked in relations(prompt):
        first, second = asked.first - asked.second, asked.second - asked.first
        if not first or not second:
            continue
        same = [each for each in got if each.kind == asked.kind and (each.first | each.second) & (first | second)]
        if same and not any(each.first & first and each.second & second for each in same):
            yield f"the rewrite does not put {min(first)!r} and {min(second)!r} as {asked.words!r} does"
