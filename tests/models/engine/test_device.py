"""Which device a process computes on."""

import pytest
import torch

from infra.stages import DEVICE_VARIABLE
from models.device import compute_device
from models.engine.randomness import Randomness


def test_auto_takes_cuda_where_there_is_one(monkeypatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "auto")
    assert compute_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cpu_keeps_off_a_gpu_and_cuda_without_one_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    assert compute_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="sees no GPU; set it to auto or cpu"):
        compute_device()


def test_numbers_are_the_cpus_wherever_they_go() -> None:
    here, there = (Randomness(0, 3, (0, 1), torch.device(where)) for where in ("cpu", "meta"))
    assert there.normal("x", (4,)).device.type == "meta"
    assert there.stratified("t").device.type == "meta"
    assert torch.equal(here.normal("x", (4,)), Randomness(0, 3, (0, 1)).normal("x", (4,)))
