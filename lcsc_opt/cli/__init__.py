"""The command line: arguments in, text out. Each module is one group of commands; none of them holds logic.

Exit status: 0 done, 1 a search that failed or problems that `doctor` found, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import said_once
from lcsc_opt.cli import cleaning, dashboard, doctor, exports, landscape, profile, results, studies, trajectory
from lcsc_opt.cli.output import complain

app = typer.Typer(
    name="lcsc",
    help="Search the linear combination of saved checkpoints that samples best.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
studies.add_commands(app)
results.add_commands(app)
exports.add_commands(app)
landscape.add_commands(app)
dashboard.add_commands(app)
doctor.add_commands(app)
profile.add_commands(app)
cleaning.add_commands(app)
app.add_typer(trajectory.app, name="trajectory")


INTERRUPTED = 130

# typer brings its own click in some versions: the base of its errors is taken from where it is
USAGE_ERRORS: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lcsc`` and leave with its exit status."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run ``lcsc`` with these arguments; gives the exit status."""
    command = typer.main.get_command(app)
    try:
        with said_once():
            status = int(command.main(list(arguments), prog_name="lcsc", standalone_mode=False) or 0)
    except LcscError as error:
        complain(str(error))
        return error.exit_status
    except USAGE_ERRORS as error:
        return _complain_about_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # some versions of typer return it in place of raising
        complain("interrupted; everything finished is kept, run the same command to continue")
    return status


def _complain_about_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(f"{error.format_message()}\n")
    else:
        complain(" ".join(error.format_message().split()))
    return 2
