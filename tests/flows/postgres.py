"""A PostgreSQL server of our own on loopback for the length of a test."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.embedded import free_port


def missing() -> str | None:
    """Why there cannot be one here."""
    if binary("initdb") is None:
        return "no PostgreSQL server binaries (Debian: postgresql)"
    if os.getuid() == 0 and "postgres" not in {each.pw_name for each in pwd.getpwall()}:
        return "PostgreSQL refuses root, and there is no user postgres"
    return None


def binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@contextmanager
def postgres(password: str) -> Iterator[str]:
    """The address of an empty database `prefect`, as SQLAlchemy wants it."""
    folder = Path(tempfile.mkdtemp(prefix="t2i-postgres-"))
    secret, data, port = folder / "password", folder / "data", free_port()
    secret.write_text(password)
    as_postgres: list[str] = []
    if os.getuid() == 0:
        as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        for path in (folder, secret):
            shutil.chown(path, "postgres", "postgres")

    def call(*command: str) -> None:
        done = subprocess.run([*as_postgres, *command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    call(str(binary("initdb")), "-D", str(data), "-U", "prefect", f"--pwfile={secret}", "--auth=scram-sha-256", "-N")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    pg_ctl = str(binary("pg_ctl"))
    call(pg_ctl, "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/postgres"
    finally:
        call(pg_ctl, "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
