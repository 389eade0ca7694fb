"""Logs: JSON lines in the file, short lines on the console, other libraries quiet, secrets masked."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.logging import mask, run_log, setup_logging, stage_log

OURS = logging.getLogger("tasks.example")
OTHERS = logging.getLogger("httpx")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Leave the root logger as it was."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_has_one_object_per_record(tmp_path: Path) -> None:
    setup_logging()
    with run_log(tmp_path / "logs" / "run.jsonl") as path, stage_log("pretrain-32"):
        OURS.info("loss %.2f", 0.5, extra={"step": 7, "metrics": {"loss": 0.5}})
        OURS.debug("not kept")
        OTHERS.info("not kept")
        OTHERS.warning("kept")
        try:
            raise ValueError("bad")
        except ValueError:
            OURS.exception("failed")
    OURS.info("after the run")
    first, second, third = _lines(path)
    assert first["message"] == "loss 0.50"
    assert (first["stage"], first["step"], first["metrics"]) == ("pretrain-32", 7, {"loss": 0.5})
    assert (second["logger"], second["level"]) == ("httpx", "warning")
    assert "ValueError: bad" in str(third["exception"])


def test_the_console_is_short_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()  # twice does not double the lines
    with stage_log("encode"):
        OURS.info("8000 rows")
        OURS.warning("slow disk")
    OTHERS.warning("noise")
    OTHERS.error("broken")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("noise", stacklevel=1)
    assert capfd.readouterr().err == "encode: 8000 rows\nencode: warning: slow disk\nerror: broken\n"


def test_secrets_are_masked_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", 'hf_abc"def123')
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3ts3cr3t")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    setup_logging()
    with run_log(tmp_path / "run.jsonl") as path:
        OURS.info("token is %s", 'hf_abc"def123', extra={"nested": [{"key": "s3cr3ts3cr3t"}]})
        OURS.info("from https://me:hunter2@host/x")
    text = path.read_text() + capfd.readouterr().err
    assert "def123" not in text
    assert "s3cr3t" not in text
    assert "hunter2" not in text
    assert "token is ***" in text
    assert "https://***@host/x" in text


def test_words_and_paths_are_not_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_KEY_TOKEN", "/home/someone/key")
    monkeypatch.setenv("KEYBOARD_LAYOUT", "en_US.UTF-8")
    assert mask("/home/someone/key en_US.UTF-8") == "/home/someone/key en_US.UTF-8"
