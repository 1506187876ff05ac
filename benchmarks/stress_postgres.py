"""A PostgreSQL server on loopback in a temporary folder, if its programs are installed."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

NO_SERVER = "no PostgreSQL programs on this machine"


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._port, self._databases = port, 0

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A connection that commits each statement."""
        return psycopg.connect(f"postgresql://lcsc@127.0.0.1:{self._port}/{database}", autocommit=True)

    def new_database(self) -> str:
        """The URL of a fresh database."""
        self._databases += 1
        name = f"stress{self._databases}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://lcsc@127.0.0.1:{self._port}/{name}"


@contextlib.contextmanager
def postgres_server() -> Iterator[Server | None]:
    """Start a server, and stop it at the end; ``None`` if it is not installed. As root, use the user ``postgres``."""
    programs = _programs()
    if programs is None:
        yield None
        return
    user = "postgres" if getpass.getuser() == "root" else None
    with tempfile.TemporaryDirectory(prefix="lcsc-postgres-", ignore_cleanup_errors=True) as folder:
        if user is not None:
            shutil.chown(folder, user)
        data, port = Path(folder) / "data", _free_port()
        environment = {**os.environ, "LC_ALL": "C"}

        def call(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", str(data), *arguments]
            subprocess.run(command, user=user, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

        call("initdb", "-A", "trust", "-U", "lcsc", "-E", "UTF8")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder}"
        call("pg_ctl", "start", "-w", "-l", str(Path(folder) / "log"), "-o", options)
        try:
            yield Server(port)
        finally:
            call("pg_ctl", "stop", "-w", "-m", "immediate")


def _programs() -> Path | None:
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    onpath = shutil.which("initdb")
    found = [*([Path(onpath).resolve().parent] if onpath else []), *reversed(known)]
    return next((path for path in found if (path / "pg_ctl").exists()), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
