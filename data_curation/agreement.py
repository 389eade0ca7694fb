"""Does a caption fit its picture? A probe learnt on the rows themselves and cross-fitted; no pretrained judge needed.

Ridge regression on random features (Rahimi and Recht 2007) of a small thumbnail predicts which word stems the caption
has; each row is predicted by a fit that has not seen it. `gap` is how much worse its own caption fits the prediction
than the best caption of the whole set. Left out: word order, and data where words say little about pixels - there the
probe explains little variance and the caller must not use it.

Shapes: N rows, F features, S stems, C distinct captions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 20
NUM_RANDOM = 1024
RIDGE = 30.0
FOLDS = 4
STEM = 4  # letters; "apples" and "apple" are one thing
MIN_STEM_SHARE = 1e-3
MAX_CAPTIONS = 4_000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """Per row the gap of its own caption; over all rows the share of the stems' variance that pictures explain."""

    gap: Floats
    explained: float


def probe_thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    """What the probe sees, [20, 20, 3]; stretched, so that places keep their share of the picture."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.HAMMING))


def stems(caption: str) -> frozenset[str]:
    """The caption as a set of word stems."""
    return frozenset(word[:STEM] for word in re.findall(r"\w+", caption.lower()))


def caption_fit(thumbnails: NDArray[np.uint8], captions: Sequence[str], seed: int = 0) -> Fit:
    """How well each caption fits its picture, among all captions of the set."""
    words = _stem_matrix(captions)
    rng = np.random.default_rng(seed)
    features = _features(thumbnails, rng)
    predicted = _cross_fit(features, words, rng.integers(FOLDS, size=len(words)))
    left = ((words - predicted) ** 2).mean(axis=0)
    total = np.maximum(words.var(axis=0), 1e-9)
    share = np.clip(1 - left / total, 0, 1)
    weight = share**2 / (left + 0.01)  # a stem counts by how well pictures foretell it
    pool = np.unique(words, axis=0)
    if len(pool) > MAX_CAPTIONS:
        pool = pool[np.sort(rng.choice(len(pool), MAX_CAPTIONS, replace=False))]
    own = ((predicted - words) ** 2 * weight).sum(axis=1)
    best = np.full(len(words), np.inf)
    for start in range(0, len(words), 1_000):
        part = predicted[start : start + 1_000]
        fits = (part**2 * weight).sum(axis=1)[:, None] - 2 * (part * weight) @ pool.T + (pool**2 * weight).sum(axis=1)
        best[start : start + 1_000] = fits.min(axis=1)
    return Fit(np.maximum(own - best, 0), float((share * total).sum() / total.sum()))


def _stem_matrix(captions: Sequence[str]) -> Floats:
    sets = [stems(caption) for caption in captions]
    column = {stem: i for i, stem in enumerate(sorted(frozenset().union(*sets)))}
    matrix = np.zeros((len(sets), len(column)))
    for row, found in enumerate(sets):
        matrix[row, [column[stem] for stem in found]] = 1
    share = matrix.mean(axis=0)
    return matrix[:, (share >= MIN_STEM_SHARE) & (share <= 1 - MIN_STEM_SHARE)]


def _features(thumbnails: NDArray[np.uint8], rng: np.random.Generator) -> Floats:
    pixels = thumbnails.reshape(len(thumbnails), -1) / 128.0 - 1
    pixels = (pixels - pixels.mean(axis=0)) / max(float(pixels.std()), 1e-3)
    weights = rng.normal(size=(pixels.shape[1], NUM_RANDOM)) / np.sqrt(pixels.shape[1])
    random = np.maximum(pixels @ weights + 0.5 * rng.normal(size=NUM_RANDOM), 0)
    return np.concatenate([pixels, random, np.ones((len(pixels), 1))], axis=1)


def _cross_fit(features: Floats, words: Floats, fold: NDArray[np.int64]) -> Floats:
    parts = [(features[fold == k], words[fold == k]) for k in range(FOLDS)]
    grams = [x.T @ x for x, _ in parts]
    crosses = [x.T @ y for x, y in parts]
    predicted = np.zeros_like(words)
    for k, (x, _) in enumerate(parts):
        gram = sum(grams) - grams[k] + RIDGE * np.eye(len(grams[k]))
        predicted[fold == k] = x @ np.linalg.solve(gram, sum(crosses) - crosses[k])
    return predicted
