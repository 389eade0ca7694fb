"""Python imports this at start when its folder is on PYTHONPATH: every host that is looked up or connected to is noted."""

import os
import sys

TRACE = os.environ.get("NETWORK_TRACE")


def _note(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):  # others are local sockets
        host = arguments[1][0]
    else:
        return
    handle = os.open(TRACE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, f"{host.decode() if isinstance(host, bytes) else host}\n".encode())
    os.close(handle)


if TRACE:
    sys.addaudithook(_note)
