"""A rare token for a subject (Ruiz et al. 2022, arXiv:2208.12242, section 3.2), ranked for the tokenizer and model at hand.

A token must be one piece of the vocabulary (pieces of a split token keep their own meanings), rare in it, and in no
caption the model was trained on. Among those that are, the better ones change the least in what the model draws: the
response is |x_0(token class) - x_0(class)| / |x_0(class) - x_0("")| from pure noise, so 0 says nothing to the model
and 1 as much as the class itself. A vocabulary is ordered by frequency, as BPE and WordPiece training leave it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from infra.errors import ConfigError
from models.sampling.generate import Generator

COMMON_SHARE = 1 / 3  # of a vocabulary: BERT's first third is everyday English
NUM_NOISES = 4
SHAPE = re.compile(r"[a-z]{3,5}")


@dataclass(frozen=True)
class Candidate:
    """A token, its place in the vocabulary, and how much it changes what the model draws (0 = nothing)."""

    token: str
    id: int
    response: float


def find_tokens(
    generator: Generator, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], class_word: str, count: int = 48
) -> list[Candidate]:
    """The `count` rarest candidates, the one with the least response first."""
    ids = rarest(tokenizer, captions, class_word, count)
    responses = responses_of(generator, class_word, list(ids))
    found = [Candidate(token, ids[token], response) for token, response in zip(ids, responses, strict=True)]
    return sorted(found, key=lambda candidate: (candidate.response, candidate.token))


def rarest(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], class_word: str, count: int) -> dict[str, int]:
    """Token -> id of the rarest single pieces of 3 to 5 letters that no caption uses, the rarest first."""
    used = words_of([*captions, class_word])
    found: dict[str, int] = {}
    for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1]):
        text = tokenizer.convert_tokens_to_string([piece]).strip()
        if len(found) == count or number < COMMON_SHARE * len(tokenizer):
            break
        if SHAPE.fullmatch(text) and text not in used and tokenizer.tokenize(text) == [piece]:
            found[text] = number
    return found


@torch.no_grad()
def responses_of(generator: Generator, class_word: str, tokens: Sequence[str]) -> list[float]:
    """How much each token in front of the class word changes the model's first guess from pure noise."""
    side = generator.card.side
    noise = torch.randn((NUM_NOISES, 3, side, side), generator=torch.Generator().manual_seed(0)).to(generator.device)

    def guess(prompt: str) -> torch.Tensor:
        features, mask = generator.features([prompt])
        used = int(mask.sum())
        features, mask = features[:, :used].expand(NUM_NOISES, -1, -1), mask[:, :used].expand(NUM_NOISES, -1)
        x_0: torch.Tensor = generator.denoiser(noise, noise.new_ones(NUM_NOISES), features, mask)[0]
        return x_0

    alone = guess(f"a {class_word}")
    scale = float((alone - guess("")).norm())
    return [float((guess(f"a {token} {class_word}") - alone).norm()) / max(scale, 1e-9) for token in tokens]


def refuse_token(token: str, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], class_word: str) -> None:
    """Refuse a token that splits, is common, or already has a meaning in the training captions."""
    pieces, hint = tokenizer.tokenize(token), "leave token out to let the finder choose"
    others = list(rarest(tokenizer, captions, class_word, 3))
    if others:
        hint = f"take {', '.join(others)}, or {hint}"
    if len(pieces) != 1:
        raise ConfigError(f"token {token!r} splits into {len(pieces)} pieces, {' '.join(pieces)}; {hint}")
    number = tokenizer.convert_tokens_to_ids(pieces[0])
    if number == tokenizer.unk_token_id:
        raise ConfigError(f"token {token!r} is unknown to the tokenizer; {hint}")
    if token.lower() in words_of(captions):
        raise ConfigError(f"token {token!r} is in captions the model was trained on; {hint}")
    if number < COMMON_SHARE * len(tokenizer):
        raise ConfigError(
            f"token {token!r} is common: number {number} of a vocabulary of {len(tokenizer)} by frequency, "
            f"of which the first third is refused; {hint}"
        )


def words_of(captions: Sequence[str]) -> set[str]:
    """Every word of the captions, in small letters."""
    return {word for caption in captions for word in re.findall(r"\w+", caption.lower())}
