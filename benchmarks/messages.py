"""The messages of ``lcsc`` after common accidents, exactly as users see them: ``results/messages.md``.

    python benchmarks/messages.py [--only 4 16 ...]

Each row is a list of commands in a new folder. Exit statuses are in brackets; times and paths are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nevergrad  # noqa: F401 - imported once here, not by every forked command
import torch
from common import RESULTS, machine
from messages_rows import ROWS
from safetensors.torch import save_file

from lcsc_opt.cli import main as lcsc

REPOSITORY = Path(__file__).parents[1]
LONGEST = 40  # lines of output shown for one command


class Place:
    """A folder in which a user works."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def write(self, name: str, text: str) -> None:
        """Write a file as an editor does, with a newer modification time."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        later = time.time_ns() + 10**9 * len(self.lines)
        os.utime(path, ns=(later, later))

    def checkpoints(self, steps: range, folder: str = "runs") -> None:
        """Write a folder of small checkpoints."""
        (self.folder / folder).mkdir(exist_ok=True)
        for step in steps:
            weights = torch.linspace(0, step / 50, 6)
            save_file({"weights": weights}, self.folder / folder / f"model{step}.safetensors")

    def note(self, text: str) -> None:
        """Note what the user does between two commands."""
        self.lines.append(f"# {text}")

    def python(self, code: str) -> None:
        """Run a Python program to its end."""
        self._ended(f"python -c '{code.strip()}'", self._fork(lambda: exec(code, {})))

    def lcsc(self, command: str, *, out: str | None = None) -> None:
        """Run one command to its end. ``out`` is the file that its output goes to."""
        shown = f"lcsc {command}" + ("" if out is None else f" > {out}")
        self._ended(shown, self._fork(lambda: lcsc(_words(command)), out=out))

    @contextlib.contextmanager
    def meanwhile(self, command: str, number: signal.Signals = signal.SIGINT) -> Iterator[int]:
        """Run a command beside others, and end it with the signal ``number``."""
        (self.folder / "said2").unlink(missing_ok=True)
        process = self._fork(lambda: lcsc(_words(command)), said="said2")
        try:
            yield process
        finally:
            os.kill(process, number)
            self._ended(f"lcsc {command}    # in another terminal, ended by {number.name}", process, said="said2")

    @contextlib.contextmanager
    def locked(self, name: str = "studies.db") -> Iterator[None]:
        """While this is open, another program is in the middle of a transaction."""
        connection = sqlite3.connect(self.folder / name, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            connection.close()

    def until(self, true: Callable[[], object]) -> None:
        """Wait until ``true()`` is true, two minutes at most."""
        deadline = time.monotonic() + 120
        while not true() and time.monotonic() < deadline:
            time.sleep(0.05)

    def said(self, text: str) -> Callable[[], bool]:
        """A function that tells whether the command of :meth:`meanwhile` has printed ``text``."""
        said = self.folder / "said2"
        return lambda: said.exists() and text in said.read_text(errors="replace")

    def trials(self, *, atleast: int) -> Callable[[], bool]:
        """A function that tells whether the database holds at least so many trials."""

        def there() -> bool:
            database = contextlib.closing(sqlite3.connect(self.folder / "studies.db"))
            with contextlib.suppress(sqlite3.OperationalError), database as connection:
                return bool(connection.execute("SELECT COUNT(*) FROM trials").fetchone()[0] >= atleast)
            return False

        return there

    def _fork(self, run: Callable[[], object], *, said: str = "said", out: str | None = None) -> int:
        process = os.fork()
        if process:
            return process
        try:
            os.chdir(self.folder)
            sys.path.insert(0, str(self.folder))
            os.environ["LCSC_CACHE"] = str(self.folder / "cache")
            written = os.open(self.folder / said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(written, 2)
            os.dup2(written if out is None else os.open(out, os.O_WRONLY), 1)
            run()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            status = 1
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    def _ended(self, shown: str, process: int, *, said: str = "said") -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.lines += [f"$ {shown}", *_readable((self.folder / said).read_text(errors="replace"), self.folder)]
        self.lines.append(f"[{status}]")


def _words(command: str) -> list[str]:
    import shlex

    return shlex.split(command)


def _readable(text: str, folder: Path) -> list[str]:
    text = (
        re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace(str(folder), "FOLDER").replace(str(REPOSITORY), "REPOSITORY")
    )
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    shown = [line for line in lines if line]
    hidden = len(shown) - LONGEST
    return [*shown[:LONGEST], f"... {hidden} more lines"] if hidden > 0 else shown


def _keep(title: str, text: str) -> None:
    """Write one row into the page; the others stay."""
    page = RESULTS / "messages.md"
    parts = page.read_text().split("\n## ")[1:] if page.exists() else []
    rows = dict(part.rstrip("\n").split("\n", 1) for part in parts) | {title: text}
    sections = [f"## {name}\n{rows[name]}\n" for name in ROWS if name in rows]
    page.write_text("\n".join([f"# What it says\n\n{machine()}\n", *sections]))


def main() -> None:
    """Play the rows, print, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help="Rows, by the beginning of their titles.")
    asked = parser.parse_args()
    for title, play in ROWS.items():
        if asked.only and title.split()[0] not in asked.only:
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            place = Place(folder)
            play(place)
        finally:
            shutil.rmtree(folder)
        text = "\n".join(["", "```", *place.lines, "```"])
        sys.stdout.write(f"## {title}\n{text}\n\n")
        sys.stdout.flush()
        _keep(title, text)


if __name__ == "__main__":
    main()
