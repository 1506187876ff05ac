"""The range of a sampler's images is told from their values, whatever the loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.tones import Tones
from tests.metrics.examples import Doubled, images, reference, suite

UNIT, BYTES = "2 * images - 1", "images / 127.5 - 1"
FDR = {"fdr": ["inception", "tones"]}


def said_of(scores: MetricSuite, batches: Iterable[Tensor], capsys: pytest.CaptureFixture[str]) -> str:
    for batch in batches:
        scores.warn_of_range(batch, scores)
    return capsys.readouterr().err


def scores_of(loss: Any = "fid", real: Tensor | None = None) -> MetricSuite:
    """With real images, or with their statistics alone."""
    references = {"inception": reference(Doubled()), "tones": Reference.of_images(Tones(), images(60, 9))}
    return suite(references, loss=loss, real_images=lambda count: None if real is None else real[:count])


def unit(batch: Tensor) -> Tensor:
    """In [0, 1] but for some values, as the samples of a model are."""
    return (1.02 * batch + 1) / 2


@pytest.mark.parametrize("loss", ["fid", "kid", FDR])
@pytest.mark.parametrize("knows_real", [True, False])
@pytest.mark.parametrize(
    ("scale", "shift", "expected"), [(1.0, 0.0, ""), (0.5, 0.5, UNIT), (0.53, 0.5, UNIT), (135.5, 127.5, BYTES)]
)
def test_images_of_another_range_are_said_once(
    loss: Any, knows_real: bool, scale: float, shift: float, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = images(60, 9) if knows_real else None
    for batch in (images(40, 40), torch.linspace(-1, 1, 48).reshape(3, 1, 4, 4)):
        said = said_of(scores_of(loss, real), 2 * [scale * batch + shift], capsys)
        assert (said.count("\n"), expected in said) == (int(bool(expected)), True)


@pytest.mark.parametrize(
    ("converted", "expected"),
    [
        (lambda batch: batch + 0.1, ""),
        (lambda batch: 3 * batch, ""),
        (lambda batch: 0.3 * batch, ""),
        (lambda batch: 1000 * batch, ""),
        (unit, UNIT),
        (lambda batch: 255 * unit(batch), BYTES),
        (lambda batch: unit(batch).half(), UNIT),
    ],
)
def test_values_below_zero_do_not_hide_another_range(
    converted: Callable[[Tensor], Tensor], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for real in (images(60, 9), None):
        said = said_of(scores_of("fid", real), [converted(images(40, 1))], capsys)
        assert (bool(said), expected in said) == (bool(expected), True)


def test_the_range_is_looked_for_until_a_model_samples_well(capsys: pytest.CaptureFixture[str]) -> None:
    noise = 5 * torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    real = images(60, 9)
    assert UNIT in said_of(scores_of(FDR, real), [unit(noise), unit(images(40, 1))], capsys)
    said = said_of(scores_of(FDR, real), [images(2, 1), unit(images(40, 1))], capsys)
    assert UNIT in said, "two images tell nothing for good"
    scores = scores_of(FDR, real)
    assert said_of(scores, [noise, images(40, 1), unit(images(40, 1))], capsys) == "", "it is known to be right"
    scores.warn_of_range(unit(images(40, 1)), "another sampler")
    assert UNIT in capsys.readouterr().err


def test_real_images_without_a_dark_value_are_sampled_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    bright = scores_of("fid", (images(60, 9) + 1) / 2)
    assert said_of(bright, [(images(40, 1) + 1) / 2], capsys) == ""
