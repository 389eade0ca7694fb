"""Peak memory of a process, as Linux counts it."""

import logging
import re
import resource
from pathlib import Path

log = logging.getLogger(__name__)


def peak_memory(pid: int | None = None) -> int:
    """Peak resident bytes of a process, None for this one; 0 where another one cannot be seen."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:
        status = ""
    if found := re.search(r"VmHWM:\s+(\d+) kB", status):
        return int(found[1]) * 1024
    # getrusage also knows this process alone, but a child starts with its parent's figure there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if pid is None else 0


def forget_peak_memory() -> None:
    """Start this process's count anew (Linux), because a training process serves several stages."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("peak memory counts from the start of the process")
