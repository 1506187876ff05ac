"""``lcsc compare``, ``report``, ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcsc_opt.base.sweep import split_point
from lcsc_opt.cli.options import AcceptChanges, Output, Storage, Study, study_in, to_change, to_read
from lcsc_opt.cli.output import Format, console, number, print_json, print_report, print_texts, say, table

if TYPE_CHECKING:  # drawing is imported only when it is asked for
    from lcsc_opt.database.history import StudyHistory
    from lcsc_opt.database.store import StoredStudy
    from lcsc_opt.views.ranking import Ranked


def compare(
    experiment: Annotated[str, typer.Argument(help="The name of a study file, such as digits.")],
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the curves, or the trade-off of a sweep: .png, .svg, .pdf, .html, .json."),
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option(
            help="What the curves are drawn against: evaluations, images, model_calls or seconds; or two held-out "
            "metrics, as precision:fid, for their trade-off."
        ),
    ] = None,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Compare the optimizers of an experiment, or of a whole sweep.

    Prints a table over seeds; --plot draws the curves of an experiment, or the trade-off of a sweep.
    """
    from lcsc_opt.database.reader import HistoryReader
    from lcsc_opt.views.ranking import comparison_rows, comparison_table, different_samples, ranking
    from lcsc_opt.views.sweep import is_sweep, points_of

    reader = HistoryReader(to_read(storage))
    if is_sweep(reader, experiment):
        points = points_of(reader, experiment)
        _compare_sweep(experiment, points, output)
        if plot is not None:
            _draw([study for studies in points.values() for study in studies], axis or ":", plot)
        return
    studies = reader.read(experiment)
    if output is Format.json:
        print_json(comparison_rows(studies))
    else:
        _print_comparison(experiment, ranking(studies))
        if (metrics := comparison_table(studies)) is not None:
            print_texts(*metrics, title="\nevaluation metrics, held out")
    if (warning := different_samples(studies)) is not None:
        say(warning)
    _say_of_each(studies)
    if plot is not None:
        _draw(studies, axis, plot)


def _say_of_each(studies: Sequence[StudyHistory]) -> None:
    """Print which studies are unfinished, and warnings."""
    unfinished = [study.study for study in studies if not study.ended]
    if unfinished:
        say(f"unfinished: {', '.join(unfinished)}")
    for study in studies:
        if study.warning is not None:
            say(f"{study.study}: {study.warning}")


def _compare_sweep(name: str, points: Mapping[str, Sequence[StudyHistory]], output: Format) -> None:
    """Print a row for each optimizer at each point."""
    from lcsc_opt.views.ranking import metric_names, ranking
    from lcsc_opt.views.sweep import sweep_rows, varied_keys

    if output is Format.json:
        print_json(sweep_rows(points))
    else:
        keys, rows = varied_keys(points), [(point, row) for point in points for row in ranking(points[point])]
        names = metric_names([row for _, row in rows])
        metrics = [name for name in names if name.partition("@")[0] in ("precision", "recall", "fdr")]
        compared = ("searched", "held-out", "against EMA*", *metrics)
        shown = table(*keys, "optimizer", "seeds", *compared, "evaluations", "seconds", title=name)
        for point, row in rows:
            varied = split_point(point)[1]
            losses = [number(*(value or (None, None))) for value in (row.searched, row.held_out)]
            others = [number(*row.metrics.get(name, (None, None))) for name in metrics]
            costs = [f"{row.evaluations:.0f}", f"{row.seconds:.1f}"]
            values = [varied.get(key, "-") for key in keys]
            shown.add_row(*values, row.label, str(row.seeds), *losses, _against_ema(row), *others, *costs)
        console().print(shown)
    _say_of_each([study for studies in points.values() for study in studies])


def _against_ema(row: Ranked) -> str:
    return "-" if row.below_ema is None else f"{100 * row.below_ema:+.1f} %"


def _print_comparison(experiment: str, rows: Sequence[Ranked]) -> None:
    sampled = ["on images"] if any(row.held_out_images for row in rows) else []
    columns = ("seeds", "searched", "held-out", *sampled, "against EMA*", "evaluations", "images", "seconds")
    shown = table("optimizer", *columns, title=experiment)
    for row in rows:
        losses = [number(*(value or (None, None))) for value in (row.searched, row.held_out)]
        costs = [f"{row.evaluations:.0f}", f"{row.images:,.0f}", f"{row.seconds:.1f}"]
        images = [", ".join(f"{count:,}" for count in row.held_out_images) or "-"] * len(sampled)
        shown.add_row(row.label, str(row.seeds), *losses, *images, _against_ema(row), *costs)
    console().print(shown)


