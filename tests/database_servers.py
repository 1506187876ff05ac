"""A real PostgreSQL server for the tests: its own cluster in a temporary folder, on a free port of loopback."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

USER = "lcsc"
PASSWORD = "p@ss:w/{rd}%"
SECONDS_TO_START = 60
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "60"}


class Postgresql:
    """A running server; ``connect`` is as its superuser."""

    def __init__(self, port: int) -> None:
        self.port, self._databases = port, 0

    def url(self, database: str) -> str:
        return f"postgresql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a database that nobody used before."""
        self._databases += 1
        name = f"studies_{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, command: str, *parameters: Any) -> list[Any]:
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname="postgres", autocommit=True
        ) as connection:
            cursor = connection.execute(command, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def terminate_backends(self, url: str, *, state: str = "%") -> int:
        """End every connection to a database that is in this state, as an administrator does; how many there were."""
        command = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND state LIKE %s"
        return len(self.execute(command, url.rpartition("/")[2], state))


def find_binaries() -> Path | None:
    """The folder of ``initdb`` and ``postgres``: Debian keeps them out of the search path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    candidates = [*debian, *([Path(found).resolve().parent] if found else [])]
    return next((folder for folder in candidates if (folder / "postgres").exists()), None)


@contextlib.contextmanager
def postgresql(*, durable: bool = False) -> Iterator[Postgresql]:
    """Start a server, and stop it at the end; skips where none is installed, unless this is CI.

    Args:
        durable: it waits for the disk, as servers do whose times are measured.
    """
    binaries = find_binaries()
    if binaries is None:
        explain = pytest.fail if os.environ.get("CI") else pytest.skip
        explain("no PostgreSQL server on this machine: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="lcsc-postgresql-", ignore_cleanup_errors=True) as folder:
        yield from _running(binaries, Path(folder), {} if durable else FAST)


def _running(binaries: Path, folder: Path, more_settings: Mapping[str, str]) -> Iterator[Postgresql]:
    who = _someone_but_root(folder)
    data, password, port = folder / "data", folder / "password", free_port()
    password.write_text(f"{PASSWORD}\n")
    initdb = [binaries / "initdb", "-D", data, "-U", USER, "--pwfile", password, "-A", "scram-sha-256"]
    initdb += ["--no-sync", "-E", "UTF8", "--locale=C"]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **who)  # type: ignore[arg-type]
    settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": folder, **more_settings}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    dies_with_us = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*dies_with_us, binaries / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=folder, **who
        )
    try:
        server = Postgresql(port)
        _wait_until_ready(server, process, folder / "log")
        yield server
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
        process.wait(timeout=120)


def _someone_but_root(folder: Path) -> dict[str, Any]:
    """PostgreSQL refuses to run as root; Debian's package brings a user for it."""
    if os.geteuid() != 0:
        return {}
    account = pwd.getpwnam("postgres")
    os.chown(folder, account.pw_uid, account.pw_gid)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def free_port() -> int:
    """On loopback."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _wait_until_ready(server: Postgresql, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            server.execute("SELECT 1")
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL does not start: {log.read_text(errors='replace')}")
            time.sleep(0.05)
