"""URL lists in S3: the tag that says which version is meant, and the bytes. Address and credentials: the AWS_* variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.errors import ConfigError, DataRefused

ADVICE = "check the address, AWS_ENDPOINT_URL and credentials"


def tag_of(uri: str) -> str:
    """ETag and size of an object."""
    head = _call(uri, "head_object")
    return f"{head['ETag'].strip(chr(34))}-{head['ContentLength']}"


def copy_of(uri: str, folder: Path, tag: str | None) -> Path:
    """The object as a file in `folder`, in the version that `tag` names."""
    if tag not in (None, tag_of(uri)):
        raise DataRefused(f"source {uri} changed since the run was planned; start a new run to plan with it")
    path = folder / Path(urlsplit(uri).path).name
    with path.open("wb") as file:
        for part in _call(uri, "get_object")["Body"].iter_chunks(1 << 20):
            file.write(part)
    return path


def _call(uri: str, operation: str) -> dict[str, Any]:
    import boto3  # type: ignore[import-untyped,unused-ignore]
    from botocore.config import Config  # type: ignore[import-untyped,unused-ignore]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped,unused-ignore]

    place = urlsplit(uri)
    if not place.netloc or not place.path.strip("/"):
        raise ConfigError(f"source {uri} names no object; write s3://bucket/list.parquet")
    quick = Config(connect_timeout=2, read_timeout=10, retries={"max_attempts": 1, "mode": "standard"})
    try:
        client = boto3.client("s3", config=quick)
        return dict(getattr(client, operation)(Bucket=place.netloc, Key=place.path.lstrip("/")))
    except (BotoCoreError, ClientError, ValueError) as error:
        raise ConfigError(f"source {uri} cannot be read: {error}; {ADVICE}") from error
