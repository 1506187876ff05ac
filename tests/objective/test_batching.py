"""``batch_size: auto``: which size is found, and that it is remembered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH, Noise
from lcsc_opt.objective import batch_size
from lcsc_opt.objective.batch_size import MeasuredBatchSize
from lcsc_opt.objective.settings import ImageObjectiveSettings


class Clock:
    """Stands for the module ``time``; simulated devices move it on."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batch_size, "time", clock)
    return clock


@dataclasses.dataclass
class Sampler:
    """Runs out of memory above ``most`` images; says what it was asked for."""

    clock: Clock
    most: int = 10**9
    kind: str = "a"
    error: type[Exception] = torch.OutOfMemoryError
    rate: Callable[[int], float] = float
    asked: list[int] = dataclasses.field(default_factory=list)

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        assert (noise, start) == (SEARCH, 0)
        assert not torch.is_grad_enabled()
        self.asked += [stop] if stop not in self.asked else []
        if stop > self.most:
            raise self.error("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        self.clock.now += stop / self.rate(stop)
        return torch.zeros(1)

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind}


def measured(sampler: Sampler, cache: Path, extractor: str = "net-1") -> MeasuredBatchSize:
    """With scores that take images as ImageMetrics does, and look at none."""
    scores: Any = SimpleNamespace(
        image_metrics=lambda _: SimpleNamespace(update=lambda images, prompts: None),
        describe=lambda: {"extractors": {"inception": {"name": extractor, "reference": None}}},
    )
    return MeasuredBatchSize(sampler, scores, device=torch.device("cpu"), cache=cache)  # type: ignore[arg-type]


def test_doubling_ends_two_doublings_after_the_gain_did(tmp_path: Path, clock: Clock) -> None:
    sampler = Sampler(clock, rate=lambda size: min(size, 64) * 10.0)
    assert measured(sampler, tmp_path).largest() == 64
    assert sampler.asked == [4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize(("most", "found"), [(100, 64), (1, 1)])
def test_what_fits_is_found(tmp_path: Path, clock: Clock, error: type[Exception], most: int, found: int) -> None:
    assert measured(Sampler(clock, most=most, error=error), tmp_path).largest() == found


def test_it_is_measured_once_and_said_in_one_line(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured(Sampler(clock, most=100), tmp_path).largest() == 64
    assert "64 images at once" in capsys.readouterr().err
    again = Sampler(clock, most=100)
    assert measured(again, tmp_path).largest() == 64
    assert (again.asked, capsys.readouterr().err) == ([], "")


def test_another_sampler_extractor_or_torch_is_measured_anew(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(Sampler(clock, most=100), tmp_path).largest() == 64
    assert measured(Sampler(clock, most=10, kind="b"), tmp_path).largest() == 8
    assert measured(Sampler(clock, most=20), tmp_path, "net-2").largest() == 16
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert measured(Sampler(clock, most=40), tmp_path).largest() == 32


@pytest.mark.parametrize("content", ["", "[]", '{"batch_size": "many"}'])
def test_a_broken_file_is_replaced(tmp_path: Path, clock: Clock, content: str) -> None:
    measured(Sampler(clock, most=100), tmp_path).largest()
    [file] = tmp_path.glob("batch-sizes/*")
    file.write_text(content)
    assert measured(Sampler(clock, most=40), tmp_path).largest() == 32
    assert json.loads(file.read_text())["batch_size"] == 32
    assert measured(Sampler(clock, most=100), file).largest() == 64  # what cannot be written only costs time


def test_where_memory_runs_out_half_is_remembered_and_what_never_fits_refused(tmp_path: Path, clock: Clock) -> None:
    found = measured(Sampler(clock, most=100), tmp_path)
    assert found.smaller(found.largest()) == 32
    assert measured(Sampler(clock), tmp_path).largest() == 32
    never = measured(Sampler(clock, most=0), tmp_path / "other")
    for ask in (never.largest, lambda: never.smaller(1)):
        with pytest.raises(ObjectiveError, match="one image takes more memory than the device has"):
            ask()


@pytest.mark.parametrize("value", ["auto", 1])
def test_batch_size_is_a_number_or_auto(value: Any) -> None:
    assert ImageObjectiveSettings(checkpoints="x", batch_size=value).batch_size == value
