"""URLs as people write them, made fit to be asked for: blanks cut, unicode encoded, what cannot be fetched refused."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit, urlunsplit

SAFE = "/:?#[]@!$&'()*+,;=%~-._"  # reserved characters keep their meaning, and what is encoded stays so
LONGEST = 8_000
SECRET = re.compile(r"//[^/?#]*@")


class BadUrl(ValueError):
    """A URL that is not asked for; the message says why."""


def fetchable(raw: str | None) -> str:
    """`raw` as an http(s) URL of ASCII characters, without fragment; raises BadUrl where there is none in it."""
    text = (raw or "").strip()
    if not text:
        raise BadUrl("empty")
    if len(text) > LONGEST:
        raise BadUrl(f"{len(text)} characters, limit {LONGEST}")
    if any(character < " " or character == "\x7f" for character in text):
        raise BadUrl("control character inside")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadUrl(str(error)) from error
    if parts.scheme not in ("http", "https"):
        raise BadUrl(f"scheme {parts.scheme!r}; only http and https are fetched")
    if not host or "\\" in parts.netloc or any(character.isspace() for character in parts.netloc):
        raise BadUrl("no host")
    if "@" in parts.netloc:
        raise BadUrl("user or password in the URL; remove them")
    name = f"[{host}]" if ":" in host else _ascii_host(host)
    netloc = name if port is None else f"{name}:{port}"
    return urlunsplit((parts.scheme, netloc, quote(parts.path, SAFE) or "/", quote(parts.query, SAFE), ""))


def without_secrets(url: str) -> str:
    """`url` for messages, with user and password cut out."""
    return SECRET.sub("//", url)


def _ascii_host(host: str) -> str:
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise BadUrl(f"host {host!r}: {error}") from error
