"""What tests of flows share: waiting for something, with a limit."""

import time
from collections.abc import Callable
from typing import Any

import pytest


def _until(ask: Callable[[], Any], seconds: float = 300.0) -> Any:
    from prefect.exceptions import ObjectNotFound

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := ask():
                return answer
        except ObjectNotFound:
            pass
        time.sleep(0.5)
    raise AssertionError("not within the time")


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """Ask until the answer is true, and give it."""
    return _until
