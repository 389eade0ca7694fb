"""The fetch policy refuses every spelling of a non-public address; tests/data_curation/test_guarded_web.py has connections."""

import socket
from typing import Any

import pytest

from infra import net
from infra.errors import DataRefused
from infra.net import is_public, public_addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "2002:7f00:1::", "64:ff9b::7f00:1", "fd00:ec2::254",
        "192.0.0.192", "::127.0.0.1", "::ffff:0:127.0.0.1", "::10.0.0.1", "2001:db8::1", "5f00::1", "4000::1",
    ],
)  # fmt: skip
def test_non_public_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "::1", "::ffff:7f00:1", "169.254.169.254", "localhost", "0"],
)  # fmt: skip
def test_every_spelling_of_a_non_public_address_is_refused(host: str) -> None:
    with pytest.raises(DataRefused, match="not a public address"):
        public_addresses(host, 80)


def test_a_host_that_is_none_is_refused() -> None:
    with pytest.raises(DataRefused, match="cannot be resolved"):
        public_addresses("a" * 70 + ".org", 80)


def test_a_name_that_points_both_ways_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("8.8.8.8", "127.0.0.1")]

    monkeypatch.setattr(net, "_getaddrinfo", answer)
    with pytest.raises(DataRefused, match="127.0.0.1, not a public address"):
        public_addresses("example.com", 80)


def test_what_is_allowed() -> None:
    assert public_addresses("8.8.8.8", 443) == ["8.8.8.8"]
    for entry in ("127.0.0.1:8080", "127.0.0.1", "127.0.0.0/8"):
        assert public_addresses("127.0.0.1", 8080, [entry]) == ["127.0.0.1"]
    with pytest.raises(DataRefused):
        public_addresses("127.0.0.1", 8081, ["127.0.0.1:8080"])
