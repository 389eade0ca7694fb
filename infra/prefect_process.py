"""The process of our Prefect server: `python -m infra.prefect_process HOST PORT PARENT`, ended by Linux with its parent.

Prefect's own command does more than we need and costs a second; the garbage collector rests while modules load.
"""

import ctypes
import gc
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Linux: be killed when the thread that started this process ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        raise SystemExit("the process that started the Prefect server is gone")


def main(host: str, port: int, parent: int) -> None:
    """Serve Prefect's API and UI until SIGTERM."""
    end_with(parent)
    gc.disable()
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(final=True)
    gc.freeze()
    gc.enable()
    uvicorn.run(app, host=host, port=port, log_level="error", lifespan="on", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
