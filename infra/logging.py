"""Quiet logging: short lines for people, one JSON line per record in the run's file; secrets masked in both.

Console: what our packages say from the chosen level on, and only errors of others. File: ours from INFO, others' warnings.
"""

import contextvars
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OURS = ("flows", "tasks", "models", "data_curation", "infra")
HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH_STRING)(?:_|$)"
)
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SHORTEST = 8  # shorter values are words such as "token", masking them would only garble
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "stage"}
_stage: contextvars.ContextVar[str | None] = contextvars.ContextVar("stage", default=None)


def mask(text: str) -> str:
    """`text` without the values of environment variables that look like secrets, and without passwords in URLs."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and not value.startswith("/") and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return _IN_URL.sub(HIDDEN, text)


def masked(value: Any) -> Any:
    """A JSON-able copy of `value` with every text masked."""
    match value:
        case str():
            return mask(value)
        case dict():
            return {str(key): masked(item) for key, item in value.items()}
        case list() | tuple():
            return [masked(item) for item in value]
        case None | bool() | int() | float():
            return value
        case _:
            return mask(str(value))


class JsonLines(logging.Formatter):
    """One record as one JSON object; what was given as `extra=` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, stage, message, extras and, for an exception, its traceback."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "stage": getattr(record, "stage", None) or _stage.get(),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(
            masked({name: value for name, value in line.items() if value is not None}), ensure_ascii=False
        )


class ShortLines(logging.Formatter):
    """`pretrain-32: message`; anything above INFO says so."""

    def __init__(self, tracebacks: bool) -> None:
        super().__init__()
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """One line; the traceback only for those who asked."""
        stage = getattr(record, "stage", None) or _stage.get()
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{stage + ': ' if stage else ''}{level}{record.getMessage()}"
        if record.exc_info and self._tracebacks:
            text += "\n" + self.formatException(record.exc_info)
        return mask(text)


class _Level(logging.Filter):
    """Different thresholds for our loggers and everybody else's."""

    def __init__(self, ours: int, others: int) -> None:
        super().__init__()
        self._ours, self._others = ours, others

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.partition(".")[0] in OURS
        return record.levelno >= (self._ours if ours else self._others)


def setup_logging(level: int | str = logging.INFO, debug: bool = False) -> None:
    """Console lines on stderr for this process; `debug` shows everything with tracebacks. May be called again."""
    threshold = logging.getLevelNamesMapping()[level.upper()] if isinstance(level, str) else level
    console = logging.StreamHandler(sys.stderr)
    console.set_name("t2i-console")
    console.setFormatter(ShortLines(tracebacks=debug))
    console.addFilter(_Level(logging.DEBUG if debug else threshold, logging.INFO if debug else logging.ERROR))
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == "t2i-console"]:
        root.removeHandler(handler)
    root.addHandler(console)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(True)


@contextmanager
def also(handler: logging.Handler) -> Iterator[None]:
    """What our packages log from INFO on, and others' warnings, go to this handler too."""
    handler.addFilter(_Level(logging.INFO, logging.WARNING))
    root = logging.getLogger()
    root.addHandler(handler)
    if root.level > logging.INFO:
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def run_log(path: Path) -> Iterator[Path]:
    """Append every record of this process to a JSON-lines file while the run lasts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(JsonLines())
    with also(handler):
        yield path


@contextmanager
def stage_log(name: str) -> Iterator[None]:
    """Records made inside carry the name of the stage."""
    token = _stage.set(name)
    try:
        yield
    finally:
        _stage.reset(token)
