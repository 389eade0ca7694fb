"""Stages run by hand: what a stage function is given, its inputs being folders that others left beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.stages import Resources, StageContext, fan_out_here, no_progress


@pytest.fixture(scope="session")
def context() -> Callable[..., StageContext]:
    def make(root: Path, name: str, **inputs: str) -> StageContext:
        out, scratch = root / name, root / f"{name}.scratch"
        out.mkdir()
        scratch.mkdir(exist_ok=True)
        folders = {role: root / stage for role, stage in inputs.items()}
        return StageContext(name, folders, {}, out, scratch, Resources(), no_progress, fan_out_here)

    return make
