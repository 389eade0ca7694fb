"""What may be learnt of the text encoders: rows of their tables for a new word, a LoRA on their layers, or both.

Textual inversion (Gal et al. 2022, arXiv:2208.01618, eq. 2) learns nothing but the embedding v* of a word that the tokenizer did
not know, v* = argmin E |error|^2, through frozen encoder and denoiser. Pivotal tuning (Roich et al. 2021, arXiv:2106.05744; with
LoRA as diffusers' advanced DreamBooth script and cog-sdxl do it) goes on from there with the denoiser. As in that script rows are
pulled to the spread of the table after every step, by the power .1 of the ratio. The new row lies behind the frozen table (peft's
TrainableTokens copies the whole table in every step). Left out: DoRA and products on text encoders.

N: words of the tokenizer; K: new ones; D: width of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import AddedToken

from infra.errors import ConfigError
from models.networks.prx import forget_paths
from models.networks.text_features import Features, TrainableText
from models.personalization import lora_files
from models.personalization.config import TextTuningConfig
from models.personalization.lora import check_targets, peft_settings
from models.personalization.lora_files import Adapter

PULL = 0.1  # of the ratio of spreads, each step
ADAPTED = ("text_encoder", "text_encoder_2")  # where stock diffusers loads a LoRA


class Extended(nn.Module):
    """A frozen table of embeddings, N of them in use, and trainable rows [K, D] behind those."""

    def __init__(self, table: nn.Embedding, used: int, rows: torch.Tensor) -> None:
        super().__init__()
        self.table, self.used, self.rows = table, used, nn.Parameter(rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., D] of ids below N + K."""
        own = self.rows[(ids - self.used).clamp_min(0)]
        return torch.where((ids >= self.used).unsqueeze(-1), own, self.table(ids.clamp_max(self.used - 1)))

    def whole(self) -> nn.Embedding:
        """One stock table; the rows take places that the tokenizer does not use (T5 has some) before it grows."""
        old = self.table.weight
        weight = torch.cat([old[: self.used], self.rows, old[self.used + len(self.rows) :]]).detach()
        table: nn.Embedding = nn.Embedding.from_pretrained(weight, padding_idx=self.table.padding_idx)
        return table


class TextTuning:
    """Text encoders with what is learnt of them; nothing changes as long as nothing was trained.

    `words` stand for the rows; each must be new to every tokenizer. Row k starts as the mean of the embeddings of `like`.
    """

    def __init__(
        self, text: TrainableText, config: TextTuningConfig, words: Sequence[str], like: str, seed: int
    ) -> None:
        self.text, self.config, self.words = text, config, tuple(words)
        self.tables: dict[str, Extended] = {}
        for name, (encoder, tokenizer) in text.towers.items():
            encoder.requires_grad_(False)
            if config.lora is not None and name in ADAPTED:
                adapt(encoder, name, config, seed)
            if words:  # after peft, which freezes all that is not its own
                self.tables[name] = extend(encoder, tokenizer, words, like)
        self.spread = {name: float(each.table.weight.std()) for name, each in self.tables.items()}

    @property
    def encoders(self) -> dict[str, Any]:
        """Every text encoder by its name in the pipeline."""
        return {name: encoder for name, (encoder, _) in self.text.towers.items()}

    @property
    def players(self) -> dict[str, nn.Module]:
        """What is trained: `token` are the rows, `text_encoder` the LoRA of all encoders."""
        found: dict[str, nn.Module] = {}
        if self.tables:
            found["token"] = nn.ParameterDict({name: each.rows for name, each in self.tables.items()})
        if self.config.lora is not None:
            found["text_encoder"] = nn.ParameterDict({
                f"{name}/{path.replace('.', '/')}": parameter
                for name, encoder in self.encoders.items()
                for path, parameter in encoder.named_parameters() if ".lora_" in path
            })  # fmt: skip
        return found

    def __call__(self, prompts: Sequence[str]) -> Features:
        """Features and mask of prompts as they are now, with gradients."""
        return self.text.features(prompts)

    @torch.no_grad()
    def pull(self) -> None:
        """Bring the spread of the rows nearer to the table's."""
        for name, each in self.tables.items():
            each.rows.mul_((self.spread[name] / each.rows.std()) ** PULL)

    def rows(self) -> dict[str, torch.Tensor]:
        """Copies of the rows [K, D] by encoder, in main memory."""
        return {name: each.rows.detach().cpu().clone() for name, each in self.tables.items()}

    def adapters(self) -> dict[str, Adapter]:
        """LoRA by encoder; empty without one."""
        adapted = {name: each for name, each in self.encoders.items() if lora_files.is_adapted(each)}
        return {name: lora_files.from_module(encoder, {}) for name, encoder in adapted.items()}

    def save(self, folder: Path) -> None:
        """Write encoders and tokenizers as stock folders, the rows in their tables and the LoRA merged."""
        for name, (encoder, tokenizer) in self.text.towers.items():
            stock(encoder).cpu().save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name.replace("encoder", "tokenizer").removeprefix("text_"))
        forget_paths(folder)


