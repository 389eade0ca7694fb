# ruff: noqa: SIM905, RUF001 (word lists; typographic quotes are meant)
"""Words that a rewritten prompt must keep or may not invent, found by code: numbers, colours, negations, quotes, names.

English lists; what is in no list is protected by its form (quotes, digits, capitals, other scripts, emoji) or because
the captions never used it. Left out: a tagger, plural rules beyond -s and -es, other languages' colours and numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen pair couple "
    "both single double triple half".split()
)
COLOURS = frozenset(
    "red orange yellow green blue purple violet indigo pink brown black white gray grey cyan magenta turquoise teal "
    "maroon navy olive lime gold golden silver bronze beige ivory cream crimson scarlet lavender lilac coral salmon "
    "khaki amber ochre mauve".split()
)
NEGATIONS = frozenset("no not never without none nothing neither nor nobody nowhere cannot except excluding".split())
FUNCTION = frozenset(
    "a an the this that these those of in on at to with and or is are be there it its by for from as into onto over "
    "which where while behind everything lies shown seen very".split()
)
FRAMES = ("a picture of", "an image of", "a drawing of", "a photo of", "draw", "show me")  # what people write around it
LANGUAGES = {
    "en": frozenset("the a an of and with in on is are to at by from".split()),
    "de": frozenset("der die das ein eine einen einem und mit auf im ist sind von zu auch über unter vor".split()),
    "fr": frozenset("le la les un une des et avec sur dans est sont du au aux par sous devant".split()),
    "es": frozenset("el la los las un una unos y con sobre en es son del al por bajo delante".split()),
    "it": frozenset("il lo la gli un uno una e con su nel è sono del della per sotto davanti".split()),
    "pt": frozenset("o a os as um uma e com sobre em é são do da por sob diante".split()),
    "nl": frozenset("de het een en met op in is zijn van naar voor onder over".split()),
}

WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
QUOTED = re.compile(r'"[^"]+"|“[^”]+”|«[^»]+»|「[^」]+」|(?<!\w)\'[^\']+\'(?!\w)|‘[^’]+’')
TAGGED = re.compile(r"<[^<>\s]+>|\S*\d\S*")  # <token>, and whatever holds a digit
SYMBOL = re.compile(r"[\u2600-\u27BF\U0001F000-\U0001FAFF]\uFE0F?")
CLAUSE_END = frozenset("and or but with on in at".split())
NEGATED_WORDS = 3


def words(text: str) -> list[str]:
    """The words as written, without punctuation."""
    return WORD.findall(text)


def unframed(prompt: str) -> str:
    """The prompt without "a picture of" and the like before it."""
    low = prompt.lower()
    frame = next((frame for frame in FRAMES if low.startswith(f"{frame} ")), "")
    return prompt[len(frame) :].strip()


def stem(word: str) -> str:
    """Lower case without a plural ending, so that "cat" is found in "cats"."""
    low = word.lower()
    for ending in ("es", "s"):
        if low.endswith(ending) and len(low) - len(ending) >= 3:
            return low[: -len(ending)].removesuffix("e")
    return low.removesuffix("e") if len(low) > 3 else low


def of_kind(text: str, kind: Collection[str]) -> set[str]:
    """Words of a list that the text holds, lower case."""
    return {word.lower() for word in words(text)} & set(kind)


def digits(text: str) -> set[str]:
    """Everything that holds a digit, as written, without punctuation at its ends."""
    found = {part.strip(".,;:!?()[]\"'“”") for part in text.split()}
    return {part for part in found if any(c.isdigit() for c in part)}


def negated(text: str) -> list[str]:
    """Each negation with the words it denies, as written: "without a red hat"."""
    found = []
    for match in WORD.finditer(text):
        word = match.group().lower()
        if word not in NEGATIONS and not word.endswith(("n't", "n’t")):
            continue
        end, taken = match.end(), 0
        for following in WORD.finditer(text, match.end()):
            gap = text[end : following.start()]
            if gap.strip() or following.group().lower() in CLAUSE_END or taken >= NEGATED_WORDS:
                break
            end = following.end()
            taken += following.group().lower() not in FUNCTION
        found.append(text[match.start() : end])
    return found


def scripts(text: str) -> set[str]:
    """Writing systems of the letters: LATIN, CYRILLIC, CJK, ..."""
    return {unicodedata.name(c, "?").split()[0].split("-")[0] for c in text if c.isalpha()}


def language(text: str) -> str | None:
    """The Latin-script language whose small words occur most; None where none leads."""
    low = [word.lower() for word in words(text)]
    hits = sorted(((sum(word in small for word in low), name) for name, small in LANGUAGES.items()), reverse=True)
    return hits[0][1] if hits[0][0] > hits[1][0] else None


def rare(text: str, known: Collection[str] | None, triggers: Iterable[str] = ()) -> list[str]:
    """Spans that must come back exactly as written: triggers, quotes, tags, digits, symbols, names, unknown words.

    `known` are the lower-case words of the captions; None (a model that read everything): then names are words with
    capitals after the first place and words of another script than Latin.
    """
    taken: list[tuple[int, int]] = []

    def take(found: Iterable[tuple[int, int]]) -> None:
        taken.extend(s for s in found if all(s[1] <= a or s[0] >= b for a, b in taken))

    for trigger in triggers:
        take(m.span() for m in re.finditer(rf"(?<!\w){re.escape(trigger)}(?!\w)", text))
    for pattern in (QUOTED, TAGGED, SYMBOL):
        take(m.span() for m in pattern.finditer(text))
    for match in WORD.finditer(text):
        word, low = match.group(), match.group().lower()
        if low in NUMBERS | COLOURS | NEGATIONS | FUNCTION or low.endswith(("n't", "n’t")):
            continue
        unknown = low not in known if known is not None else _is_name(word, match.start(), text[match.end() :])
        if unknown:
            take([match.span()])
    return [text[a:b] for a, b in sorted(taken)]


def _is_name(word: str, start: int, rest: str) -> bool:
    inner_capital = any(c.isupper() for c in word[1:])
    begins_name = word[0].isupper() and (start > 0 or rest[1:2].isupper())  # "Ada Lovelace", but not "Cat on a mat"
    return inner_capital or begins_name or bool(scripts(word) - {"LATIN"})
