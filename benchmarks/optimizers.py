"""Which optimizer to pick: FID on held-out noise against what a search cost, over seeds, objectives and K.

    python benchmarks/optimizers.py [--quick] [--objective NAME …] [--checkpoints K …] [--optimizer LABEL …]
                                    [--seeds 5] [--jobs 2] [--tables]

``contest/entries.py`` lists the contenders, the objectives and the numbers of images. All studies are in
``results/optimizers.db``: after an interruption, the same command continues. ``--tables`` runs nothing, and writes the
tables of the finished studies. ``--jobs`` studies run at once, each in a process with one thread.

For every search, the answers that it would have given after 1,000, 2,000, … images are measured once on held-out
noise. Writes ``results/optimizers.csv`` (every such answer), ``results/optimizers_summary.csv``, the tables of
``docs/benchmarks.md`` and the figures of ``docs/images/``. Searches that the database does not have, as it is not
committed, are those of these files. ``--quick`` takes minutes, with a small budget, writes
``results/optimizers_quick.*``, and leaves ``docs/`` alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from pathlib import Path

from common import RESULTS, machine, read_csv, trained, write_csv
from contest.answers import answers, from_table, measured
from contest.drawing import cost_curve, objective_figure
from contest.entries import CELLS, CONTENDERS, EMA, PAPER, QUICK_CELLS, Cell, Contender
from contest.numbers import Curves, Interval, Result, curves_of, results
from contest.page import (
    POINT_HEADER,
    SUMMARY_HEADER,
    cell_table,
    insert,
    order_table,
    point_rows,
    summary_row,
)
from contest.working import FAILED, Job, is_done, known_results, work

from lcsc_opt.base.errors import LcscError
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.figures.writing import write_figure

DOCS = Path(__file__).parents[1] / "docs"
SEEDS = 5
FIRST_SEED = 10  # settings of optimizers were chosen with smaller seeds
HEADLINE = CELLS[0]
"""The cell of the page's first picture."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The part of the contest that is run and tabulated, and its database."""

    name: str
    cells: tuple[Cell, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]

    @property
    def url(self) -> str:
        """The URL of the database."""
        return f"sqlite:///{RESULTS / self.name}.db"

    def contenders_of(self, cell: Cell) -> list[Contender]:
        """The contenders in a cell."""
        return [contender for contender in self.contenders if cell.baselines or not contender.baseline]

    def jobs(self) -> list[Job]:
        """Every study, the most important first: cell by cell, and seed by seed, so that all contenders keep up.

        Baselines come after all other contenders of their cell.
        """
        return [
            Job(self.url, cell, contender, seed)
            for cell in self.cells
            for baseline in (False, True)
            for seed in self.seeds
            for contender in self.contenders_of(cell)
            if contender.baseline == baseline and seed in contender.seeds(self.seeds)
        ]


def main() -> None:
    """Run the chosen studies that are missing, then write tables and figures of all finished studies."""
    arguments = _arguments()
    chosen = _selection(arguments)
    RESULTS.mkdir(exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that run the studies
    print(machine())
    try:
        failed = 0 if arguments.tables else run(chosen, arguments.jobs)
        tabulate(_everything(chosen, quick=arguments.quick), docs=not arguments.quick)
    except LcscError as error:
        sys.exit(f"optimizers.py: {error}")
    if failed:
        sys.exit(f"{failed} studies failed; mend the cause and run the same command again")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small budget and two seeds: minutes")
    parser.add_argument("--objective", action="append", choices=sorted({cell.objective for cell in CELLS}))
    parser.add_argument("--checkpoints", action="append", type=int, choices=sorted({c.checkpoints for c in CELLS}))
    parser.add_argument("--optimizer", action="append", choices=[contender.label for contender in CONTENDERS])
    parser.add_argument("--seeds", type=int, help="how many: 5, with --quick 2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="studies at once: one for each core")
    parser.add_argument("--tables", action="store_true", help="run nothing: tables and figures of what is there")
    return parser.parse_args()


def _selection(arguments: argparse.Namespace) -> Selection:
    cells = [
        cell
        for cell in (QUICK_CELLS if arguments.quick else CELLS)
        if cell.objective in (arguments.objective or [cell.objective])
        and cell.checkpoints in (arguments.checkpoints or [cell.checkpoints])
    ]
    contenders = [entry for entry in CONTENDERS if entry.label in (arguments.optimizer or [entry.label])]
    seeds = arguments.seeds or (2 if arguments.quick else SEEDS)
    name = "optimizers_quick" if arguments.quick else "optimizers"
    return Selection(name, tuple(cells), tuple(contenders), tuple(range(FIRST_SEED, FIRST_SEED + seeds)))


def _everything(chosen: Selection, *, quick: bool) -> Selection:
    """The chosen part, and all that an earlier command may have run: a table never loses lines."""
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + max(SEEDS, len(chosen.seeds))))
    return Selection(chosen.name, QUICK_CELLS if quick else CELLS, CONTENDERS, seeds)


