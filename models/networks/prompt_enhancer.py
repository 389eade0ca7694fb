"""The two language models that rewrite prompts: a small one trained on the run's captions, and any instruct model.

Small: a stock Llama of a million weights with a byte-level BPE of the run's own captions; the folder loads with
AutoModelForCausalLM and AutoTokenizer anywhere. What the captions never said goes through it as a slot, a token that
stands for the words as written, and is put back afterwards: it can place "eels robot" without ever having read it.
Sequence: prompt, <to>, rewrite, <end>.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

SLOTS = tuple(f"<slot{i}>" for i in range(4))
TO, END, PAD = "<to>", "<end>", "<pad>"
SPECIAL = [PAD, END, TO, *SLOTS]
IGNORED = -100  # label of what is not predicted


def train_tokenizer(captions: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, the captions' words are one token each. No randomness."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def build(vocabulary: int, width: int, depth: int, heads: int, seed: int) -> LlamaForCausalLM:
    """A fresh small model."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
        num_attention_heads=heads, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD), eos_token_id=SPECIAL.index(END), bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def example(tokenizer: PreTrainedTokenizerFast, prompt: str, rewrite: str) -> tuple[list[int], list[int]]:
    """Token ids of one pair, and labels that leave the prompt out."""
    asked = [*tokenizer.encode(prompt, add_special_tokens=False), SPECIAL.index(TO)]
    said = [*tokenizer.encode(rewrite, add_special_tokens=False), SPECIAL.index(END)]
    return asked + said, [IGNORED] * len(asked) + said


def padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """int64 [B, T] of rows of different lengths."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


class CaptionModel:
    """The trained small model: prompt in, the likeliest rewrite out."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.inference_mode()
    def complete(self, prompt: str, max_new_tokens: int) -> str | None:
        """The greedy rewrite; None when it did not end in time."""
        asked = [*self.tokenizer.encode(prompt, add_special_tokens=False), SPECIAL.index(TO)]
        ids = torch.tensor([asked])
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )[0, len(asked) :].tolist()
        if SPECIAL.index(END) not in out:
            return None
        text: str = self.tokenizer.decode(out[: out.index(SPECIAL.index(END))], skip_special_tokens=False)
        return " ".join(text.split())

    def save(self, folder: Path) -> None:
        """A stock transformers folder."""
        transformers_logging.disable_progress_bar()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> CaptionModel:
        """Read what `save` wrote; nothing is downloaded."""
        transformers_logging.disable_progress_bar()
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
        return cls(model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))


class InstructModel:
    """Any chat model of a local folder or the hub cache, on the best device there is, at temperature 0."""

    def __init__(self, name: str, seconds: float) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype="auto")
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.seconds = seconds

    @torch.inference_mode()
    def answer(self, system: str, prompt: str, max_new_tokens: int) -> tuple[str, bool]:
        """The model's answer to one message, cut after `seconds`; and whether it came to its end."""
        turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        asked = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        out = self.model.generate(**asked, max_new_tokens=max_new_tokens, do_sample=False, max_time=self.seconds)
        said = out[0, asked["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ended = bool(len(said)) and int(said[-1]) in (ends if isinstance(ends, list) else [ends])
        text: str = self.tokenizer.decode(said, skip_special_tokens=True)
        return text, ended
