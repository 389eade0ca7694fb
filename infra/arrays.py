"""Arrays on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a safetensors file. Its numpy writer stores memory as it lies, which for a transposed array is not its
    values; rows are laid out here first."""
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)
