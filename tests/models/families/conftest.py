"""One thread: with more the rounding of equal arithmetic depends on where tensors lie."""

from collections.abc import Iterator

import pytest

from models.engine.distribute import one_thread


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield
