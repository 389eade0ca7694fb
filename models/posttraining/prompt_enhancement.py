"""Prompt enhancement (PromptEnhancer, arXiv:2509.04545): a prompt rewritten into the form the model was trained on.

Supervised part only: next-token loss on the rewrite, -log p(rewrite | prompt), from pairs of caption_pairs.py, or a chat
model with RULES. Either way intent.py decides by code whether the rewrite may stand; else the prompt goes as it came,
with the reason. Left out: reinforcement learning on picture rewards, sampling of several rewrites.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import LlamaForCausalLM

from infra.errors import ArtifactCorrupted
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.prompt_enhancer import SLOTS, CaptionModel, InstructModel
from models.posttraining.intent import Intent
from models.posttraining.prompt_words import negated, rare, unframed

log = logging.getLogger(__name__)

RULES = """You rewrite prompts for a text-to-image model. Rules:
1. Keep every subject, action, count, colour, relation, style, name, unusual word and negation exactly as written.
2. Copy quoted text letter by letter. Never add a number, a negation or a quotation; add a colour only if there is none.
3. Say what the picture shows, from the whole to the details, in one or two plain sentences of the prompt's language.
4. Do not describe named people or named styles further. Do not explain.
Answer with the rewritten prompt between <answer> and </answer>."""
RULES_VERSION = 2
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)
THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.S)


@dataclass(frozen=True)
class Enhanced:
    """Both prompts; `reason` says why `revised` is the original, None when it is a rewrite."""

    original: str
    revised: str
    reason: str | None = None


def spans_kept(intent: Intent, made: Sequence[Enhanced]) -> list[bool]:
    """Of each protected span of the prompts that were rewritten, whether it came back; a returned prompt proves nothing."""
    return [kept for each in made if each.reason is None for kept in intent.kept(unframed(each.original), each.revised)]


class Rewriter(Protocol):
    """Proposes a rewrite, or says why it has none."""

    def rewrite(self, prompt: str) -> tuple[str | None, str | None]:
        """(rewrite, None) or (None, reason)."""


class PromptRewriting:
    """Player `enhancer`. `extra` holds `ids`, `labels` and `real` (False: padding), each [B, T]."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the language model."""
        return {"enhancer": self.model}

    def turns(self, step: int) -> Sequence[str]:
        """It moves in every step."""
        return ("enhancer",)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Nothing to draw: the pairs are drawn where the batch is made."""
        return batch

    def loss(self, player: str, batch: Batch) -> Loss:
        """Mean -log p of the rewrites' tokens, the prompts' tokens left out."""
        part = batch.extra
        out = self.model(input_ids=part["ids"], attention_mask=part["real"].long())
        logits, labels = out.logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten()
        right = (logits.argmax(1) == labels)[labels >= 0].float().mean()
        return Loss(nn.functional.cross_entropy(logits, labels, ignore_index=-100), {"token_accuracy": right})

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


class SlotRewriter:
    """The small model; spans it has not read go through it as slots and come back as written."""

    def __init__(self, model: CaptionModel, intent: Intent) -> None:
        self.model, self.intent = model, intent

    def rewrite(self, prompt: str) -> tuple[str | None, str | None]:
        """One greedy rewrite."""
        if denied := negated(prompt):
            return None, f"{denied[0]!r} denies something, which this enhancer was not taught"
        text, spans = self._into_slots(prompt)
        if len(spans) > len(SLOTS):
            return (
                None,
                f"{len(spans)} parts are unknown to this enhancer, it can carry {len(SLOTS)}: {spans[0]!r}, ...",
            )
        found = self.model.complete(text, self.intent.max_tokens)
        if found is None:
            return None, f"the rewrite did not end within {self.intent.max_tokens} tokens"
        for slot, span in zip(SLOTS, spans, strict=False):
            found = found.replace(slot, span)
        return found, None

    def _into_slots(self, prompt: str) -> tuple[str, list[str]]:
        """The prompt with slots for what is rare, neighbours in one, and what they stand for."""
        text, spans, at = "", list[str](), 0
        for span in rare(prompt, self.intent.known, self.intent.triggers):
            start = prompt.index(span, at)
            if spans and not prompt[at:start].strip() and text.endswith(SLOTS[min(len(spans), len(SLOTS)) - 1]):
                spans[-1] += prompt[at:start] + span
            else:
                text += prompt[at:start] + SLOTS[min(len(spans), len(SLOTS) - 1)]
                spans.append(span)
            at = start + len(span)
        return text + prompt[at:], spans


class InstructRewriter:
    """A chat model that is told the rules."""

    def __init__(self, model: InstructModel, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens

    def rewrite(self, prompt: str) -> tuple[str | None, str | None]:
        """One answer at temperature 0."""
        try:
            said, ended = self.model.answer(RULES, prompt, self.new_tokens)
        except (RuntimeError, ValueError, OSError) as error:  # out of memory, too long, no chat template
            log.warning("prompt enhancer failed on %r: %s", prompt, error)
            return None, f"the language model failed: {type(error).__name__}"
        if not ended and not ANSWER.search(said):
            return None, f"the language model did not end within {self.new_tokens} tokens or its time"
        found = answer_of(said)
        return (found, None) if found else (None, "the language model gave no answer")


def answer_of(said: str) -> str:
    """What stands in <answer>, else all that is no <think>; straight quotes, one line."""
    marked = ANSWER.findall(said)
    text = marked[-1] if marked else THOUGHT.sub("", said)
    return " ".join(text.translate(str.maketrans("“”‘’", "\"\"''")).split())  # noqa: RUF001


class Enhancer:
    """`enhance(prompt)`: a rewrite that keeps the intent, or the prompt itself with the reason; each prompt once."""

    def __init__(self, rewriter: Rewriter, intent: Intent, fingerprint: str, cache: Path | None = None) -> None:
        self.rewriter, self.intent, self.cache = rewriter, intent, cache
        self.identity = {"model": fingerprint, "rules": RULES_VERSION, "triggers": list(intent.triggers)}
        self._known: dict[str, Enhanced] = {}

    def enhance(self, prompt: str) -> Enhanced:
        """Both prompts; the same answer for the same prompt, model and rules."""
        if prompt not in self._known:
            self._known[prompt] = self._stored(prompt) or self._store(self._enhance(prompt))
        return self._known[prompt]

    def _enhance(self, prompt: str) -> Enhanced:
        asked = unframed(prompt)
        if not asked:
            return Enhanced(prompt, prompt, "the prompt is empty")
        revised, reason = self.rewriter.rewrite(asked)
        reason = reason or self.intent.fault(asked, revised or "")
        if reason is None and revised == prompt:
            reason = "nothing to add"
        return Enhanced(prompt, prompt if reason else str(revised), reason)

    def _place(self, prompt: str) -> Path | None:
        key = json.dumps(self.identity | {"prompt": prompt}, sort_keys=True)
        return None if self.cache is None else self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _stored(self, prompt: str) -> Enhanced | None:
        place = self._place(prompt)
        if place is None or not place.exists():
            return None
        try:
            return Enhanced(**json.loads(place.read_text()))
        except (ValueError, TypeError) as error:
            raise ArtifactCorrupted(f"cached prompt {place} cannot be read ({error}); delete the file") from error

    def _store(self, made: Enhanced) -> Enhanced:
        place = self._place(made.original)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(made), ensure_ascii=False, sort_keys=True))
            partial.replace(place)
        return made


def batch_of(rows: Sequence[tuple[list[int], list[int]]], slots: tuple[int, ...], pad: int) -> Batch:
    """Tokenised pairs as the engine's batch; there are no pictures."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*a, *[pad] * (longest - len(a))] for a, _ in rows])
    labels = torch.tensor([[*b, *[-100] * (longest - len(b))] for _, b in rows])
    real = torch.arange(longest) < torch.tensor([len(a) for a, _ in rows])[:, None]
    none = torch.zeros(len(rows), 1, 1)
    return Batch(none, none, none[:, :, 0] > 0, slots, extra={"ids": ids, "labels": labels, "real": real})
