"""``lcsc profile``, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.diagnostics.profiling import machine, settings
from tests.diagnostics.profiling.profiled_study import OPERATIONS, write_image_study

FUNCTION = """
import time

def loss(coefficients):
    time.sleep(0.02)
    return float((coefficients ** 2).sum())

def broken(coefficients):
    raise RuntimeError("the GPU is on fire")
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(machine, "CONVOLUTION", {"cpu": (2, 4, 8)})


def write_function_study(folder: Path, function: str = "loss", **changes: Any) -> None:
    (folder / "profiled_losses.py").write_text(FUNCTION)
    called = {"callable": f"profiled_losses:{function}", "steps": list(range(10, 110, 10))}
    study = {
        "name": "plain",
        "objective": {"file": "function.py", "settings": called},
        "optimizers": ["EMAGrid", "CMA"],
        "budget": {"evaluations": 600},
        **changes,
    }
    (folder / "plain.yaml").write_text(yaml.safe_dump(study))


def profiled(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert lcsc(["profile", *arguments, "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_study_over_images(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_study(workplace)
    before = {path.name for path in workplace.iterdir()}
    found = profiled(capsys, "tiny.yaml", "--trials", "3")
    after = {path.name for path in workplace.iterdir()}
    assert after - {"__pycache__"} == before  # no database, nothing left over
    assert (found["study"], found["trials"], found["studies"]) == ("tiny/LCSC/0", 3, 4)
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == ["merge", "sample", "features", "metric", "optimizer", "database", "other"]
    assert all(parts[name]["seconds"] > 0 for name in list(parts)[:-1])
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0, abs=0.05)
    assert found["images"] == 24
    assert parts["sample"]["rate"] == pytest.approx(24 * OPERATIONS / parts["sample"]["seconds"])
    assert parts["sample"]["limit"] > 0
    assert parts["merge"]["limit"] > 0
    assert found["budget_seconds"] == pytest.approx(30 * found["seconds"])
    assert found["advice"]


def test_the_table_shows_every_part_and_the_advice(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_study(workplace)
    assert lcsc(["profile", "tiny", "--trials", "2", "--optimizer", "CMA"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "tiny/CMA/0 on cpu"
    assert {"merge", "sample", "features", "metric", "optimizer", "database", "other", "a"} <= {
        line.split(" ")[0] for line in lines
    }
    assert any(line.startswith("30 evaluations take ") and "the 2 studies of the file" in line for line in lines)
    assert lines[-1].startswith("advice: ")


def test_a_function_has_evaluations_and_a_database(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_function_study(workplace)
    found = profiled(capsys, "plain.yaml", "--trials", "4")
    assert found["study"] == "plain/CMA/0"
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == ["evaluate", "optimizer", "database", "other"]
    assert 0.02 <= parts["evaluate"]["seconds"] < found["seconds"]
    assert parts["database"]["seconds"] > 0
    assert found["images_per_second"] is None
    assert found["advice"].startswith(("the function takes", "the database takes"))


def test_a_gradient_is_profiled_with_its_optimizer(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_study(workplace, optimizers=["LCSCGradient"])
    found = profiled(capsys, "tiny.yaml", "--trials", "2")
    assert found["study"] == "tiny/LCSCGradient/0"
    assert next(part for part in found["parts"] if part["name"] == "sample")["rate"] > 0


def test_a_trace_holds_the_spans_of_all_threads(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_image_study(workplace, pipeline=True)  # merging has a thread of its own, and so have sampling and scoring
    assert lcsc(["profile", "tiny.yaml", "--trials", "1", "--trace", "trace.json"]) == 0
    said = capfd.readouterr().err
    assert "trace: trace.json" in said
    assert "profiler_start" not in said  # of torch's library
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    spans = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"merge", "sample", "features", "metric", "ask", "tell", "database"} <= spans
    threads = {name: {event["tid"] for event in events if event["name"] == name} for name in ("merge", "ask")}
    assert threads["merge"].isdisjoint(threads["ask"])
    assert any(event["name"].startswith("aten::conv") for event in events)


def test_a_trace_of_a_function_has_spans_only(workplace: Path) -> None:
    write_function_study(workplace)
    assert lcsc(["profile", "plain.yaml", "--trials", "1", "--trace", "trace.json.gz"]) == 0
    import gzip

    events = json.loads(gzip.decompress(Path("trace.json.gz").read_bytes()))["traceEvents"]
    spans = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"ask", "tell", "database", "evaluate"} <= spans
    assert "merge" not in spans


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nothing"], 2, "lcsc: nothing: no such file in studies"),
        (["plain.yaml", "--optimizer", "Nope"], 2, "lcsc: optimizers.Nope: no such optimizer"),
        (["plain.yaml", "--trace", "is/not/there.json"], 2, "lcsc: --trace: is/not/there.json cannot be written"),
        (["plain.yaml", "--trials", "0"], 2, "lcsc: Invalid value for '--trials'"),
        (["plain.yaml", "--optimizer", "LCSCGradient"], 2, "lcsc: optimizers.LCSCGradient: follows the gradient"),
        (["plain.yaml", "--settings", "--trials", "1"], 2, "lcsc: --settings: function.py samples no images"),
        (
            ["broken.yaml"],
            1,
            "lcsc: profile/CMA/0: all 6 trials failed; the last one: RuntimeError",
        ),
    ],
)
def test_what_cannot_be_profiled_is_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    write_function_study(workplace, "broken", failures={"retries": 0, "stop_share": 1.0})
    (workplace / "plain.yaml").rename("broken.yaml")
    write_function_study(workplace)
    assert lcsc(["profile", *arguments]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcsc: ")]
    assert len([line for line in lines if ": trial 0: " not in line]) == 1
    assert lines[-1].startswith(message)
    assert not [path for path in workplace.iterdir() if path.name.startswith(".lcsc-profile")]


def test_ctrl_c_leaves_nothing_behind(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_function_study(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    import profiled_losses  # type: ignore[import-not-found]

    def interrupted(_coefficients: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(profiled_losses, "loss", interrupted)
    assert lcsc(["profile", "plain.yaml"]) == 130
    assert sorted(path.name for path in workplace.glob(".lcsc*")) == []


def test_settings_are_tried_and_printed_as_lines_of_a_study_file(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image_study(workplace, compile=True)  # there is no other to try
    monkeypatch.setattr(settings, "FASTER", 0.0)
    monkeypatch.setattr(settings, "LARGEST_CHANGE", 1e9)
    monkeypatch.setattr("torch.compile", lambda module, **_: module)
    monkeypatch.setattr(settings, "images_per_second", lambda sampler, scores, count, device: 100.0 * count)
    found = profiled(capsys, "tiny.yaml", "--trials", "1", "--settings")
    tried = {json.dumps(row["settings"]): row for row in found["settings"]}
    changes = [{"batch_size": 5}, {"batch_size": 20}, {"batch_size": 40}, {"channels_last": True}, {"dtype": "bf16"}]
    assert list(tried)[:-1] == [json.dumps(change) for change in [{}, *changes]]
    for row in found["settings"]:
        assert row["problem"] is None
        assert row["images_per_second"] == 100 * min(row["settings"].get("batch_size", 10), 24)
        assert row["ratio"] == row["images_per_second"] / 1000
    assert abs(tried['{"batch_size": 5}']["loss_change"]) < 1e-5  # only rounding
    assert abs(tried['{"dtype": "bf16"}']["loss_change"]) > 1e-6
    together = found["settings"][-1]["settings"]
    assert {"batch_size", "channels_last", "dtype"} == set(together)

    assert lcsc(["profile", "tiny.yaml", "--trials", "1", "--settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = yaml.safe_load("\n".join(lines[lines.index("objective:") :]))
    assert set(printed["objective"]["settings"]) <= {"batch_size", "channels_last", "dtype"}
