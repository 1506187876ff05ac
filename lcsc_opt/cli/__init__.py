"""The command line: arguments in, text out. Each module is one group of commands; none of them holds logic.

Exit status: 0 done, 1 a search that failed, 2 wrong input, 129 the terminal was closed, 130 interrupted,
141 nobody reads the output, 143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.machine import let_waiting_threads_sleep
from lcsc_opt.base.progress import said_once
from lcsc_opt.cli import (
    cleaning,
    dashboard,
    exports,
    landscape,
    results,
    studies,
    training,
    trajectory,
)
from lcsc_opt.cli.output import OutputError, complain, outlive_terminals

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
    *(training.train, training.refine, training.neon),
    *(studies.init, studies.run, studies.resume, studies.fork, studies.list_, studies.show),
    *(results.compare, results.report, results.evaluate, exports.export, exports.apply),
    *(landscape.landscape, dashboard.dashboard, cleaning.delete, cleaning.cache),
):
    app.command(_command.__name__.rstrip("_"))(_command)
app.add_typer(trajectory.app, name="trajectory")


_INTERRUPTED = 128 + signal.SIGINT
_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none
_ENDING = (signal.SIGINT, signal.SIGTERM, *filter(None, [_HANGUP]))

# some versions of typer bring their own click, so the base of its errors is found from one of them
_USAGE_ERRORS: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


_signals: list[int] = []  # the signal that ended the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lcsc`` and exit with its status. After the first signal of :data:`_ENDING`, further ones are ignored."""
    let_waiting_threads_sleep()
    outlive_terminals()
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_once)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _end_once(number: int, _frame: Any) -> None:
    for ignored in _ENDING:
        signal.signal(ignored, signal.SIG_IGN)
    _signals.append(number)
    raise KeyboardInterrupt


def run(arguments: Sequence[str]) -> int:
    """Run ``lcsc`` with these arguments; gives the exit status."""
    command = typer.main.get_command(app)
    try:
        status = _invoked(command, arguments)
        if status != _INTERRUPTED:
            sys.stdout.flush()
    except LcscError as error:
        complain(str(error))
        if isinstance(error, OutputError):
            _forget_output()
        return error.exit_status
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        complain(f"the output cannot be written: {error.strerror}")
        _forget_output()
        return OutputError.exit_status
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:  # some versions of typer return it in place of raising
        complain(
            f"interrupted; everything finished is kept, run the same command{_resuming(command, arguments)} to continue"
        )
        return 128 + _signals[0] if _signals else _INTERRUPTED
    return status


def _invoked(command: Any, arguments: Sequence[str]) -> int:
    try:
        with said_once():
            return int(command.main(list(arguments), prog_name="lcsc", standalone_mode=False) or 0)
    except _USAGE_ERRORS as error:
        return _complain_about_usage(error)
    except SystemExit as ending:  # of typer, without a word, where nobody reads the output
        if isinstance(ending.__context__, BrokenPipeError):
            raise OutputError from None
        raise


def _resuming(command: Any, arguments: Sequence[str]) -> str:
    """What else the command that goes on has to say, where it begins anew without ``--resume``."""
    chosen = command.commands.get(next(iter(arguments), ""))
    asks = chosen is not None and any(parameter.name == "resume" for parameter in chosen.params)
    return " with --resume" if asks and "--resume" not in arguments else ""


def _forget_output() -> None:
    """Discard the rest of the output, which the interpreter would try to write again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain_about_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(f"{error.format_message()}\n")
    else:
        complain(" ".join(error.format_message().split()))
    return 2
