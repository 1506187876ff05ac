from __future__ import annotations

import nevergrad as ng
import pytest

from lcsc_opt.base.records import HELD_OUT, Evaluation, Noise
from lcsc_opt.optimizers import Request, attach_evaluation
from lcsc_opt.optimizers.requests import failed


@pytest.mark.parametrize(
    ("request_", "images", "compares"),
    [
        (Request(), None, True),
        (Request(), 1000, True),
        (Request(images=1000), 1000, True),
        (Request(images=1000), None, False),
        (Request(images=2000), 1000, False),
        (Request(noise=Noise("gradient", 3)), 1000, False),
        (Request(noise=HELD_OUT), None, False),
    ],
)
def test_losses_compare_on_the_searchs_noise_with_as_many_images(
    request_: Request, images: int | None, compares: bool
) -> None:
    assert request_.compares(images) is compares


def test_what_failed_is_told_from_what_nobody_said_anything_of() -> None:
    parameter = ng.p.Array(shape=(2,))
    assert not failed(parameter)  # plain Nevergrad tells a loss and nothing else
    attach_evaluation(parameter, Evaluation(1.0))
    assert not failed(parameter)
    attach_evaluation(parameter, None)
    assert failed(parameter)
