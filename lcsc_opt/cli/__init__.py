"""The command line: arguments in, text out. Each module is one group of commands; none of them holds logic.

Exit status: 0 done, 1 a search that failed, 2 wrong input, 129 the terminal was closed, 130 interrupted,
141 nobody reads the output, 143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.machine import let_waiting_threads_sleep
from lcsc_opt.base.progress import notice, said_once
from lcsc_opt.cli import cleaning, exports, results, studies, training, trajectory

app = typer.Typer(
    name="lcsc",
    help="Search the linear combination of saved checkpoints that samples best.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"lcsc_opt {VERSION}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Search the linear combination of saved checkpoints that samples best."""


for _command in (
    *(training.train, training.refine, studies.init),
    *(studies.run, studies.resume, studies.fork, studies.list_, studies.show),
    *(results.compare, results.report, results.evaluate, exports.export, exports.apply),
    *(results.landscape, results.dashboard, cleaning.delete, cleaning.cache),
):
    app.command(_command.__name__.rstrip("_"))(_command)
app.add_typer(trajectory.app, name="trajectory")

_INTERRUPTED = 128 + signal.SIGINT
_NOT_WRITTEN = 128 + 13  # SIGPIPE, which Windows has not
_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none
_ENDING = (signal.SIGINT, signal.SIGTERM, *filter(None, [_HANGUP]))

# some versions of typer bring their own click, so the base of its errors is found from one of them
_USAGE_ERRORS: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_signals: list[int] = []  # the signal that ended the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lcsc`` and exit with its status. After the first signal of :data:`_ENDING`, further ones are ignored."""
    let_waiting_threads_sleep()
    _outlive_terminals()
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_once)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


class _Terminal(io.FileIO):
    """What is written to a terminal; after it was closed, nobody reads it, and writing is no error."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(content)


def _outlive_terminals() -> None:
    """Let this process go on where its terminal is closed, as after ``lcsc run STUDY & disown``."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if os.isatty(descriptor) and os.name == "posix":
            raw = io.BufferedWriter(_Terminal(descriptor, "w", closefd=False))
            encoding = getattr(sys, name).encoding
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True))


def _end_once(number: int, _frame: Any) -> None:
    for ignored in _ENDING:
        signal.signal(ignored, signal.SIG_IGN)
    _signals.append(number)
    raise KeyboardInterrupt


@functools.cache  # it takes longer than many a command
def _commands() -> Any:
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run ``lcsc`` with these arguments; gives the exit status."""
    command = _commands()
    try:
        with said_once():
            status = int(command.main(list(arguments), prog_name="lcsc", standalone_mode=False) or 0)
        sys.stdout.flush()
    except LcscError as error:
        notice(str(error))
        return error.exit_status
    except _USAGE_ERRORS as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(f"{error.format_message()}\n")
        else:
            notice(" ".join(error.format_message().split()))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except (OSError, SystemExit) as error:
        cause = error.__context__ if isinstance(error, SystemExit) else error  # click and rich exit without a word
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        if cause.errno != errno.EPIPE:  # of `| head`, which has read what it wanted
            notice(f"the output cannot be written: {cause.strerror}")
        with contextlib.suppress(OSError, ValueError):  # the interpreter would write the rest when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOT_WRITTEN
    if status == _INTERRUPTED:  # some versions of typer return it in place of raising
        chosen = command.commands.get(next(iter(arguments), ""))
        begins_anew = chosen is not None and any(parameter.name == "resume" for parameter in chosen.params)
        again = " with --resume" if begins_anew and "--resume" not in arguments else ""
        notice(f"interrupted; everything finished is kept, run the same command{again} to continue")
        return 128 + _signals[0] if _signals else _INTERRUPTED
    return status
