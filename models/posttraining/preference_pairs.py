"""Preference pairs in one form: prompt, winner, loser, source, strength; whoever made them, every method reads these.

A folder holds pairs.parquet (prompt, scene, source, strength > 0, split) and pairs.safetensors (`winner` and `loser`,
uint8 [N, H, W, 3], row by row). `checked` refuses what would teach nothing or lie: ties, unequal shapes, a pair of the
same picture, a pair that also stands the other way round, a prompt on two sides of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from infra.arrays import save_arrays
from infra.errors import DataRefused
from models.engine.randomness import derive_seed

TABLE, PICTURES = "pairs.parquet", "pairs.safetensors"
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class PreferencePairs:
    """N pairs; `split` is train or held_out, the same for all pairs of a prompt."""

    prompts: tuple[str, ...]
    winner: np.ndarray  # uint8 [N, H, W, 3]
    loser: np.ndarray  # uint8 [N, H, W, 3]
    source: tuple[str, ...]
    strength: np.ndarray  # [N], above 0
    split: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def of(self, side: str) -> PreferencePairs:
        """The pairs of one side of the split."""
        rows = [row for row, name in enumerate(self.split) if name == side]
        if not rows:
            raise DataRefused(f"pairs: none of {len(self)} is in {side!r}; change the split or give more prompts")
        prompts, source, split = (tuple(part[i] for i in rows) for part in (self.prompts, self.source, self.split))
        return PreferencePairs(prompts, self.winner[rows], self.loser[rows], source, self.strength[rows], split)


def plain(prompt: str) -> str:
    """The prompt without what does not make it another one: case and whitespace."""
    return " ".join(prompt.lower().split())


def split_of(prompt: str, held_out: float, seed: int) -> str:
    """By the prompt alone, whitespace and case aside, so that no prompt is on two sides."""
    place = derive_seed(seed, "preference split", plain(prompt)) % 10_000 / 10_000
    return HELD_OUT if place < held_out else TRAIN


def checked(pairs: PreferencePairs) -> PreferencePairs:
    """The pairs, or a refusal that names the row."""
    count = len(pairs.prompts)
    sizes = {"winner": pairs.winner.shape, "loser": pairs.loser.shape}
    if sizes["winner"] != sizes["loser"] or sizes["winner"][0] != count:
        raise DataRefused(
            f"pairs: {count} rows with pictures {sizes}; both pictures of a pair must be of one bucket, make them again"
        )
    ties = np.flatnonzero(~(pairs.strength > 0))
    if len(ties):
        raise DataRefused(
            f"pairs: row {ties[0]} has strength {pairs.strength[ties[0]]}; drop ties, keep strengths above 0"
        )
    _refuse_twins(pairs)
    _refuse_leaks(pairs.prompts, pairs.split)
    return pairs


def _refuse_twins(pairs: PreferencePairs) -> None:
    seen: dict[tuple[str, bytes, bytes], int] = {}
    for row, prompt in enumerate(pairs.prompts):
        won, lost = (hashlib.sha256(side[row].tobytes()).digest() for side in (pairs.winner, pairs.loser))
        if won == lost:
            raise DataRefused(f"pairs: row {row} compares a picture with itself; drop it")
        if (prompt, lost, won) in seen:
            raise DataRefused(
                f"pairs: row {row} is row {seen[prompt, lost, won]} the other way round; keep one, or neither"
            )
        seen[prompt, won, lost] = row


def _refuse_leaks(prompts: Sequence[str], split: Sequence[str]) -> None:
    sides: dict[str, str] = {}
    for row, (prompt, side) in enumerate(zip(prompts, split, strict=True)):
        first = sides.setdefault(plain(prompt), side)
        if first != side:
            raise DataRefused(
                f"pairs: row {row}, prompt {prompt!r}, is in {side!r}, another pair of it in {first!r}; "
                "split by prompt, not by pair"
            )


def write_pairs(pairs: PreferencePairs, folder: Path, scenes: Sequence[str] | None = None) -> None:
    """Check and write both files; `scenes` names what the demo's judge checks."""
    checked(pairs)
    save_arrays(folder / PICTURES, {"winner": pairs.winner, "loser": pairs.loser})
    table = pa.table({
        "prompt": list(pairs.prompts), "scene": list(scenes) if scenes is not None else [""] * len(pairs),
        "source": list(pairs.source), "strength": pairs.strength, "split": list(pairs.split),
    })  # fmt: skip
    pq.write_table(table, folder / TABLE)


def read_pairs(folder: Path) -> PreferencePairs:
    """Read and check; a folder without splits is all training pairs."""
    try:
        pictures, table = load_file(folder / PICTURES), pq.read_table(folder / TABLE)
        winner, loser = pictures["winner"], pictures["loser"]
        prompts, source = (tuple(table[name].to_pylist()) for name in ("prompt", "source"))
        strength = table["strength"].to_numpy()
    except (OSError, KeyError, SafetensorError, pa.ArrowInvalid) as error:
        raise DataRefused(f"pairs in {folder} cannot be read ({error}); run their stage again") from error
    split = tuple(table["split"].to_pylist()) if "split" in table.column_names else (TRAIN,) * len(prompts)
    return checked(PreferencePairs(prompts, winner, loser, source, strength, split))
