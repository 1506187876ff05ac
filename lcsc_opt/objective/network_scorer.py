"""Scores a model by a Python function of its network, with the gradient in the weights if the score has a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import RAISED_BY_USERS, LcscError, ObjectiveError, one_line, raised_as
from lcsc_opt.base.files import same_working_folder
from lcsc_opt.base.imports import has_parameter
from lcsc_opt.base.progress import notice, without_bars
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Noise
from lcsc_opt.checkpoints.weights import varying_statistics
from lcsc_opt.objective.contract import stop_if_told
from lcsc_opt.objective.gradient import WeightGradient
from lcsc_opt.objective.model_files import MODEL_FILES
from lcsc_opt.objective.scorer import Draw, Floats, Scored, named_entries, outcomes
from lcsc_opt.sampling.batch_norm import BatchNormStatistics
from lcsc_opt.sampling.network import NetworkSettings, PreparedNetwork

FEWEST_OUTCOMES = 10  # of each half of what ``held_out`` returns
TRIAL_SIZE = 16  # items of the call that shows whether a score has a gradient
_LIFTS = {"fp16": (16, 12, 8, 4, 0)}  # for WeightGradient.add; other dtypes hold small gradients as they are
_NO_METRIC = ("<lambda>", "loss")  # names of functions that name no metric: "loss" is what the search minimizes


class NetworkScorer:
    """Calls a function with the network that has the merged weights.

    A function with a parameter of the name ``draw`` is called as ``function(model, draw=draw)``, others as
    ``function(model)``.

    The network is in evaluation mode, on the device. The function returns a number; a mapping of metrics, the first of
    which is the score; or single outcomes in one dimension, whose mean is the score. A generator may yield outcomes
    batch by batch. A tensor with a graph, or several from a generator, has a gradient, also inside a mapping.

    Args:
        network: gets the merged weights.
        function: scores it.
        settings: how the network is run.
        held_out: called in place of ``function`` for the final report, on data that no search sees; where it takes no
            draw, half of its outcomes choose the answer.
        batch_norm: passes data through the network, which estimates the statistics of batch normalization again;
            called like ``function``. ``None`` merges them.
        name: the names of the network and of the functions that decide the score.
        held_out_name: the name of ``held_out``.
        model_files: of a network that a folder's files describe: their names with their digests.
        repeats: how often the function is called for a score, which is the mean of what it returns; for each item,
            where it returns single outcomes.

    Attributes:
        device: where the network is.
        takes_draw: whether ``function`` measures on the data of a :class:`Draw`.
        has_data_of_reports: whether reports are measured on other data than searches.
    """

    def __init__(
        self,
        network: nn.Module,
        function: Callable[..., Any],
        settings: NetworkSettings | None = None,
        *,
        held_out: Callable[..., Any] | None = None,
        batch_norm: Callable[..., Any] | None = None,
        name: str,
        held_out_name: str | None = None,
        model_files: Mapping[str, str] | None = None,
        repeats: int = 1,
    ) -> None:
        self.repeats = repeats
        self._network = PreparedNetwork(network, settings)
        self.device = self._network.device
        self._function = function
        self._held_out = held_out
        self._name = name
        self._held_out_name = held_out_name
        self._model_files = model_files
        own_name = getattr(function, "__name__", "score")
        self._metric = "score" if own_name in _NO_METRIC else own_name
        self.takes_draw = takes_draw(function)
        self.has_data_of_reports = self.takes_draw or held_out is not None
        self._batch_norm = batch_norm
        self._statistics: BatchNormStatistics | None = None

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Name → parameter or buffer of the network, of its adapter if it has one."""
        return self._network.weights.state

    def load(self, weights: Mapping[str, Tensor], *, as_saved: bool = False) -> None:
        """Put merged weights into the network; ``as_saved`` ones with their own statistics of batch normalization.

        Raises:
            ObjectiveError: they do not fit it.
        """
        self._network.load(weights)
        if self._statistics is not None and not as_saved:
            self._statistics.estimate()

    def estimate_statistics(self, varying: Collection[str]) -> None:
        """From now on, estimate the statistics of normalizations that are among ``varying``, if there is a function.

        ``varying`` are the names of the tensors that differ between checkpoints. A notice says if they are merged.
        """
        statistics = varying_statistics(self._network.module.state_dict(), varying)
        if self._batch_norm is not None:
            self._statistics = BatchNormStatistics(self._network.module, self._passes(self._batch_norm), varying)
        elif statistics:
            notice(
                f"{statistics[0].mean}: statistics of batch normalization are merged; "
                "batch_norm: module:function in the objective's settings estimates them again"
            )

    def measure(
        self, weights: dict[str, Tensor], draw: Draw, varying: Collection[str] | None = None, *, as_saved: bool = False
    ) -> tuple[Scored, Mapping[str, Tensor]]:
        """The metrics, of which the first one is the score, and the gradient of the score: name → tensor.

        The gradient follows the graph of what the function returned, or that of each batch in turn.

        Args:
            weights: name → tensor; they are used once, and the dictionary is cleared.
            draw: on which data.
            varying: the names of the weights to differentiate in; ``None`` computes no gradient.
            as_saved: whether the weights are those of one checkpoint.

        Raises:
            ObjectiveError: there is no score, or a gradient is asked for and the score has no graph.
            MetricError: a metric is not finite.
        """
        self.load(weights, as_saved=as_saved)
        weights.clear()  # frees their memory
        if varying is None:
            return self._metrics(draw), {}
        return self._metrics_and_gradient(draw, varying)

    # not inference mode: networks may keep tensors, and a later graph could not use those
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _metrics(self, draw: Draw) -> Scored:
        """What the function returns, as metrics, without a gradient."""
        with self._network.arithmetic():
            calls = [self._outcomes(returned) for returned in self._calls(draw)]
            stop_if_told()
        if self._halves_held_out(draw):
            return self._half(calls, draw)
        return Scored.of(_over_calls(calls), self._metric)

    def _outcomes(self, returned: Any) -> dict[Any, Floats]:
        """What one call has returned: name → outcomes; of a generator those of all batches."""
        if isinstance(returned, Iterator):
            batches: list[Floats] = []
            for batch in returned:
                stop_if_told()
                batches.append(outcomes(self._metric, batch))
            returned = _joined(batches)
        return {entry: outcomes(str(entry), value) for entry, value in named_entries(returned, self._metric).items()}

    def _halves_held_out(self, draw: Draw) -> bool:
        """Whether the outcomes of ``held_out`` are divided among the choice of the answer and its report.

        One that takes a draw need not be: its data are for the report, and other draws of the score choose.
        """
        if self._held_out is None or takes_draw(self._held_out):
            return False
        return draw.group in (SELECTION.group, HELD_OUT.group)

    def _half(self, calls: Sequence[Mapping[Any, Floats]], draw: Draw) -> Scored:
        """Every other outcome of ``held_out``: one half is for the choice of the answer, the other for its report.

        Too few outcomes, or numbers, are not divided: the report has them all, and the search's data choose. Metrics
        beside the score that have another number of outcomes are not divided, either.
        """
        columns = _over_calls(calls)
        score = next(iter(columns))
        if min(len(call[score]) for call in calls) < 2 * FEWEST_OUTCOMES:
            if draw.group == SELECTION.group:
                notice(
                    f"held_out: returned fewer than {2 * FEWEST_OUTCOMES} single outcomes, so the answer is chosen by "
                    "the data of the search; return more, and every other one chooses it"
                )
                return self._metrics(Draw.of(SEARCH, draw.size))
            return Scored.of(columns, self._metric)
        first = 0 if draw.group == SELECTION.group else 1
        size = len(columns[score])
        halves = {entry: values[first::2] if len(values) == size else values for entry, values in columns.items()}
        return Scored.of(halves, self._metric)

    @torch.inference_mode(mode=False)  # whatever mode the caller is in
    @torch.enable_grad()
    def _metrics_and_gradient(self, draw: Draw, varying: Collection[str]) -> tuple[Scored, Mapping[str, Tensor]]:
        """As :meth:`measure`, with the weights that are in the network. One batch has a graph at a time."""
        weights = self._network.weights.differentiable(varying)
        calls: list[dict[Any, Floats]] = []
        with contextlib.closing(WeightGradient(weights)) as total, self._network.arithmetic():
            for returned in self._calls(draw):
                batches: list[Floats] = []
                for score in _scores_in(returned):
                    stop_if_told()
                    if not _has_graph(score):
                        raise ObjectiveError(
                            f"a gradient was asked for, and {self._metric} returned {_no_graph(score)}"
                        )
                    batches.append(outcomes(self._metric, score))
                    total.add(score, torch.ones_like(score), lifts=_LIFTS.get(self._network.settings.dtype, (0,)))
                scores = _joined(batches)
                entries = {self._metric: scores} if isinstance(returned, Iterator) else self._outcomes(returned)
                calls.append(entries)
        # total has the sums over all outcomes, and the score is their mean
        count = sum(len(next(iter(call.values()))) for call in calls)
        gradients = {name: gradient / count for name, gradient in total.sums.items()}
        return Scored.of(_over_calls(calls), self._metric), gradients

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def why_no_gradient(self, varying: Collection[str], size: int | None) -> str | None:
        """Call the function once, with the weights that are in the network, and check the score for a graph.

        Args:
            varying: the names of the weights to differentiate in.
            size: the number of items of an evaluation; this call uses at most :data:`TRIAL_SIZE`.

        Raises:
            ObjectiveError: the function raised an error, or returned no number.
        """
        reason = self._network.weights.why_no_gradient(varying)
        if reason:
            return reason
        draw = Draw.of(SEARCH, None if size is None else min(size, TRIAL_SIZE))
        try:
            with (
                same_working_folder(),
                without_bars(),
                self._network.weights.differentiable(varying),
                self._network.arithmetic(),
            ):
                score = next(_scores_in(next(self._calls(draw))), None)
        except (LcscError, torch.OutOfMemoryError):  # the second says nothing about the function
            raise
        except RAISED_BY_USERS as error:
            # without one, as where it calls numpy(), it may work; else this raises
            with raised_as(ObjectiveError, f"score: {self._name}:"), same_working_folder(), without_bars():
                self._metrics(draw)
            return f"with an autograd graph, {self._name} raised {one_line(error)}"
        if _has_graph(score):
            return None
        outcomes(self._metric, score)
        return f"{self._metric} returned {_no_graph(score)}"

    def statistics(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Statistics of batch normalization, if they are estimated again."""
        if self._statistics is None:
            return {}
        self.load(weights)
        return self._statistics.values()

    @property
    def describes_model(self) -> bool:
        """Whether the network is that of a folder, whose files it describes."""
        return self._model_files is not None

    def describe(self) -> dict[str, Any]:
        """The names of the functions, the arithmetic, and the files of the model's folder.

        The code of the functions is in :attr:`Objective.code`.
        """
        described: dict[str, Any] = {"score": self._name, "dtype": self._network.settings.dtype}
        if self.repeats > 1:
            described["repeats"] = self.repeats
        if self._model_files is not None:
            described[MODEL_FILES] = dict(self._model_files)
        return described

    def describe_reports(self) -> dict[str, Any]:
        """The name of the held-out function, which decides the choice of the answer and its report."""
        return {"held_out": self._held_out_name}

    def _calls(self, draw: Draw) -> Iterator[Any]:
        """What the function for this draw returns, ``held_out`` or the score: once, or each of several times."""
        function = self._function
        if self._held_out is not None and (draw.group == HELD_OUT.group or self._halves_held_out(draw)):
            function = self._held_out
        draws = {"draw": draw} if takes_draw(function) else {}
        for _ in range(self.repeats):
            stop_if_told()
            yield function(self._network.module, **draws)

    def _passes(self, function: Callable[..., Any]) -> Callable[[], None]:
        """The user's function of batch normalization, without arguments."""
        arguments: dict[str, Draw] = {}
        if takes_draw(function):
            # always the same data, so that the same candidate has the same statistics
            arguments["draw"] = Draw.of(Noise("batch-norm"), None)

        def passes() -> None:
            with self._network.arithmetic():
                function(self._network.module, **arguments)

        return passes


def takes_draw(function: Callable[..., Any]) -> bool:
    """Whether a score measures on the data of a :class:`Draw`: it has a parameter of the name ``draw``."""
    return has_parameter(function, "draw")


def _scores_in(returned: Any) -> Iterator[Any]:
    """The batches of a generator; else the score: the first entry of a mapping, or what was returned itself."""
    if isinstance(returned, Iterator):
        return returned
    if isinstance(returned, Mapping):
        return iter([next(iter(returned.values()), None)])
    return iter([returned])


def _joined(batches: list[Floats]) -> Floats:
    """All outcomes of a score, ``[n]``, from batches of one or more. Raises ObjectiveError if there are no batches."""
    if not batches:
        raise ObjectiveError("score: the generator yielded nothing; expected outcomes, batch by batch")
    return np.concatenate(batches)


def _over_calls(calls: Sequence[Mapping[Any, Floats]]) -> dict[Any, Floats]:
    """The outcomes of each entry of a score that was called once or several times.

    Those of single items are their means over the calls. Where a call has given one number, each is an outcome; and
    where all were the same, they are one number, which tells no error. All outcomes count where calls had other numbers
    of items.
    """
    joined = {}
    for entry in calls[0]:
        of_calls = [call[entry] for call in calls]
        sizes = {len(values) for values in of_calls}
        if sizes == {1} or len(sizes) > 1:
            values = np.concatenate(of_calls)
            joined[entry] = values if np.ptp(values) > 0 else values[:1]
        else:
            joined[entry] = np.mean(of_calls, axis=0)
    return joined


def _has_graph(value: Any) -> bool:
    """Whether a value is a number or single outcomes with a graph back to the weights."""
    return isinstance(value, Tensor) and value.requires_grad and value.ndim <= 1


def _no_graph(value: Any) -> str:
    """What is wrong with a value for which :func:`_has_graph` is false, and what to do."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} without a graph; let it return a tensor"
    if value.ndim > 1:
        return f"a tensor of the shape {list(value.shape)}; let it return a number, or one dimension"
    return "a tensor without a graph; let it compute without no_grad, inference_mode, detach and item"
