"""Free space, asked before a run needs it."""

import shutil
from pathlib import Path

from infra.errors import ConfigError
from infra.local_files import local_path


def require_disk(root: str | Path, needed: int) -> None:
    """Refuse to start when the disk under a local `root` has less than `needed` bytes free."""
    if str(root).startswith("s3://"):
        return
    place = local_path(str(root))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"disk under {root} has {free / 1e9:.1f} GB free, the run needs {needed / 1e9:.1f} GB; "
            "free some space or choose another place with --root"
        )
