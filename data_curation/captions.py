"""Caption rules: what alt texts are full of. Words, language, file names, filler, repetition, links and HTML.

Every rule has a score in the manifest, so `redecide` applies other thresholds without reading a caption again. Language is
told by script, and within Latin script by stop-words: short captions stay `und` and pass. Left out: a language model's
perplexity, spelling, captions that name brands or prices.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_curation.filter_config import CaptionsConfig, CaptionThresholds
from data_curation.manifest import KEEP, Row, drop, funnel, read_manifest, write_manifest

if TYPE_CHECKING:
    from infra.stages import StageContext

UNKNOWN = "und"
LATIN = "latin"
STOP_WORDS = {
    "en": "the and of with on is are his her this that from for by an at in to it its",
    "de": "der die das und mit auf ist sind ein eine einer einem einen im vom zum für von nicht auch",
    "fr": "le les et avec sur est sont un une des du dans pour par qui au aux ce cette à",
    "es": "el los las y con sobre es son un una unos del en para por que al este esta",
    "it": "il lo gli e con su è sono un una uno del della nel nella per che di al questo",
    "pt": "o os as e com sobre é são um uma do da dos das no na em para por ao",
    "nl": "de het en met op is zijn een van in voor door dat aan deze dit bij naar",
}
HOLDS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}
FILLERS = """
    image images img picture pictures photo photos photograph pic pics of untitled thumbnail thumb placeholder default
    alt text icon logo banner avatar screenshot download preview click here enlarge view larger full size stock free
    no description available may contain caption attachment file profile main featured hero header
"""
FILLER = frozenset(FILLERS.split())
WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
MARKUP = re.compile(r"https?://\S+|www\.\S+|<[a-z!/][^>]*>|&(?:[a-z]{2,8}|#\d{1,6});|\S+@\S+\.\w{2,}", re.IGNORECASE)
FILE_NAME = re.compile(
    r"\S+\.(?:jpe?g|png|gif|webp|avif|bmp|tiff?|heic|svg)"  # a name with its suffix
    r"|(?:img|image|dscn?|dscf|pxl|mvi|gopr|photo|pic|picture|screenshot|wp)[\W_]*\d[\d\W_]*"  # IMG_1234
    r"|[0-9a-f]{16,}|[\d\W_]+",  # a digest; digits and dashes
    re.IGNORECASE,
)
REASONS = (
    "caption_too_short", "caption_too_long", "caption_language", "caption_file_name", "caption_filler",
    "caption_repetitive", "caption_markup",
)  # fmt: skip
COLUMNS = (
    "caption_words", "caption_language", "caption_file_name", "caption_filler", "caption_repeated", "caption_markup",
)  # fmt: skip


def filter_captions(config: CaptionsConfig, ctx: StageContext) -> dict[str, Any]:
    """Score every caption that the quality stage saw, and drop rows whose caption breaks a rule.

    Rows that quality dropped get their caption's reasons too, so that none comes back unjudged.
    """
    rows = read_manifest(ctx.inputs["rows"])
    scored = [row for row in rows if row.get("blur") is not None]
    for row in scored:
        row.update(scores(row["caption_short"] or ""))
    wrong = failed({name: np.array([row[name] for row in scored]) for name in COLUMNS}, config)
    for row, fails in zip(scored, wrong, strict=True):
        if reasons := [REASONS[rule] for rule in np.flatnonzero(fails)]:
            drop(row, *reasons)
    write_manifest(rows, ctx.out)
    languages = Counter(row["caption_language"] for row in scored if row["decision"] == KEEP)
    return funnel(rows, len(rows)) | {"scored": len(scored), "languages": dict(languages.most_common(12))}


def scores(caption: str) -> Row:
    """All scores of one caption."""
    text = unicodedata.normalize("NFKC", caption).strip()
    words = WORD.findall(MARKUP.sub(" ", text).casefold())
    pairs = list(pairwise(words))
    return {
        "caption_words": len(words), "caption_language": language(text, words),
        "caption_file_name": int(bool(FILE_NAME.fullmatch(text))),
        "caption_filler": round(sum(word in FILLER for word in words) / len(words), 4) if words else 0.0,
        "caption_repeated": round(1 - len(set(pairs)) / len(pairs), 4) if pairs else 0.0,
        "caption_markup": len(MARKUP.findall(text)),
    }  # fmt: skip


def language(text: str, words: list[str]) -> str:
    """A language by its stop-words, a script that is not Latin by its Unicode name (cyrillic, cjk, ...), or und."""
    letters = Counter(unicodedata.name(letter, UNKNOWN).split()[0].lower() for letter in text if letter.isalpha())
    if not letters:
        return UNKNOWN
    script = letters.most_common(1)[0][0]
    if script != LATIN:
        return "hiragana" if script in ("cjk", "katakana") and letters["hiragana"] else script
    hits = {name: sum(word in stop for word in words) for name, stop in HOLDS.items()}
    best, second = sorted(hits.values(), reverse=True)[:2]
    return max(hits, key=lambda name: hits[name]) if best > second else UNKNOWN


def failed(columns: Mapping[str, NDArray[Any]], config: CaptionThresholds) -> NDArray[np.bool_]:
    """Which rule each caption breaks, [rows, rules]; captions without scores break none."""
    words, file_name, filler, repeated, markup = (
        columns[name].astype(np.float32) for name in COLUMNS if name != "caption_language"
    )
    spoken = columns["caption_language"].astype(str)
    foreign = ~np.isin(spoken, [*config.languages, UNKNOWN, "None"]) & bool(config.languages)
    return np.stack([
        words < config.min_words, words > config.max_words, foreign, file_name > 0,
        filler > np.float32(config.max_filler), repeated > np.float32(config.max_repeated), markup > config.max_markup,
    ], axis=1)  # fmt: skip
