"""The first call of a caller's functions, before anything is stored: what they raise is theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import MetricError, ObjectiveError
from lcsc_opt.base.imports import import_dotted
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import HELD_OUT, SEARCH
from lcsc_opt.base.settings import excerpt
from lcsc_opt.objective.network_scorer import NetworkScorer
from lcsc_opt.objective.scorer import Draw
from lcsc_opt.sampling import ClassLabels, FunctionSampler

_NO_NUMBERS = (str, bytes, complex, type(None))
_IMAGES = 2  # that the sampler is tried with

Functions = Mapping[str, Callable[..., Any]]


def try_score(settings: Any, context: BuildContext, functions: Functions, weights: dict[str, Tensor]) -> str | None:
    """Score the weights of one checkpoint, on the data of the search and, where a function scores it, of the report.

    What is wrong with the functions shows here, before anything is stored.

    Args:
        settings: of ``score.py``.
        context: what the objective will be built with.
        functions: argument → function, of those that are no text.
        weights: name → tensor.

    Returns:
        Why there is no gradient, or ``None``.

    Raises:
        ObjectiveError: the weights do not fit the network, or a function does not return what it should.
        MetricError: the score is not finite.
        Exception: what the functions raise.
    """
    if "build" not in functions:  # the study file's way: the model is named, by import or as a folder
        scorer = settings.scorer(context)
    else:
        score = functions.get("score") or import_dotted(settings.score, setting="score")
        held_out = functions.get("held_out")
        if held_out is None and settings.held_out is not None:
            held_out = import_dotted(settings.held_out, setting="held_out")
        scorer = NetworkScorer(
            _network(functions["build"]),
            _one_number(score, "score"),
            settings,
            held_out=None if held_out is None else _one_number(held_out, "held_out"),
            name="score",
        )
    scorer.measure(dict(weights), Draw.of(SEARCH, settings.size))
    if settings.held_out is not None:
        scorer.measure(dict(weights), Draw.of(HELD_OUT, settings.size))
    reason: str | None = scorer.why_no_gradient(None, settings.size)
    return reason


def try_sampler(settings: Any, functions: Functions, weights: dict[str, Tensor]) -> str | None:
    """Sample two images with the weights of one checkpoint; arguments as of :func:`try_score`.

    Raises:
        ObjectiveError: as :func:`try_score`; or ``sample`` does not return images.
        MetricError: their values are not finite.
        Exception: what the functions raise.
    """
    noise = settings.noise()
    build = functions.get("build") or import_dotted(settings.model, setting="model")
    sampler = FunctionSampler(
        _network(functools.partial(build, **settings.model_settings)),
        functions.get("sample") or import_dotted(settings.sampler, setting="sampler"),
        image_shape=settings.image_shape,
        nfe=settings.nfe,
        noise=noise,
        labels=ClassLabels.choose(settings.labels, classes=settings.classes, noise=noise),
        options=settings.sampler_settings,
        settings=settings,
        name="sample",
    )
    sampler.load(weights)
    reason: str | None = settings.why_no_gradient()
    if reason is not None:
        _check_images(sampler.sample(SEARCH, 0, _IMAGES))
        return reason
    varying = {name for name, tensor in weights.items() if tensor.is_floating_point()}
    with torch.enable_grad(), sampler.weights.differentiable(varying):
        images = sampler.sample(SEARCH, 0, _IMAGES)
    _check_images(images.detach())
    return None if images.requires_grad else "the images have no graph"


def _check_images(images: Tensor) -> None:
    if not images.isfinite().all():
        raise MetricError("sample: the last checkpoint samples values that are not finite")


def _network(build: Callable[..., Any]) -> nn.Module:
    network = build()
    if not isinstance(network, nn.Module):
        raise ObjectiveError(f"build: returned a {type(network).__name__}; expected a torch.nn.Module")
    return network


def _one_number(function: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """The function, whose result is one number, a mapping of such, or a generator; others are refused.

    Raises:
        ObjectiveError: by the new function.
    """

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        returned = function(*arguments, **keywords)
        values = returned.values() if isinstance(returned, Mapping) else [returned]
        for value in values:
            if isinstance(value, _NO_NUMBERS):
                raise ObjectiveError(f"{argument}: must return a number; got {excerpt(value)}")
            if _is_several(value):
                raise ObjectiveError(
                    f"{argument}: returned {_form(value)}; let it return one number, such as the mean()"
                )
        return returned

    return called


def _is_several(value: Any) -> bool:
    """Whether a returned value holds more than one number."""
    if isinstance(value, (list, tuple)):
        return len(value) > 1
    return any(size > 1 for size in getattr(value, "shape", ()))


def _form(value: Any) -> str:
    """What a returned value is, for a message."""
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__}"
    return f"a tensor of the shape {list(value.shape)}"