def extend(encoder: Any, tokenizer: Any, words: Sequence[str], like: str) -> Extended:
    """Teach a tokenizer the words and put their rows behind the encoder's table."""
    known = [word for word in words if word in tokenizer.get_vocab()]
    if known:
        raise ConfigError(
            f"token {known[0]!r} is a word the tokenizer has already; give a new word, or set text.vectors to 0 to use it"
        )
    table, used = encoder.get_input_embeddings(), len(tokenizer)
    ids = tokenizer(like, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"{like!r} has no token to start the rows of {words[0]!r} from; set text.initial to a word")
    row = table.weight[ids].detach().mean(0)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    extended = Extended(table, used, row.expand(len(words), -1).clone())
    encoder.set_input_embeddings(extended)
    return extended


def adapt(encoder: Any, name: str, config: TextTuningConfig, seed: int) -> None:
    """Put a fresh LoRA on an encoder's layers."""
    assert config.lora is not None
    try:
        check_targets(encoder, config.lora)
    except ValueError as wrong:
        raise ConfigError(f"text.{wrong} (of {name})") from wrong
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft_settings(config.lora), encoder)


def stock(encoder: Any) -> Any:
    """A copy of an encoder without anything of ours: LoRA merged, one table."""
    clone = copy.deepcopy(encoder)
    for path, layer in list(clone.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            clone.set_submodule(path, layer.get_base_layer())
    if isinstance(table := clone.get_input_embeddings(), Extended):
        clone.set_input_embeddings(table.whole())
        clone.config.vocab_size = clone.get_input_embeddings().num_embeddings
    if hasattr(clone, "peft_config"):
        del clone.peft_config
    return clone


def words_of_token(token: str, count: int) -> tuple[str, ...]:
    """The words of a token of several rows, as diffusers' `load_textual_inversion` names them."""
    return (token, *(f"{token}_{number}" for number in range(1, count)))


def save_rows(folder: Path, words: Sequence[str], rows: Mapping[str, torch.Tensor]) -> None:
    """learned_embeds.safetensors for every encoder: one tensor [K, D] under the first word, as diffusers loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in rows.items():
        path = folder / lora_files.ROWS_FILE.replace(".", f"{name.removeprefix('text_encoder')}.", 1)
        path.write_bytes(lora_files.to_bytes({words[0]: each}, {"format": "pt"}))


def tunes_text(folder: Path) -> bool:
    """Whether the adapter in a folder is nothing without its checkpoint's text encoders."""
    file = folder / lora_files.DIFFUSERS_FILE
    if (folder / lora_files.ROWS_FILE).exists() or not file.exists():
        return (folder / lora_files.ROWS_FILE).exists()
    with safe_open(file, framework="pt") as opened:
        return any(key.startswith("text_encoder") for key in opened.keys())  # noqa: SIM118, not a dict
