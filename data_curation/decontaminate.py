"""Decontamination: rows that show an evaluation picture, or say an evaluation prompt, leave with reason in_evaluation.

Pictures are compared as one night is with the nights before (`known.py`). Captions are compared by n-grams of words, as
in GPT-3 (arXiv 2005.14165, appendix C), after Unicode, case and punctuation are made one: the score of a caption is the
largest share of a prompt's n-grams that it holds. Left out: paraphrases, translations.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_curation.decode import inspect, open_picture
from data_curation.dedup import sketch_shard
from data_curation.filter_config import DecontaminateConfig, DedupConfig, EvaluationPictures, PromptList
from data_curation.hashing import phash
from data_curation.known import SCHEMA, drop_known_bytes, drop_known_copies, hash_name, read_known
from data_curation.layouts import look
from data_curation.manifest import KEEP, MANIFEST, Row, drop, funnel, read_manifest, shards, write_manifest
from data_curation.own_data import fingerprint
from data_curation.picture_files import samples
from data_curation.registration import thumbnail
from data_curation.scenes import all_scenes, long_caption, short_caption
from data_curation.url_lists import read_list
from infra.errors import ConfigError, DataRefused

if TYPE_CHECKING:
    from infra.stages import StageContext

REASON = "in_evaluation"
MOST_PIXELS = 100_000_000  # of an evaluation picture
WORD = re.compile(r"\w+")
Words = tuple[str, ...]


def decontaminate(config: DecontaminateConfig, ctx: StageContext) -> dict[str, Any]:
    """Drop kept rows that evaluation pictures or prompts contain."""
    if not (config.pictures or config.prompts or config.held_out_scenes):
        raise ConfigError("data.decontaminate has no pictures, prompts or held_out_scenes to compare with; give one")
    rows = read_manifest(ctx.inputs["rows"])
    facts: dict[str, Any] = {}
    if config.pictures:
        known = pa.concat_tables([evaluation_pictures(one, config.copies) for one in config.pictures])
        kept = {row["row_id"]: row for row in rows if row["decision"] == KEEP}
        drop_known_bytes(list(kept.values()), known, REASON)
        items = [(path, set(kept), config.copies.hash_size) for path in shards(ctx.inputs["images"])]
        thumbnails = {}
        for row_id, value, small in (found for part in ctx.fan_out(sketch_shard, items) for found in part):
            kept[row_id]["phash"], thumbnails[row_id] = value.tobytes().hex(), small
        left = [row for row in kept.values() if row["decision"] == KEEP]
        drop_known_copies(left, thumbnails, known, config.copies, REASON)
        facts["evaluation_pictures"] = len(known)
        facts["pictures_in_evaluation"] = sum(row["decision"] != KEEP for row in kept.values())
    if config.prompts or config.held_out_scenes:
        facts |= _drop_said([row for row in rows if row["decision"] == KEEP], config)
    write_manifest(rows, ctx.out)
    return funnel(rows, len(rows)) | facts


# --- prompts ---


def _drop_said(rows: list[Row], config: DecontaminateConfig) -> dict[str, int]:
    texts = [text for one in config.prompts for text in _prompts(one)]
    if config.held_out_scenes:
        held_out = [scene for scene in all_scenes("full") if scene.held_out]
        texts += [short_caption(scene) for scene in held_out]
        texts += [long_caption(scene, wording) for scene in held_out for wording in range(4)]
    index = PromptIndex(texts, config.ngram)
    dropped = 0
    for row in rows:
        overlap, match = max(index.overlap(row[name] or "") for name in ("caption_short", "caption_long"))
        row["eval_overlap"], row["eval_match"], row["eval_threshold"] = round(overlap, 4), match, config.max_overlap
        if row["eval_overlap"] >= config.max_overlap:
            drop(row, REASON)
            dropped += 1
    return {"evaluation_prompts": len(index.prompts), "captions_in_evaluation": dropped}


def _prompts(source: PromptList) -> list[str]:
    path = Path(source.path).expanduser()
    if not path.exists():
        raise ConfigError(f"data.decontaminate.prompts: {path} does not exist; give a file of prompts")
    table = read_list(path, source.column)
    if source.column not in table.column_names:
        raise ConfigError(f"{path} has no column {source.column!r}, only {table.column_names}; set column")
    return [str(text) for text in table[source.column].to_pylist() if text]


def words_of(text: str) -> Words:
    """Words of a text, one spelling each: Unicode composed and folded, no case, no punctuation."""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class PromptIndex:
    """Prompts by their n-grams."""

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        self.prompts = {words: text for text in texts if (words := words_of(text))}
        self._grams = {words: _grams(words, min(ngram, len(words))) for words in self.prompts}
        self._holders: dict[Words, list[Words]] = {}
        for words, grams in self._grams.items():
            for gram in grams:
                self._holders.setdefault(gram, []).append(words)
        self._lengths = sorted({len(gram) for gram in self._holders})

    def overlap(self, caption: str) -> tuple[float, str | None]:
        """Largest share of a prompt's n-grams in the caption, and that prompt."""
        words = words_of(caption)
        held = {gram for length in self._lengths for gram in _grams(words, length)}
        counts = Counter(prompt for gram in held for prompt in self._holders.get(gram, ()))
        found = [(count / len(self._grams[prompt]), self.prompts[prompt]) for prompt, count in counts.items()]
        return max(found, default=(0.0, ""))


def _grams(words: Words, length: int) -> frozenset[Words]:
    return frozenset(words[i : i + length] for i in range(len(words) - length + 1))


# --- pictures ---


def evaluation_pictures(source: EvaluationPictures, config: DedupConfig) -> pa.Table:
    """Signatures of a folder's pictures, or of the kept rows of a manifest."""
    place = Path(source.path).expanduser()
    if source.fingerprint not in (None, fingerprint(source.path)):
        raise DataRefused(f"evaluation pictures {place} changed since the run was planned; start a new run")
    if (place / MANIFEST).exists():
        return read_known(place, str(place))
    found = look(source.path)
    if "layout" not in found.settings:
        raise ConfigError(f"data.decontaminate.pictures: {found.says}; give a folder of pictures or of a manifest")
    return pa.Table.from_pylist(list(_signatures(place, found.settings["layout"], config)), schema=SCHEMA)


def _signatures(place: Path, layout: str, config: DedupConfig) -> Iterable[dict[str, Any]]:
    for sample in samples(place, layout):
        found = inspect(sample.body or b"", MOST_PIXELS)
        if found.image is None or found.width is None or found.height is None:
            raise DataRefused(
                f"evaluation picture {sample.url} in {place} is no picture to compare with: {found.reason}; repair it or "
                "take it out"
            )
        yield {
            "row_id": sample.url, "origin": str(place), "sha256_raw": found.sha256, "hash": hash_name(config),
            "phash": phash(found.image, config.hash_size).tobytes().hex(), "aspect": found.width / found.height,
            "thumbnail": thumbnail(open_picture(found.image)).tobytes(),
        }  # fmt: skip
