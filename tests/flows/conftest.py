"""What tests of flows share: waiting for something with a limit, and a browser."""

import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync")


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


@pytest.fixture
def browser() -> "Iterator[Browser]":
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def barriers() -> "Callable[[Page], list[str]]":
    """What axe-core finds serious or worse on a page."""
    from axe_playwright_python.sync_playwright import Axe

    def found(page: "Page") -> list[str]:
        violations = Axe().run(page).response["violations"]
        return [f"{each['id']}: {each['nodes'][0]['html']}" for each in violations
                if each["impact"] in ("serious", "critical")]  # fmt: skip

    return found
