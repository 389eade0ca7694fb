"""Prompts to text features, family by family, as each stock pipeline does it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from models.device import compute_device
from models.networks import text_encoder
from models.networks.sd3 import packed

log = logging.getLogger(__name__)

Features = tuple[torch.Tensor, torch.Tensor]  # tokens [B, T, D] float32, mask [B, T] bool, both on the CPU
Towers = dict[str, tuple[Any, Any]]  # text encoder and tokenizer by the encoder's name in the stock pipeline


class Encode(Protocol):
    """A family's text encoders."""

    @property
    def longest(self) -> int:
        """Tokens of a prompt beyond which it is cut."""

    def __call__(self, prompts: Sequence[str]) -> Features:
        """Features and mask of prompts."""

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, the tokenizer's own marks included."""


def warn_of_cut(prompts: Sequence[str], encode: Encode) -> int:
    """How many prompts are longer than the text encoder reads; one warning for all of them, which names the longest."""
    counts = {prompt: encode.count(prompt) for prompt in dict.fromkeys(prompts)}
    over = {prompt: count for prompt, count in counts.items() if count > encode.longest}
    if over:
        worst = max(over, key=over.__getitem__)
        log.warning(
            "%d of %d prompts are cut: %r has %d tokens, the text encoder reads %d; shorten them, or raise prompt_max_tokens "
            "where the model is trained", len(over), len(counts), worst, over[worst], encode.longest,
        )  # fmt: skip
    return len(over)


class TrainableText(Encode, Protocol):
    """Text encoders that can be tuned: they answer with gradients and show what they are made of."""

    @property
    def towers(self) -> Towers:
        """Encoders and tokenizers."""

    def features(self, prompts: Sequence[str]) -> Features:
        """As the call, with gradients."""


class PackagedText:
    """The packaged MiniLM under PRXPixelPipeline's light cleaning."""

    def __init__(self, max_tokens: int) -> None:
        self.longest = max_tokens

    def __call__(self, prompts: Sequence[str]) -> Features:
        """Features and mask of prompts."""
        return text_encoder.encode(prompts, self.longest)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut."""
        return text_encoder.count_tokens(prompt)


class PrxText:
    """The text encoder of a PRX folder, or the packaged one, under PRXPipeline's full cleaning."""

    def __init__(self, folder: Path, max_tokens: int, clean: bool) -> None:
        from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

        cleaner = TextPreprocessor()
        self.clean = cleaner.clean_text if clean else cleaner.basic_clean
        self.longest = max_tokens
        self.model, self.tokenizer = prx_text_modules(folder)

    @property
    def towers(self) -> Towers:
        """The encoder and its tokenizer by the pipeline's name."""
        return {"text_encoder": (self.model, self.tokenizer)}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Features:
        """Features and mask of prompts."""
        return self.features(prompts)

    def features(self, prompts: Sequence[str]) -> Features:
        """As the call, with gradients; padded as the pipeline pads, no masked token changes another."""
        batch = self.tokenizer(
            [self.clean(prompt) for prompt in prompts], padding=True, max_length=self.longest, truncation=True,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        ids, mask = batch["input_ids"], batch["attention_mask"]
        device = compute_device()
        read = self.model.to(device)(input_ids=ids.to(device), attention_mask=mask.to(device))
        states = read.last_hidden_state.cpu()
        missing = self.longest - ids.shape[1]
        return F.pad(states.float(), (0, 0, 0, missing)), F.pad(mask.bool(), (0, missing))

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut."""
        return len(self.tokenizer(self.clean(prompt))["input_ids"])


def prx_text_modules(folder: Path) -> tuple[Any, Any]:
    """Encoder and tokenizer in a folder, else the packaged ones."""
    if not (folder / "text_encoder").is_dir():
        return text_encoder.load()
    import transformers
    from transformers import AutoTokenizer

    from models.networks.diffusers_folder import class_of, refuse_pickles

    refuse_pickles(folder / "text_encoder")
    cls = getattr(transformers, class_of(folder / "text_encoder"))
    model = cls.from_pretrained(folder / "text_encoder", local_files_only=True, use_safetensors=True)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(
        folder / "tokenizer", local_files_only=True
    )


class Sd3Text:
    """Two CLIPs and a T5 (or none: zeros), packed; every token counts, as in StableDiffusion3Pipeline."""

    def __init__(self, folder: Path, max_tokens: int, text_dim: int) -> None:
        self.max_tokens, self.text_dim = max_tokens, text_dim
        self.pipeline = sd3_pipeline(folder, transformer=None, vae=None, scheduler=None)
        t5 = self.pipeline.text_encoder_3 is not None  # reads a prompt whole that the CLIPs cut
        self.tokenizer: Any = self.pipeline.tokenizer_3 if t5 else self.pipeline.tokenizer
        self.longest = max_tokens if t5 else int(self.pipeline.tokenizer_max_length)

    @property
    def towers(self) -> Towers:
        """Every encoder there is and its tokenizer by the pipeline's names."""
        found = {f"text_encoder{end}": (getattr(self.pipeline, f"text_encoder{end}"), getattr(self.pipeline, f"tokenizer{end}"))
                 for end in ("", "_2", "_3")}  # fmt: skip
        return {name: pair for name, pair in found.items() if pair[0] is not None}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Features:
        """Packed features of prompts and a mask that is all True."""
        return self.features(prompts)

    def features(self, prompts: Sequence[str]) -> Features:
        """As the call, with gradients."""
        pipe, asked = self.pipeline.to(compute_device()), list(prompts)
        parts = [pipe._get_clip_prompt_embeds(asked, clip_model_index=i) for i in (0, 1)]
        clip = torch.cat([tokens for tokens, _ in parts], -1)
        clip = F.pad(clip, (0, self.text_dim - clip.shape[-1]))
        if pipe.text_encoder_3 is None:
            t5 = clip.new_zeros(len(asked), self.max_tokens, self.text_dim)
        else:
            t5 = pipe._get_t5_prompt_embeds(asked, max_sequence_length=self.max_tokens)
        tokens = packed(torch.cat([clip, t5], 1), torch.cat([pooled for _, pooled in parts], -1)).float().cpu()
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut."""
        return len(self.tokenizer(prompt)["input_ids"])


def sd3_text_parts(folder: Path, num_rows: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Which entries of packed features [num_rows, dim] come from each text encoder of a folder: bool, two CLIPs, T5."""
    told = [json.loads((folder / name / "config.json").read_text()) for name in ("text_encoder", "text_encoder_2")]
    clip_tokens = int(json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"])
    pooled = [int(each["projection_dim"]) for each in told]
    owner = torch.full((num_rows, dim), -1)
    rows, column = -(-sum(pooled) // dim), 0
    owner[:rows].view(-1)[: sum(pooled)] = torch.arange(2).repeat_interleave(torch.tensor(pooled))
    for number, each in enumerate(told):
        owner[rows : rows + clip_tokens, column : column + int(each["hidden_size"])] = number
        column += int(each["hidden_size"])
    if (folder / "text_encoder_3").is_dir():
        owner[rows + clip_tokens :] = 2
    return tuple(owner == number for number in range(int(owner.max()) + 1))


def sd3_pipeline(folder: Path, transformer: Any, vae: Any, scheduler: Any) -> Any:
    """The stock pipeline around the text encoders and tokenizers of a folder, safetensors only."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
    from transformers.utils import logging

    from models.networks.diffusers_folder import refuse_pickles

    logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # cut prompts and a missing T5 are not worth a line a batch
    classes = {
        "text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel, "tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5TokenizerFast,
    }  # fmt: skip
    parts: dict[str, Any] = dict.fromkeys(classes)
    for name, cls in classes.items():
        if not (folder / name).is_dir():
            continue
        if name.startswith("tokenizer"):
            parts[name] = cls.from_pretrained(folder / name, local_files_only=True)
            continue
        refuse_pickles(folder / name)
        model = cls.from_pretrained(folder / name, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        parts[name] = model.eval().requires_grad_(False)
    return StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
