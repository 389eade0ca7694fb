"""Vendi score (Friedman & Dieng 2022, arXiv:2210.02410): the effective number of different pictures in a set.

exp of the entropy of the eigenvalues of K / n, K the cosine similarities: 1 for copies, n for orthogonal features.
"""

from __future__ import annotations

import numpy as np


def vendi_score(features: np.ndarray) -> float:
    """Between 1 and N for features [N, D]."""
    if len(features) < 1:
        raise ValueError("the Vendi score of no pictures is undefined; score at least one")
    unit = features.astype(np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    small = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same eigenvalues but for zeros
    shares = np.linalg.eigvalsh(small / len(unit))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))
