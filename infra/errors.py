"""Errors a person can cause or meet; each message names the thing, the value, the limit and the next step."""

from typing import ClassVar


class LifecycleError(Exception):
    """A stage or the machinery around it failed; running the same command again is safe."""

    exit_code: ClassVar[int] = 5


class ConfigError(LifecycleError):
    """A setting, an argument or the place given to work in cannot be used."""

    exit_code: ClassVar[int] = 2


class DataRefused(LifecycleError):
    """The input data cannot be used as asked."""

    exit_code: ClassVar[int] = 3


class GateFailed(LifecycleError):
    """A stage finished, but what it made is worse than its gate allows."""

    exit_code: ClassVar[int] = 4


class ArtifactCorrupted(LifecycleError):
    """A stored artifact no longer has the bytes it was committed with; `stage` and `key` say which to discard."""

    exit_code: ClassVar[int] = 5

    def __init__(self, message: str, stage: str = "", key: str = "") -> None:
        super().__init__(message)
        self.stage = stage
        self.key = key

    def __reduce__(self) -> tuple[type["ArtifactCorrupted"], tuple[str, str, str]]:
        """Keep `stage` and `key` when a worker process sends the error home."""
        return type(self), (str(self), self.stage, self.key)
