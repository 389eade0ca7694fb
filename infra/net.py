"""Which addresses a fetch may reach: http and https on public ones; checked on the URL and again at every connection.

Names are resolved by the system, so decimal, hex and octal hosts are judged as the address they mean.
"""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from infra.errors import DataRefused

_CARRIES_IPV4 = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96"))
)  # NAT64, compatible, SIIT
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")  # parts of it count as global; a cloud's metadata is among them


def embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to (mapped, compatible, SIIT, 6to4, Teredo, NAT64), if any."""
    if address.teredo:
        return address.teredo[1]
    if any(address in network for network in _CARRIES_IPV4):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet's: not private, loopback, link-local, metadata, multicast."""
    ip = ipaddress.ip_address(address.split("%")[0])
    judged = (embedded_ipv4(ip) if isinstance(ip, ipaddress.IPv6Address) else None) or ip
    if isinstance(judged, ipaddress.IPv6Address):
        return judged.is_global and judged in _GLOBAL_UNICAST
    return judged.is_global and not judged.is_multicast and judged not in _PROTOCOLS


def is_allowed(host: str, address: str, port: int, allow_private: Sequence[str]) -> bool:
    """Whether `allow_private` names this host, host:port, address or a network it lies in."""
    names = {host, f"{host}:{port}", address, f"{address}:{port}"}
    networks = [entry for entry in allow_private if "/" in entry]
    return not names.isdisjoint(allow_private) or any(
        ipaddress.ip_address(address.split("%")[0]) in ipaddress.ip_network(entry) for entry in networks
    )


def public_addresses(host: str, port: int, allow_private: Sequence[str] = ()) -> list[str]:
    """Every address of `host`; one that may not be reached refuses them all, or a name could point both ways."""
    try:
        infos = _getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DataRefused(f"host {host!r} cannot be resolved: {error}; check the URL") from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    for address in addresses:
        if not is_public(address) and not is_allowed(host, address, port, allow_private):
            raise DataRefused(f"{host} is {address}, not a public address; add it to allow_private if it is meant")
    return addresses


def check_url(url: str, allow_private: Sequence[str] = ()) -> list[str]:
    """Refuse a URL that is not http(s), carries a password or leads to a non-public address; else its addresses."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise DataRefused(f"URL {url!r} is malformed: {error}; correct the row") from error
    if parts.scheme not in ("http", "https"):
        raise DataRefused(f"URL {url!r} has scheme {parts.scheme!r}; only http and https are fetched")
    if not parts.hostname or any(character <= " " for character in url) or "\\" in parts.netloc:
        raise DataRefused(f"URL {url!r} names no host; correct the row")
    if parts.username is not None or parts.password is not None:
        raise DataRefused(f"URL with credentials for {parts.hostname} is not fetched; remove user and password")
    return public_addresses(parts.hostname, port, allow_private)


_getaddrinfo = socket.getaddrinfo


def guard_sockets(allow_private: Sequence[str] = ()) -> Callable[[], None]:
    """Check every later TCP connection of this process by the address it really goes to; returns what undoes it.

    Meant for a download process of its own: whatever library connects, a redirect or a second DNS answer changes nothing.
    Left out: code that brings its own C sockets (uvloop, Arrow).
    """
    real_connect, real_connect_ex = socket.socket.connect, socket.socket.connect_ex

    def checked(sock: socket.socket, address: Any) -> Any:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return address
        host, port, *rest = address
        found = public_addresses(str(host), int(port), allow_private)
        family = socket.AF_INET6 if ":" in found[0] else socket.AF_INET
        return (found[0] if family == sock.family else host, port, *rest)

    def connect(self: socket.socket, address: Any) -> None:
        try:
            real_connect(self, checked(self, address))
        except DataRefused as error:
            raise PermissionError(str(error)) from error  # what libraries expect of a socket: an OSError

    def connect_ex(self: socket.socket, address: Any) -> int:
        try:
            return real_connect_ex(self, checked(self, address))
        except DataRefused as error:
            raise PermissionError(str(error)) from error

    def undo() -> None:
        socket.socket.connect = real_connect  # type: ignore[method-assign]
        socket.socket.connect_ex = real_connect_ex  # type: ignore[method-assign]

    socket.socket.connect = connect  # type: ignore[method-assign, assignment]
    socket.socket.connect_ex = connect_ex  # type: ignore[method-assign, assignment]
    return undo