def _draw(studies: Sequence[StudyHistory], axis: str | None, path: Path) -> None:
    from lcsc_opt.views.curves import AXES, comparison_figure
    from lcsc_opt.views.figures.trade_off import trade_off_figure
    from lcsc_opt.views.figures.writing import write_figure

    if axis is not None and ":" in axis:
        x, _, y = axis.partition(":")
        figure = trade_off_figure(studies, x or None, y or None)
        if figure is None:
            say("nothing drawn: no two metrics were measured on held-out noise; see held_out_metrics")
            return
    elif axis is not None and axis not in AXES:
        raise typer.BadParameter(f"--axis: expected {', '.join(AXES)}, or METRIC:METRIC, got {axis!r}")
    else:
        figure = comparison_figure(studies, axis)
    write_figure(figure, path)
    say(f"drawn: {path}")


def report(
    experiment: Annotated[str, typer.Argument(help="The name of a study file, such as digits.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page; without it EXPERIMENT.html.")] = None,
    storage: Storage = None,
) -> None:
    """Write one page with everything about an experiment. Its tables, figures and images need no network."""
    from lcsc_opt.views.report import write_report

    path = write_report(to_read(storage), experiment, out or Path(f"{experiment}.html"))
    say(f"written: {path}")


def evaluate(
    study: Study,
    images: Annotated[
        int | None,
        typer.Option(
            min=2, help="For each trial and group; without it the study file's, else 50,000.", show_default=False
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="How many of the best trials to choose from; without it the study file's, else 5."),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups of held-out noise; several give a spread.")] = 1,
    first_group: Annotated[int, typer.Option(min=0, help="The seed of the first group; the others follow.")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Make this the study's result, which export and compare go by.")
    ] = False,
    accept_changes: AcceptChanges = False,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Choose among the best trials on noise the search never saw.

    The chosen trial, and EMA*, are reported on yet other noise.

    The first report becomes the study's result where it is no smaller than planned; later ones with --keep.
    """
    from lcsc_opt.search.held_out import HeldOutPlan
    from lcsc_opt.search.plan import StudyPlan
    from lcsc_opt.search.study import StudyRunner

    opened = to_change(storage)
    stored = study_in(opened, study)
    how: dict[str, Any] = {"images": images, "top": top, "groups": groups, "first_group": first_group}
    asked = HeldOutPlan.of(stored, **how, keep=keep)
    with StudyRunner(opened, accept_changes=accept_changes).open(StudyPlan.of(stored)) as searched:
        report = searched.evaluate(asked)
    if not asked.keep:
        say(f"{study}: a look only, the study's result is what it was; --keep replaces it")
    if output is Format.json:
        print_json(report)
        return
    _print_choice(stored, report)
    print_report(report, title=_measured("held out", report, groups=report["groups"]))
    for name, known in report.get("baselines", {}).items():
        label = f"{known['label']}: {known['study']}, trial {known['trial']}" if "study" in known else name
        console().print(f"{label}: {number(known['loss'])}")


def _print_choice(study: StoredStudy, report: dict[str, Any]) -> None:
    by_number = {trial.number: trial for trial in study.trials()}
    shown = table("trial", "searched", _measured("selection", report), "", title=study.name)
    for chosen, selection in zip(report["chosen_from"], report["selection"], strict=True):
        mark = "chosen" if chosen == report["trial"] else ""
        shown.add_row(str(chosen), number(by_number[chosen].value), number(selection), mark)
    console().print(shown)


def _measured(what: str, report: dict[str, Any], *, groups: Sequence[dict[str, Any]] = ()) -> str:
    """``what``, with the numbers of images and noise groups if the objective samples images."""
    if not report["images"]:
        return what
    seeds = ", ".join(str(group["seed"]) for group in groups)
    noise = f", noise group{'s' * (len(groups) > 1)} {seeds}" if groups else ""
    return f"{what}, {report['images']:,} images{noise}"
