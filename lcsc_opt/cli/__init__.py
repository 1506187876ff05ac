"""The command line: arguments in, text out. Each module is one group of commands; none of them holds logic.

Exit status: 0 done, 1 a search that failed, 2 wrong input, 130 interrupted,
141 nobody reads the output.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.machine import let_waiting_threads_sleep
from lcsc_opt.base.progress import INTERRUPTED, each_notice_once, log, messages_on_stderr, notice
from lcsc_opt.base.streams import results_apart, results_on_a_descriptor_of_their_own
from lcsc_opt.cli import deleting, exports, images, results, studies, training, trajectory

COMMANDS: tuple[Callable[..., None], ...] = (  # in the order of use; and trajectory
    training.train,
    studies.init,
    studies.run,
    studies.list_,
    studies.show,
    images.images,
    results.compare,
    results.report,
    results.dashboard,
    results.evaluate,
    exports.export,
    exports.apply,
    deleting.delete,
)

HELP = """A linear combination of your saved checkpoints is often better than the last checkpoint and any EMA of them.

lcsc finds it, or tells you that nothing better exists among those it tried. Nothing is trained.

To begin: lcsc init KIND FOLDER writes study.yaml for your checkpoints, and lcsc run study.yaml searches.

Exit status: 0 all is done, 1 a search failed, 2 wrong input, 130 interrupted.
"""

app = typer.Typer(
    name="lcsc",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        sys.stdout.write(f"lcsc_opt {VERSION}\n")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print details, and the traceback of an error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only, and no progress.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Act on the options of all commands."""
    if verbose and quiet:
        raise typer.BadParameter("expected -v or -q, not both")
    if verbose:
        log.setLevel(logging.DEBUG)
    if quiet:
        log.setLevel(logging.ERROR)


for _command in COMMANDS:
    app.command(_command.__name__.rstrip("_"))(results_apart()(_command))
app.add_typer(trajectory.app, name="trajectory")

_INTERRUPTED = 128 + signal.SIGINT
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one: the terminal was closed

# some versions of typer bring their own click, so the base of its errors is found from one of them
_USAGE_ERRORS: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lcsc`` and exit with its status. After the first signal of :data:`_ENDING`, further ones are ignored."""
    let_waiting_threads_sleep()
    results_on_a_descriptor_of_their_own()
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_once)
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        status = run(arguments)
    except (BrokenPipeError, SystemExit) as error:  # click makes the latter of the former
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # nobody reads on, as of `| head`, and the interpreter would write again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    gc.freeze()  # else Python looks through all objects of all packages again, for seconds, before it exits
    sys.exit(status)


def _end_once(*_: Any) -> None:
    """Interrupt the command; later signals must not interrupt what it does to end."""
    for ignored in _ENDING:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt


@functools.cache  # building it takes longer than many a command
def _commands() -> Any:
    return typer.main.get_command(app)


@messages_on_stderr()
def run(arguments: Sequence[str]) -> int:
    """Run ``lcsc`` with these arguments, and return the exit status."""
    try:
        _check_working_folder()
        with each_notice_once():
            status = int(_commands().main(list(arguments), prog_name="lcsc", standalone_mode=False) or 0)
    except LcscError as error:
        log.error("%s", error)
        log.debug("raised here", exc_info=True)
        return error.exit_status
    except _USAGE_ERRORS as error:
        # by name: click's own class is not that of the click which newer versions of typer contain
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(f"{error.format_message()}\n")
        else:
            message = error.format_message().replace("Value error, ", "")  # of pydantic, which newer versions contain
            log.error("%s", " ".join(message.split()))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:  # raised as an exception, or returned by some versions of typer
        notice(f"{INTERRUPTED}; run the same command to continue (lcsc train: with --resume)")
    return status


def _check_working_folder() -> None:
    """Refuse to begin in a folder that was removed.

    Raises:
        LcscError: so it was.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise LcscError("the working folder was removed: go to another one (cd)") from error
