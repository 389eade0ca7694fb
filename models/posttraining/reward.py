"""Rewards as numbers per picture. The demo's reward is the colour judge's log-likelihood of the asked scene; the shape
judge has no part in it and stays the held-out judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from models.evaluation.judge import PAIRS, Judge, SceneLike


@torch.inference_mode()
def judge_reward(judge: Judge, images: np.ndarray, scenes: Sequence[SceneLike]) -> np.ndarray:
    """float32 [N], at most 0: mean log-probability of layout, object(s), background and of not being refused."""
    truth = judge.vocabulary.labels(scenes)
    colour, _ = judge.logits(images)
    terms = {
        head: -F.cross_entropy(colour[head], truth[head].clamp_min(0), reduction="none")
        for head in ("layout", "object_1", "object_2", "background")
    }
    double = torch.tensor([scene.layout in PAIRS for scene in scenes])
    terms["object_2"] = torch.where(double, terms["object_2"], torch.zeros_like(terms["object_2"]))
    accepted = F.logsigmoid(-colour["reject"][:, 0])
    total = torch.stack([*terms.values(), accepted]).sum(0) / (4 + double.float())
    return total.clamp_min(-10).numpy()
