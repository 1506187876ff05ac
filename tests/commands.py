"""Commands as a user types them, in this process."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

import lcsc_opt.optimizers  # noqa: F401 - else the first command says that it imports them


def become_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Of stderr; called by a test itself, since pytest puts its own stderr back after the fixtures."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("sys.stderr", stream)
    return stream


class Typed:
    """Runs a command that must end with a status, and gives what it prints."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *command: str, status: int = 0) -> Any:
        """``out`` and ``err``."""
        from lcsc_opt.cli import run

        self._capsys.readouterr()
        assert run(command) == status
        return self._capsys.readouterr()

    def json(self, *command: str) -> Any:
        """What it prints for programs."""
        return json.loads(self(*command, "--format", "json").out)

    def refused(self, *command: str) -> str:
        """The one line that a wrong input is answered with."""
        said = self(*command, status=2).err
        (line,) = [line for line in said.splitlines() if line.startswith("lcsc: ")]
        assert "Traceback" not in said, said
        return str(line)
