"""``lcsc profile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcsc_opt.base.catalog import find
from lcsc_opt.base.study_file import read_study_file
from lcsc_opt.cli.options import Output
from lcsc_opt.cli.output import Format, console, duration, number, print_json, say, table

if TYPE_CHECKING:  # torch is imported only when a study is profiled
    from lcsc_opt.diagnostics.profiling import Part, Profile, Tried

GIGA = 1e9


def add_commands(app: typer.Typer) -> None:
    """Put this module's command into the app."""
    app.command("profile")(profile)


def profile(
    study_file: Annotated[str, typer.Argument(help="A study file, or the name of one in studies/.")],
    trials: Annotated[int, typer.Option(min=1, help="How many are measured, after one to warm up.")] = 5,
    optimizer: Annotated[
        str | None, typer.Option(help="Which one asks; without it the first of the file that searches.")
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Try other settings of sampling, too, and print those that help.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Also write a Chrome trace of two trials, for chrome://tracing or Perfetto.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Run a few trials, stored nowhere, and say where time goes. It also says what would make it less."""
    from lcsc_opt.database.urls import storage_url
    from lcsc_opt.diagnostics.profiling import check_trace_file, folder_of, plan_to_profile, profile_study, try_settings

    path = find("studies", study_file)
    spec = read_study_file(path)
    plan, studies = plan_to_profile(spec, path.parent, optimizer)
    if trace is not None:
        check_trace_file(trace)
    beside = folder_of(storage_url(None, spec.storage))
    found = profile_study(plan, trials=trials, studies=studies, beside=beside, trace=trace)
    tried = try_settings(plan) if settings else ()
    if output is Format.json:
        print_json({**found.as_row(), "settings": [other.as_row() for other in tried]})
    else:
        _print(found)
        _print_settings(tried)
    if trace is not None:
        say(f"trace: {trace}")


def _print(found: Profile) -> None:
    shown = table("", "seconds", "share", "speed", "limit", "reached", title=f"{found.study} on {found.device}")
    for part in found.parts:
        shown.add_row(part.name, f"{part.seconds:.4f}", f"{part.share:.0%}", *_speeds(part))
    shown.add_row("a trial", f"{found.seconds:.4f}", "", "", "", "")
    console().print(shown)
    for line in _facts(found):
        console().print(line)
    console().print(f"advice: {found.advice}", soft_wrap=True)


def _speeds(part: Part) -> tuple[str, str, str]:
    if part.rate is None or part.unit is None:
        return "", "", ""
    limit = "" if part.limit is None else _giga(part.limit)
    reached = "" if part.reached is None else f"{part.reached:.0%}"
    return f"{_giga(part.rate)} {part.unit}", limit, reached


def _giga(rate: float) -> str:
    """A rate in units of 10⁹, to three digits."""
    giga = rate / GIGA
    return f"{giga:,.0f}" if giga >= 100 else f"{giga:.3g}"


def _facts(found: Profile) -> list[str]:
    """Further results beside the table, a line each."""
    images = "" if found.images_per_second is None else f"; {found.images_per_second:,.0f} images/s"
    failed = f", {found.failed} of them failed" if found.failed else ""
    memory = f"memory: at most {found.memory_bytes / GIGA:.2f} GB, with what was read of the store"
    if found.device_bytes is not None:
        memory += f"; on the device {found.device_bytes / GIGA:.2f} GB"
    budget = f"{found.evaluations:,} evaluations take {duration(found.budget_seconds)} on one worker"
    if found.studies > 1:
        budget += f", the {found.studies} studies of the file about {duration(found.studies * found.budget_seconds)}"
    overlap = [f"{found.overlapped:.0%} of the time one part ran beside another"] if found.overlapped >= 0.01 else []
    return [f"average of {found.trials} trials{failed}{images}", *overlap, memory, budget]


def _print_settings(tried: Sequence[Tried]) -> None:
    if not tried:
        return
    from lcsc_opt.diagnostics.profiling import described, recommended, yaml_text

    shown = table("settings", "images/s", "times", "loss", "change", "")
    shown.columns[5].justify = "left"
    for other in tried:
        rate = "" if other.images_per_second is None else f"{other.images_per_second:,.0f}"
        ratio = "" if other.ratio is None else f"{other.ratio:.2f}"
        change = "" if other.loss_change is None else f"{other.loss_change:+.3%}"
        shown.add_row(described(other.settings), rate, ratio, number(other.loss), change, other.problem or "")
    console().print(shown)
    best = recommended(tried)
    if best is None:
        console().print("nothing is faster than the study file's own settings")
        return
    lines = [f"    {name}: {yaml_text(value)}" for name, value in best.settings.items()]
    console().print("\n".join([f"{best.ratio:.2f} times faster:", "objective:", "  settings:", *lines]))
