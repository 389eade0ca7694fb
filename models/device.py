"""The device this process computes on: its GPU, or the CPU where there is none or the settings keep it off.

Networks come to it when they are built or loaded, batches and drawn numbers when a step begins. Files, tables, text
features of a data set and random generators stay on the CPU, so that a draw is the same number on every device.
"""

from __future__ import annotations

import os

import torch

from infra.stages import DEVICE_VARIABLE


def compute_device() -> torch.device:
    """The process's current CUDA device, the CPU, or any other device that the environment names.

    RuntimeError where CUDA is asked for and there is none.
    """
    wanted = os.environ.get(DEVICE_VARIABLE, "auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cuda":
        return torch.device(wanted)
    if not torch.cuda.is_available():
        raise RuntimeError(
            "run.resources.device is cuda, but this process sees no GPU; set it to auto or cpu, or install a torch built "
            "for CUDA (`t2i doctor` says what it finds)"
        )
    return torch.device("cuda", torch.cuda.current_device())
