"""Has a site's owner opted out? X-Robots-Tag in all its spellings, and the TDM reservation protocol.

A tag's value lists directives between commas or semicolons; `name:` before one of them names the crawler that it and
what follows are for (Google's specification), unless `name` is a directive that has a value. Headers may repeat.
Left out: `unavailable_after` (a date is no opt-out), <meta> tags of pages around the picture, ai.txt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from email.message import Message

OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
CRAWLER = re.compile(r"[a-z*][a-z0-9_.*-]*", re.ASCII)


def opted_out(headers: Message, user_agent: str) -> str | None:
    """The header that asks us to leave this answer alone, as `name: value`, or None."""
    ours = {"*", "", product_token(user_agent)}
    for value in map(str, headers.get_all("X-Robots-Tag", [])):
        if any(crawler in ours and directive in OPT_OUT for crawler, directive in directives(value)):
            return f"X-Robots-Tag: {value}"
    for value in map(str, headers.get_all("TDM-Reservation", [])):
        if value.strip() == "1":
            return f"TDM-Reservation: {value}"
    return None


def product_token(user_agent: str) -> str:
    """The name that robots rules call us by: `T2I-lifecycle/0.1 (+https://...)` is t2i-lifecycle."""
    return re.split(r"[/\s]", user_agent.strip().lower(), maxsplit=1)[0]


def directives(value: str) -> Iterator[tuple[str, str]]:
    """(crawler or "", directive) of one header value, lower case."""
    crawler = ""
    for part in _parts(value):
        *names, directive = (piece.strip() for piece in part.split(":"))
        if names and names[0] in VALUED:
            continue
        for name in names:
            if CRAWLER.fullmatch(name):
                crawler = name
        yield crawler, directive


def _parts(value: str) -> Iterable[str]:
    return filter(None, (part.strip().strip("\"'").strip() for part in re.split(r"[,;]", value.lower())))
