"""``batch_size: auto``: which size is found, and that it is remembered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.records import SEARCH, Noise
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective import batch_size
from lcsc_opt.objective.batch_size import fastest_size, images_per_second, largest_batch, smaller_batch
from lcsc_opt.objective.settings import ImageObjectiveSettings

CPU = torch.device("cpu")


class Rates:
    """Images per second by batch size; remembers what was asked."""

    def __init__(self, rate: Callable[[int], float | None]) -> None:
        self.rate, self.asked = rate, list[int]()

    def __call__(self, size: int) -> float | None:
        self.asked.append(size)
        return self.rate(size)


def test_doubling_ends_two_doublings_after_the_gain_did() -> None:
    rates = Rates(lambda size: min(size, 64) * 10.0)
    assert fastest_size(rates) == 64
    assert rates.asked == [4, 8, 16, 32, 64, 128, 256]


def test_doubling_ends_where_memory_does() -> None:
    rates = Rates(lambda size: float(size) if size <= 100 else None)
    assert fastest_size(rates) == 64
    assert rates.asked[-1] == 128


def test_where_the_first_size_does_not_fit_it_is_halved() -> None:
    assert fastest_size(Rates(lambda size: None if size > 1 else 3.0)) == 1


@dataclasses.dataclass
class Sampler:
    """Runs out of memory above ``most`` images; says what it was asked for."""

    most: int = 10**9
    kind: str = "a"
    error: type[Exception] = torch.OutOfMemoryError
    nfe: int = 1
    asked: list[int] = dataclasses.field(default_factory=list)

    def load(self, weights: Any) -> None:
        raise NotImplementedError

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        assert (noise, start) == (SEARCH, 0)
        assert not torch.is_grad_enabled()
        self.asked.append(stop)
        if stop > self.most:
            raise self.error("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        return torch.zeros(stop, 1, 2, 2)

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind}


class Scores:
    """Takes images as ImageMetrics does, and looks at none."""

    def __init__(self, extractor: str = "net-1") -> None:
        self.extractor = extractor
        self.added: list[int] = []

    def image_metrics(self, images: int) -> Scores:
        return self

    def update(self, images: Tensor) -> None:
        self.added.append(len(images))

    def describe(self) -> dict[str, Any]:
        return {"extractors": {"inception": {"name": self.extractor, "reference": None}}}


def find(sampler: Sampler, cache: Path, scores: Scores | None = None) -> int:
    return largest_batch(sampler, scores or Scores(), device=CPU, cache=cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_size_that_does_not_fit_has_no_rate(error: type[Exception]) -> None:
    sampler, scores = Sampler(most=8, error=error), Scores()
    assert images_per_second(sampler, scores, 16, device=CPU) is None  # type: ignore[arg-type]
    rate = images_per_second(sampler, scores, 8, device=CPU)  # type: ignore[arg-type]
    assert rate is not None
    assert rate > 0
    assert set(scores.added) == {8}  # extractors see them, too


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that grow with the size, so that only memory ends the search."""

    def rate(sampler: Sampler, scores: Scores, count: int, **_: Any) -> float | None:
        sampler.asked.append(count)
        return None if count > sampler.most else float(count)

    monkeypatch.setattr(batch_size, "images_per_second", rate)


def test_it_is_measured_without_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    network = torch.compile(torch.nn.Tanh(), backend=backend)
    monkeypatch.setattr(Sampler, "sample", lambda self, noise, start, stop: network(torch.zeros(stop, 1, 2, 2)))
    assert find(Sampler(), tmp_path) >= 4
    assert graphs == []


@pytest.mark.usefixtures("linear")
def test_it_is_measured_once_and_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(Sampler(most=100), tmp_path) == 64
    said = capsys.readouterr().err
    assert said.startswith("lcsc: batch_size: auto: 64 images at once on cpu")
    assert said.count("\n") == 1
    again = Sampler(most=100)
    assert find(again, tmp_path) == 64
    assert again.asked == []
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("linear")
def test_another_sampler_extractor_or_torch_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(Sampler(most=100), tmp_path) == 64
    assert find(Sampler(most=10, kind="b"), tmp_path) == 8
    assert find(Sampler(most=20), tmp_path, Scores("net-2")) == 16
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert find(Sampler(most=40), tmp_path) == 32


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"batch_size": "many"}'])
def test_a_broken_file_is_measured_again_and_replaced(tmp_path: Path, content: str) -> None:
    find(Sampler(most=100), tmp_path)
    [file] = tmp_path.glob("batch-sizes/*")
    file.write_text(content)
    assert find(Sampler(most=40), tmp_path) == 32
    assert json.loads(file.read_text())["batch_size"] == 32
    assert list(tmp_path.glob("batch-sizes/*")) == [file]


@pytest.mark.usefixtures("linear")
def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert find(Sampler(most=100), tmp_path / "file") == 64


@pytest.mark.usefixtures("linear")
def test_where_memory_runs_out_half_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampler, scores = Sampler(most=100), Scores()
    find(sampler, tmp_path, scores)
    capsys.readouterr()
    assert smaller_batch(64, sampler, scores, device=CPU, cache=tmp_path) == 32  # type: ignore[arg-type]
    assert capsys.readouterr().err == "lcsc: batch_size: auto: 64 images at once ran out of memory; going on with 32\n"
    assert find(Sampler(), tmp_path) == 32


@pytest.mark.usefixtures("linear")
def test_what_never_fits_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="one image takes more memory than the device has; sample with dtype"):
        find(Sampler(most=0), tmp_path)
    with pytest.raises(ObjectiveError, match="one image takes more memory"):
        smaller_batch(1, Sampler(), Scores(), device=CPU, cache=tmp_path)  # type: ignore[arg-type]


def settings(**given: Any) -> ImageObjectiveSettings:
    return parse_settings(ImageObjectiveSettings, {"checkpoints": "x", **given}, source="objective.settings")


@pytest.mark.parametrize("value", ["auto", 1, 500])
def test_batch_size_is_a_number_or_auto(value: Any) -> None:
    assert settings(batch_size=value).batch_size == value


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "many", None])
def test_any_other_batch_size_is_refused(value: Any) -> None:
    with pytest.raises(StudySpecError, match="batch_size"):
        settings(batch_size=value)
