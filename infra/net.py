"""Which addresses a fetch may reach: public ones; asked at every connection, which then goes to the address that was judged.

Names are resolved by the system, so decimal, hex and octal hosts are judged as the address they mean.
"""

import ipaddress
import socket
from collections.abc import Sequence

from infra.errors import DataRefused

_CARRIES_IPV4 = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96"))
)  # NAT64, compatible, SIIT
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")  # parts of it count as global; a cloud's metadata is among them
_getaddrinfo = socket.getaddrinfo  # under a name of its own, so that only this answer can be staged


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
