"""A prompt enhancer's folder: enhancer.json and, if it was trained here, the stock transformers model beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from infra.config import Config
from infra.errors import ArtifactCorrupted
from models.networks.prompt_enhancer import CaptionModel, InstructModel
from models.networks.text_encoder import count_tokens
from models.posttraining.intent import Intent
from models.posttraining.prompt_enhancement import Enhancer, InstructRewriter, Rewriter, SlotRewriter

CARD = "enhancer.json"


class EnhancerCard(Config):
    """enhancer.json: what rewrites, and what its rules know."""

    kind: Literal["captions", "instruct"] = Field(description="Trained on the run's captions, or a chat model")
    model: str | None = Field(default=None, description="Folder or name of the chat model")
    fingerprint: str = Field(description="sha256 of the weights; of the listing where they lie elsewhere")
    known: tuple[str, ...] | None = Field(default=None, description="Words of the captions")
    addable: tuple[str, ...] | None = Field(default=None, description="Words a rewrite may bring in")
    language: str = Field(default="en", description="Language of a prompt too short to tell")
    max_tokens: int = Field(default=64, ge=8, description="Tokens the text encoder reads")
    new_tokens: int = Field(default=160, ge=8, description="Longest answer of a chat model")
    seconds: float = Field(default=20.0, gt=0, description="Longest time of a chat model's answer")

    def intent(self, triggers: Sequence[str] = ()) -> Intent:
        """The rules with these trigger words."""
        known, addable = (None if part is None else frozenset(part) for part in (self.known, self.addable))
        return Intent(known, addable, tuple(triggers), self.language, self.max_tokens, count_tokens)


def listing_digest(model: str) -> str:
    """What identifies a chat model that is not copied: its name, and for a folder its files' names and sizes."""
    folder = Path(model)
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir()) if folder.is_dir() else []
    return hashlib.sha256(repr((model if not files else "", files)).encode()).hexdigest()


def load_enhancer(folder: Path, triggers: Sequence[str] = (), cache: Path | None = None) -> Enhancer:
    """The enhancer of a stage; `triggers` are the rare words of the checkpoint that will draw."""
    try:
        card = EnhancerCard.model_validate_json((folder / CARD).read_text())
    except (OSError, ValidationError) as error:
        raise ArtifactCorrupted(
            f"{folder} is no prompt enhancer ({error}); give the folder of its stage, or run it again"
        ) from error
    intent, rewriter = card.intent(triggers), _rewriter(card, folder, triggers)
    return Enhancer(rewriter, intent, card.fingerprint, cache)


def _rewriter(card: EnhancerCard, folder: Path, triggers: Sequence[str]) -> Rewriter:
    if card.kind == "captions":
        return SlotRewriter(CaptionModel.load(folder), card.intent(triggers))
    return InstructRewriter(InstructModel(str(card.model), card.seconds), card.new_tokens)
