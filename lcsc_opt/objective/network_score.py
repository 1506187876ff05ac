"""The score that a function gives of a network with the merged weights in it, and its gradient in these."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.records import SEARCH, Noise
from lcsc_opt.objective.contract import stop_if_told
from lcsc_opt.objective.gradient import WeightGradient
from lcsc_opt.objective.score import Draw, Floats, metrics_of, outcomes
from lcsc_opt.sampling.batch_norm import BatchNormStatistics
from lcsc_opt.sampling.network import NetworkSettings, PreparedNetwork, load_weights

TRIAL_SIZE = 16  # items of the call that tells whether a score has a gradient


class NetworkScore:
    """A function of a network that has the merged weights in it: ``function(model)`` or ``function(model, draw)``.

    The network is in evaluation mode, on the device. The function returns a number; a mapping of metrics, the first of
    which is the score; or single outcomes in one dimension, whose mean is the score. A generator may yield outcomes
    batch by batch. A tensor with a graph, or several from a generator, has a gradient, also inside a mapping.

    Args:
        network: gets the merged weights.
        function: scores it.
        settings: how the network is run.
        batch_norm: passes data through the network, which estimates the statistics of batch normalization again;
            called like ``function``. ``None`` merges them.
        name: of network and functions in the study's fingerprint.
    """

    def __init__(
        self,
        network: nn.Module,
        function: Callable[..., Any],
        settings: NetworkSettings | None = None,
        *,
        batch_norm: Callable[..., Any] | None = None,
        name: str,
    ) -> None:
        self._network = PreparedNetwork(network, settings)
        self.device, self._function, self._name = self._network.device, function, name
        self.takes_draw = "draw" in inspect.signature(function).parameters
        self._metric = getattr(function, "__name__", "score")
        self.batch_norm = None if batch_norm is None else BatchNormStatistics(network, self._passes(batch_norm))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put merged weights into the network.

        Raises:
            ObjectiveError: they do not fit it.
        """
        load_weights(self._network.module, weights)
        if self.batch_norm is not None:
            self.batch_norm.estimate()

    def merged_statistics(self, varying: Collection[str]) -> list[str]:
        """The running statistics of batch normalization among these weights, which would be merged."""
        network = self._network.module
        return [] if self.batch_norm else BatchNormStatistics(network, lambda: None).merged(varying)

    def measure(
        self, weights: dict[str, Tensor], draw: Draw, varying: Collection[str] | None = None
    ) -> tuple[dict[str, float], Mapping[str, Tensor]]:
        """The metrics, of which the first one is the score, and its gradient: name → tensor.

        For a gradient it goes back through the function's graph, or that of each batch.

        Args:
            weights: name → tensor; they are used once.
            draw: on which data.
            varying: the names of the weights to take the gradient in; ``None`` takes none.
        """
        self.load(weights)
        weights.clear()  # frees their memory
        found, total = list[Floats](), None
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.set_grad_enabled(varying is not None))
            if varying is not None:
                total = stack.enter_context(
                    contextlib.closing(WeightGradient(self._network.weights.differentiable(varying)))
                )
            stack.enter_context(self._network.arithmetic())
            returned = self._function(self._network.module, **self._arguments(draw))
            for batch in returned if isinstance(returned, Iterator) else [_first(returned)]:
                stop_if_told()
                if total is not None and not _has_graph(batch):
                    raise ObjectiveError(f"a gradient was asked for, and {self._metric} returned {_no_graph(batch)}")
                found.append(outcomes(self._metric, batch))
                if total is not None:
                    total.add(batch, torch.ones_like(batch))
        if not found:
            raise ObjectiveError("score: the generator yielded nothing; expected outcomes, batch by batch")
        values = np.concatenate(found)
        sums = {} if total is None else {name: part / len(values) for name, part in total.sums.items()}
        return metrics_of(values if isinstance(returned, Iterator) else returned, self._metric), sums

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def why_no_gradient(self, varying: Collection[str] | None, size: int | None) -> str | None:
        """Call the function once, with the weights that are in the network, and look for a graph.

        Args:
            varying: the weights to take gradients in; ``None`` takes all.
            size: of an evaluation; this call takes no more than :data:`TRIAL_SIZE`.

        Raises:
            ObjectiveError: the function raised an error.
        """
        network = self._network
        if varying is not None and (reason := network.weights.why_no_gradient(varying)):
            return reason
        names = varying
        if names is None:  # running statistics may be the same in all checkpoints
            names = {name for name in network.module.state_dict() if not name.endswith(("running_mean", "running_var"))}
        draw = Draw.of(SEARCH, None if size is None else min(size, TRIAL_SIZE))
        try:
            with network.weights.differentiable(names), network.arithmetic():
                returned = self._function(network.module, **self._arguments(draw))
                found = next(returned, None) if isinstance(returned, Iterator) else _first(returned)
        except LcscError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ObjectiveError(f"score: {self._name}: raised {reason}") from error
        return None if _has_graph(found) else f"{self._metric} returned {_no_graph(found)}"

    def statistics(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Statistics of batch normalization, if they are estimated again."""
        if self.batch_norm is None:
            return {}
        self.load(weights)
        return self.batch_norm.values()

    def describe(self) -> dict[str, Any]:
        """The names of the functions, and the arithmetic; their code is in :attr:`Objective.code`."""
        return {"score": self._name, "dtype": self._network.settings.dtype}

    def _arguments(self, draw: Draw) -> dict[str, Draw]:
        return {"draw": draw} if self.takes_draw else {}

    def _passes(self, function: Callable[..., Any]) -> Callable[[], Any]:
        draw = Draw.of(Noise("batch-norm"), None)  # fixed: the same candidate has the same statistics
        arguments = {"draw": draw} if "draw" in inspect.signature(function).parameters else {}

        def passes() -> None:
            with self._network.arithmetic():
                function(self._network.module, **arguments)

        return passes


def _has_graph(value: Any) -> bool:
    """Whether a value is a number or single outcomes with a graph back to the weights."""
    return isinstance(value, Tensor) and value.requires_grad and value.ndim <= 1


def _first(returned: Any) -> Any:
    return next(iter(returned.values()), None) if isinstance(returned, Mapping) else returned


def _no_graph(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} without a graph; let it return a tensor"
    if value.ndim > 1:
        return f"a tensor of the shape {list(value.shape)}; let it return a number, or one dimension"
    return "a tensor without a graph; let it compute without no_grad, inference_mode, detach and item"
