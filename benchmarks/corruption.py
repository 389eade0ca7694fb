"""One byte flipped in every artifact of a finished smoke run: each must be named and refused, and made anew by a rerun.

value: share of the damaged artifacts that a read refuses by name; bar: all, and the rerun gives the old digests.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import finish
from benchmarks.record import record
from infra.artifacts import RECORD
from infra.errors import ArtifactCorrupted
from infra.storage import open_store

SEED = 0


def flip(folder: Path, rng: random.Random) -> Path:
    """Flip one bit of one file of an artifact."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD and path.stat().st_size)
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.chmod(0o644)
    path.write_bytes(data)
    return path


def main() -> dict[str, Any]:
    """Damage every artifact, read every artifact, run again."""
    rng = random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expected = finish(root)
        store = open_store(str(root))
        artifacts = [
            store.find(path.parent.parent.name, path.parent.name) for path in sorted(root.glob(f"*/*/{RECORD}"))
        ]
        refused, missed = 0, []
        for artifact in artifacts:
            assert artifact is not None
            damaged = flip(Path(artifact.uri.removeprefix("file://")), rng)
            try:
                store.local(artifact)
                missed.append(str(damaged.relative_to(root)))
            except ArtifactCorrupted as error:
                refused += artifact.stage in str(error)
        again = finish(root)
    share = refused / len(artifacts)
    return record("corruption", [SEED], share, 1.0, 1.0, share == 1.0 and again == expected,
                  {"artifacts": len(artifacts), "missed": missed, "rebuilt": again == expected})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
