"""Running a user's command to its end. Nothing that it started outlives the evaluation."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.objective.command_output import last_line
from lcsc_opt.objective.contract import stop_if_told

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5  # between SIGTERM and SIGKILL

_GUARD = """
read _                                          # returns when the other end of the pipe is closed
kill -TERM "-$1" || exit
tenths=$(($2 * 10))
while kill -0 "-$1" && [ "$tenths" -gt 0 ]; do
    sleep 0.1
    tenths=$((tenths - 1))
done
kill -KILL "-$1"
"""
"""A shell script that ends the process group ``$1`` once its input ends, with a grace of ``$2`` seconds."""


def run_command(words: Sequence[str]) -> str:
    """Run a command without a shell, and return its standard output.

    If the evaluation is interrupted, the command and all its descendants are ended.

    Raises:
        ObjectiveError: its exit status is not zero; the message ends with the last line that it printed.
        KeyboardInterrupt: this evaluation is no longer needed.
    """
    process = subprocess.Popen(  # noqa: S603 - the user's own command
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # makes it the leader of a process group, too
    )
    with process, _ended_with_this_process(process):
        output, errors = _wait(process)
    if process.returncode:
        reason = last_line(errors) or last_line(output)
        raise ObjectiveError(f"command: ended with {process.returncode}{reason}")
    return output


def _wait(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The standard output and the standard error of a process, when it has ended."""
    while True:
        try:
            return process.communicate(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            stop_if_told()


@contextlib.contextmanager
def _ended_with_this_process(process: subprocess.Popen[str]) -> Iterator[None]:
    """End the process group of ``process`` if the block raises, or if this process dies, even by SIGKILL.

    A second process guards the group. It waits on a pipe whose other end only this process holds, so the operating
    system tells it about any death.
    """
    if os.name != "posix":  # Windows has neither process groups nor sh
        try:
            yield
        except BaseException:
            process.kill()
            raise
        return
    try:
        guard = subprocess.Popen(  # noqa: S603 - our own script
            ["/bin/sh", "-c", _GUARD, "guard", str(process.pid), str(_GRACE_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not reach the guard
        )
    except BaseException:
        process.kill()
        raise
    with guard:
        try:
            yield
        except BaseException:
            assert guard.stdin is not None
            guard.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2 * _GRACE_SECONDS)
            process.kill()
            guard.wait()  # Popen's own exit hardly waits after Ctrl-C
            raise
        guard.kill()  # the command has ended by itself
