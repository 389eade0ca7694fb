"""Data of one's own as part of a configuration: a path and the digest of what lies there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from infra import local_files
from infra.config import Config


def fingerprint(path: str) -> str | None:
    """Digest of a file's bytes, of a folder's names, sizes and times, or of an S3 object's tag; None: nothing there."""
    if path.startswith("s3://"):
        from data_curation.remote import tag_of

        return tag_of(path)
    return local_files.fingerprint(Path(path))


class OwnData(Config):
    """Data at a path; its fingerprint is part of the stage key, so changed data is read again."""

    path: str = Field(min_length=1, description="Where the data lies.")
    fingerprint: str | None = Field(
        default=None, description="Digest of what lies at the path; None: taken when the configuration is read."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_fingerprint(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("path"), str | Path):
            return data
        data = data | {"path": str(data["path"])}
        return data if data.get("fingerprint") else data | {"fingerprint": fingerprint(data["path"])}