def run(chosen: Selection, processes: int) -> int:
    """Run the missing studies; returns how many failed."""
    reader = HistoryReader(open_storage(chosen.url, write=True))
    jobs = chosen.jobs()
    missing = [job for job in jobs if not is_done(reader, job)]
    print(f"{len(jobs)} studies, {len(jobs) - len(missing)} of them done", flush=True)
    for cell in dict.fromkeys(job.cell for job in missing):
        trained(cell.objective, f"--checkpoint-every={cell.checkpoint_every}", output=cell.name)
    start, failed = time.perf_counter(), 0
    try:
        for count, line in enumerate(work(missing, processes) if missing else (), start=1):
            failed += line.startswith(FAILED)
            print(f"{count}/{len(missing)}, {time.perf_counter() - start:.0f} s: {line}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: nothing is lost; the same command continues, --tables shows what is there", file=sys.stderr)
        sys.exit(130)
    return failed


def tabulate(chosen: Selection, *, docs: bool) -> None:
    """Write tables and figures of all finished studies, and of those that only the tables still have."""
    field = {cell: curves for cell in chosen.cells if (curves := read(chosen, cell))}
    found = {cell: results(cell, curves, ema=EMA, paper=PAPER) for cell, curves in field.items()}
    before = {tuple(row[:4]): row[12:15] for row in read_csv(f"{chosen.name}_summary")}  # chosen and its interval
    for cell, ranked in found.items():
        for i, result in enumerate(ranked):
            known = before.get((cell.objective, str(cell.checkpoints), str(cell.images), result.label), [""])
            if result.chosen is None and known[0]:
                value, *ends = (float(end) if end else None for end in known)
                ranked[i] = dataclasses.replace(result, chosen=Interval(value or math.nan, *ends))
    tables = [line for cell, ranked in found.items() for line in cell_table(cell, ranked)]
    print("\n".join(["", *tables]))
    write_csv(chosen.name, POINT_HEADER, [row for cell, curves in field.items() for row in point_rows(cell, curves)])
    rows = [summary_row(cell, result) for cell, ranked in found.items() for result in ranked]
    print(write_csv(f"{chosen.name}_summary", SUMMARY_HEADER, rows))
    draw(chosen, field, docs=docs)
    if docs:
        _write_page(found)


def read(chosen: Selection, cell: Cell) -> list[Curves]:
    """The curves of every contender with a finished study."""
    reader = HistoryReader(open_storage(chosen.url, write=True))
    curves, before = [], [row for row in read_csv(chosen.name) if row[:2] == [cell.objective, str(cell.checkpoints)]]
    for contender in chosen.contenders_of(cell):
        studies, answered = {}, {}
        for seed in contender.seeds(chosen.seeds):
            job = Job(chosen.url, cell, contender, seed)
            if not is_done(reader, job):
                continue
            [history] = reader.read_studies([job.spec.name])
            known = known_results(StoredStudy.open(reader.storage, job.spec.name), cell)
            studies[seed] = measured(answers(reader.trials(history), cell.limits), known) or []
            answered[seed] = None if history.found is None else history.found.loss
        if studies := studies or from_table([row[3:] for row in before if row[2] == contender.label]):
            curves.append(curves_of(contender, studies, cell.limits, answered))
    return curves


def draw(chosen: Selection, field: dict[Cell, list[Curves]], *, docs: bool) -> None:
    """A figure for each objective, and the README's first picture."""
    folder, suffix = (DOCS / "images", ".png") if docs else (RESULTS, ".html")
    figures = {}
    for objective in dict.fromkeys(cell.objective for cell in field):
        cells = {cell: field[cell] for cell in field if cell.objective == objective}
        figures[folder / f"{chosen.name}_{objective}{suffix}"] = objective_figure(
            dict(sorted(cells.items(), key=lambda item: item[0].checkpoints))
        )
    if HEADLINE in field:
        main = {contender.label for contender in CONTENDERS if not contender.baseline}
        shown = [curves for curves in field[HEADLINE] if curves.label in main]
        figures[folder / f"cost_curve{suffix}"] = cost_curve(HEADLINE, shown)
    for path, figure in figures.items():
        write_figure(path, figure)
        print(path)


def _write_page(found: dict[Cell, list[Result]]) -> None:
    page = DOCS / "benchmarks.md"
    pictures = [f"![{name}](images/optimizers_{name}.png)" for name in dict.fromkeys(cell.objective for cell in found)]
    tables = cell_table(HEADLINE, found[HEADLINE]) if HEADLINE in found else ["Not measured yet."]
    blocks = {"machine": [machine()], "order": order_table(found)}
    insert(page, {**blocks, "tables": tables, "pictures": pictures})
    print(page)


if __name__ == "__main__":
    main()
