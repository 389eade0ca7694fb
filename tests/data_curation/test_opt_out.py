"""Every spelling of an opt-out is heard; what is meant for others, or is none, is not."""

from email.message import Message

import pytest

from data_curation.opt_out import opted_out


def headers(*pairs: tuple[str, str]) -> Message:
    message = Message()
    for name, value in pairs:
        message[name] = value
    return message


@pytest.mark.parametrize(
    "value",
    [
        "noai", "NoAI", "noimageai", "noindex", "noimageindex", "none", "noml", "noai;", " noai ,", '"noai"',
        "noindex, nofollow", "nofollow,noai", "max-image-preview: large, noai", "max-snippet: -1; noai",
        "unavailable_after: 25 Jun 2010 15:00:00 PST, noai", "unavailable_after: Saturday, 30-Aug-03 01:00:00 GMT, noai",
        "t2i-lifecycle: noai", "T2I-Lifecycle: noindex", "*: noai", "otherbot: nofollow, t2i-lifecycle: noai",
        "t2i-lifecycle: nofollow, noai",
    ],
)  # fmt: skip
def test_opt_outs(value: str) -> None:
    assert opted_out(headers(("x-robots-TAG", value)), "T2I-lifecycle/0.1 (+https://example.org)")


@pytest.mark.parametrize(
    "value",
    [
        "", "all", "nofollow", "nosnippet", "max-image-preview: none", "otherbot: noai", "otherbot: nofollow, noai",
        "t2i-lifecycle: nofollow, otherbot: noai", "unavailable_after: 25 Jun 2010 15:00:00 PST", "noairplane",
    ],
)  # fmt: skip
def test_no_opt_outs(value: str) -> None:
    assert opted_out(headers(("X-Robots-Tag", value)), "t2i-lifecycle") is None


def test_repeated_headers_and_the_tdm_reservation() -> None:
    assert opted_out(headers(("X-Robots-Tag", "all"), ("X-Robots-Tag", "noai")), "t2i-lifecycle")
    assert opted_out(headers(("tdm-reservation", " 1 ")), "t2i-lifecycle")
    assert opted_out(headers(("tdm-reservation", "0")), "t2i-lifecycle") is None
