"""URLs as people write them become ones that can be asked for, or are refused with why."""

import pytest

from data_curation.urls import BadUrl, fetchable, without_secrets


@pytest.mark.parametrize(
    ("raw", "url"),
    [
        ("  http://a.org/x.png\n", "http://a.org/x.png"), ("http://a.org/a,b;c.png?x=1,2", "http://a.org/a,b;c.png?x=1,2"),
        ("http://a.org", "http://a.org/"), ("HTTP://A.org/x", "http://a.org/x"), ("http://a.org/ü ö.png", "http://a.org/%C3%BC%20%C3%B6.png"),
        ("http://a.org/%C3%BC.png", "http://a.org/%C3%BC.png"), ("http://bücher.example/x", "http://xn--bcher-kva.example/x"),
        ("http://a.org/x#part", "http://a.org/x"), ("http://[2001:db8::1]:8080/x", "http://[2001:db8::1]:8080/x"),
    ],
)  # fmt: skip
def test_fetchable(raw: str, url: str) -> None:
    assert fetchable(raw) == url
    assert fetchable(url) == url


@pytest.mark.parametrize(
    "raw",
    [
        None, "", "  ", "nonsense", "file:///etc/passwd", "ftp://a.org/x", "data:image/png;base64,xx", "javascript:1",
        "//a.org/x", "http://", "http:///x", "http://a.org:99999/", "http://user:pw@a.org/", "http://u@a.org/",
        "http://a.org\\@127.0.0.1/", "http://a b/", "http://a.org/x\r\nHost: y", "http://[::1", "http://a.org/" + "x" * 9_000,
    ],
)  # fmt: skip
def test_refused(raw: str | None) -> None:
    with pytest.raises(BadUrl):
        fetchable(raw)


def test_secrets_stay_out_of_messages() -> None:
    assert without_secrets("http://user:pw@a.org/x") == "http://a.org/x"
