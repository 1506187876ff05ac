"""What :func:`lcsc_opt.search` returns: the studies of one experiment, as they are in the database."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import dump_yaml
from lcsc_opt.database.connection import reading
from lcsc_opt.database.history import Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.urls import files_directory
from lcsc_opt.experiment.api import Study
from lcsc_opt.exports.chosen import Chosen
from lcsc_opt.views import percent
from lcsc_opt.views.answer import first_line
from lcsc_opt.views.ranking import ranking, spread_text
from lcsc_opt.views.tables import comparison_rows

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Comparison(list[dict[str, Any]]):
    """The results of an experiment's studies, a row each, as of ``lcsc compare --format json``.

    Printed, it is a table of the answer, of the optimizers over their seeds, and of the trainer's models.
    """

    def __init__(self, studies: Sequence[Standing]) -> None:
        super().__init__(comparison_rows(studies))
        self._studies = studies

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, the best first: an optimizer over its seeds, or a model of the trainer's."""
        rows = []
        for row in ranking(self._studies):
            losses = [spread_text(row.held_out), percent(row.below_ema), spread_text(row.searched)]
            rows.append([row.label, *losses, f"{row.evaluations:.0f}", f"{row.seconds:.1f} s"])
        return ["", "held out", "against EMA*", "searched", "evaluations", "time"], rows

    def __repr__(self) -> str:
        header, rows = self.table()
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        lines = []
        for line in [header, *rows]:
            cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            lines.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        header, rows = self.table()
        lines = ["<table>", _html_row(header, "th")]
        lines += [_html_row(row, "td") for row in rows]
        return "".join([*lines, "</table>"])


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Result:
    """What a search found, read from its database whenever it is asked for.

    Attributes:
        name: of the experiment.
        storage: the URL of the database.
        studies: one for each optimizer.
        _content: of the study file that asks for the same studies.
        _not_importable: argument → what Python calls its function, of those that no study file can import.
        _is_temporary: whether the database is deleted with the result.
    """

    name: str
    storage: str
    studies: tuple[Study, ...]
    _content: Mapping[str, Any]
    _not_importable: Mapping[str, str]
    _is_temporary: bool

    @property
    def study(self) -> Study:
        """The study that found the answer; the first one, if the answer was there before any search.

        Where nothing is held out, the one with the lowest searched loss.

        Raises:
            StudyStoreError: no study has a complete trial.
        """
        chosen = self._chosen()
        # another call may have found it
        return dataclasses.replace(self.studies[0], name=chosen.study)

    @property
    def coefficients(self) -> Coefficients:
        """``[K]`` of the answer, or ``[S, K]`` with rows; they sum to one. Of the trainer's own EMA ``[K + 1]``.

        Raises:
            StudyStoreError: no study has a complete trial.
        """
        return self._chosen().model.coefficients

    def merge(self) -> dict[str, Tensor]:
        """The merged state dict of the answer, on the CPU, for ``net.load_state_dict``.

        The answer is the best model that is known, by noise that the searches did not see: found, or one that was there
        before, such as EMA* or the last checkpoint. Where nothing is held out, it is the trial with the lowest searched
        loss. A single search's own is ``result.studies[i].merge()``.

        Its names are those of the checkpoints, or of the network where that has another prefix. Where checkpoints save
        tied weights under one of their names, as safetensors does, give ``strict=False``.

        Raises:
            StudyStoreError: no study has a complete trial.
            LcscError: as :meth:`Study.merge`.
        """
        return self.study.merge(self.coefficients)

    def compare(self) -> Comparison:
        """The held-out table: the answer, then each optimizer, against EMA*, the best plain average."""
        return Comparison(self._histories())

    def plot(self) -> go.Figure:
        """The best loss so far of each optimizer over evaluations, as a figure of plotly."""
        from lcsc_opt.views.figures.comparison import comparison_figure  # with plotly

        return comparison_figure(self._histories())

    def to_study_file(self, path: str | Path | None = None) -> str:
        """The study file that asks for the same studies.

        ``lcsc run`` continues them, or begins them anew if their database is deleted with this result.

        Args:
            path: where it is written; ``None`` only returns it.

        Raises:
            StudySpecError: a function cannot be imported, and the message names it; the checkpoints are deleted with
                this result; or the file cannot be written.
        """
        if self._not_importable:
            named = " and ".join(f"{argument} ({text})" for argument, text in self._not_importable.items())
            raise StudySpecError(
                f"{self.name}: a study file cannot import {named}: put it into a module, and give it from "
                "there, with accept_changes=True"
            )
        content = dict(self._content)
        if not self._is_temporary:
            content["storage"] = self.storage
        elif self._packed_in(files_directory(self.storage)):
            raise StudySpecError(
                f"{self.name}: its checkpoints were in memory, and their packed copy is deleted with this result: give "
                "search a storage, or the files of the checkpoints"
            )
        text = dump_yaml(content)
        if path is not None:
            write_atomically(Path(path), text, error=StudySpecError)
        return text

    def _packed_in(self, folder: Path) -> bool:
        """Whether the checkpoints were packed into this folder."""
        checkpoints = self._content["objective"]["settings"]["checkpoints"]
        return isinstance(checkpoints, str) and Path(checkpoints).is_relative_to(folder)

    def __repr__(self) -> str:
        studies = self._histories()
        return f"{first_line(studies)}\n{Comparison(studies)!r}"

    def _repr_html_(self) -> str:
        studies = self._histories()
        return f"<p><b>{html.escape(first_line(studies))}</b></p>{Comparison(studies)._repr_html_()}"

    def _histories(self) -> tuple[Standing, ...]:
        """The searches of the experiment as they are now, also those of other calls.

        Raises:
            StudyStoreError: all were deleted, or the database cannot be read.
        """
        with reading(self.storage) as storage:
            return HistoryReader(storage).read(self.name)

    def _chosen(self) -> Chosen:
        """The answer; without a report the trial with the lowest searched loss, of equal ones a grid's.

        Raises:
            StudyStoreError: no study has a complete trial.
        """
        with reading(self.storage) as storage:
            return Chosen.of(storage, self.name)


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
