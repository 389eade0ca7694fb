"""Training checkpoints: safetensors and JSON, written aside and renamed, hashed, never pickled."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

log = logging.getLogger(__name__)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], meta: dict[str, Any]
) -> None:
    """Commit `folder/step-N` (one safetensors per group + state.json with hashes) and drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step-{step:08d}", folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    hashes = {}
    for group, named in tensors.items():
        path = partial / f"{group}.safetensors"
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in named.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        hashes[path.name] = _sha256(path)
    (partial / "state.json").write_text(json.dumps({"step": step, "sha256": hashes, **meta}, sort_keys=True))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load_state(folder: Path) -> tuple[int, dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """(step, tensors by group, meta) of the newest intact checkpoint, or None; a damaged one is named and skipped."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            meta = json.loads((path / "state.json").read_text())
            bad = [name for name, value in meta["sha256"].items() if _sha256(path / name) != value]
        except (OSError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is unreadable (%s); falling back to the one before", path, error)
            continue
        if bad:
            log.warning("checkpoint %s is damaged in %s; falling back to the one before", path, ", ".join(bad))
            continue
        groups = {Path(name).stem: load_file(path / name) for name in meta["sha256"]}
        return int(meta["step"]), groups, meta
    return None


def refuse_changes(before: dict[str, object] | None, now: dict[str, object], folder: Path) -> None:
    """A run goes on with the settings it began with."""
    if before is None:
        return
    differ = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]  # fmt: skip
    if differ:
        raise ValueError(
            f"the checkpoint in {folder} was made with other settings ({'; '.join(differ)}); set them back to resume, "
            "or delete the folder to begin anew"
        )


def refuse_other_model(stored: dict[str, torch.Tensor], own: dict[str, torch.Tensor], folder: Path) -> None:
    """Weights of another network are named, not half loaded."""
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    wanted = {name: tuple(value.shape) for name, value in own.items()}
    differ = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
    if differ:
        name = differ[0]
        raise ValueError(
            f"the checkpoint in {folder} is of another model: {len(differ)} weights differ, {name} is {shapes.get(name)} "
            f"there and {wanted.get(name)} here; resume with the model it was made with, or delete the folder"
        )
