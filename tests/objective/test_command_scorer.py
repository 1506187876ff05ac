"""The score that a command gives a model on the disk."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Noise
from lcsc_opt.objective.command_scorer import CommandScorer
from lcsc_opt.objective.scorer import Draw
from lcsc_opt.objective.weight_score import why_no_report
from tests.objectives.image_objectives import one_line

WEIGHTS = {"a": torch.tensor([0.25, 0.5])}
DRAW = Draw.of(Noise("held-out", 3), 7)


def sh(script: str, arguments: str = "{model} {out}") -> str:
    """A command whose ``$0`` is the model, and ``$1`` the output."""
    return f"sh -c {shlex.quote(script)} {arguments}"


def measured(command: str, read: str | None = None, folder: Path | None = None) -> dict[str, float]:
    return CommandScorer(command, BuildContext(), read=read, folder=folder).measure(WEIGHTS, DRAW)[0]


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        ("step 3: loss 0.5", 0.5),
        ("accuracy=-1.5e-3.", -0.0015),
        ("1.5\nsaved model7 as v2.x", 1.5),
        ("perplexity 1,234.5", 1234.5),
        ("points: -12,345,678", -12345678.0),
        ("arc,0.75", 0.75),
        ("epoch,loss\n3,0.25", 0.25),
        ("0.5, 7", 7.0),
    ],
)
def test_the_last_number_that_it_prints_is_the_score(printed: str, number: float) -> None:
    assert measured(sh(f"printf {shlex.quote(printed.replace('%', '%%'))}")) == {"score": number}


@pytest.mark.parametrize("printed", ["loss 0,5", "1,2,3", "12,3456"])
def test_a_comma_that_may_be_a_decimal_point_is_refused(printed: str) -> None:
    ambiguous = printed.split()[-1]
    one_line(ObjectiveError, f"printed {ambiguous}, which may be", lambda: measured(sh(f"echo {printed}")))


LM_EVAL = '{"results": {"arc": {"acc,none": 0.75, "acc_stderr,none": 0.01, "alias": "arc"}}}'


@pytest.mark.parametrize(
    ("script", "read", "found"),
    [
        (
            f"mkdir -p $1/m && echo '{LM_EVAL}' > $1/m/results_2.json",
            "results.arc.acc",
            {"acc": 0.75, "acc_stderr": 0.01},
        ),
        (
            "echo '[[1, 0, 1, 1]]' >/dev/null; echo '{\"hits\": [1, 0, 1, 1]}' > $1",
            "hits",
            {"hits": 0.75, "hits_stderr": 0.25},
        ),
        ('echo loading; echo \'{"a": {"b": 2}}\'', "a.b", {"b": 2.0}),
        ("echo '[INFO] 1'; echo '{\n  \"a\":\n    {\"b\": 2}\n}'; echo done", "a.b", {"b": 2.0}),
        ("echo loading > $1; echo '[\n  1\n]\n{\n  \"a\": 3\n}' >> $1", "a", {"a": 3.0}),
    ],
)
def test_the_number_is_read_from_json(script: str, read: str, found: dict[str, float]) -> None:
    assert measured(sh(script), read) == found


@pytest.mark.parametrize(
    ("read", "metrics"),
    [("{group}.acc", {"acc": 0.75}), ("sizes.{size}", {"score": 0.5}), ("acc_of_{group}", {"score": 0.25})],
)
def test_the_path_of_the_number_may_depend_on_the_draw(read: str, metrics: dict[str, float]) -> None:
    content = {"held-out": {"acc": 0.75}, "sizes": {"7": 0.5}, "acc_of_held-out": 0.25}
    assert measured(sh(f"echo {shlex.quote(json.dumps(content))}"), read) == metrics
    assert CommandScorer(sh(""), BuildContext(), read=read).takes_draw


def test_a_file_inside_the_output_has_its_folder() -> None:
    assert measured(sh("echo '{\"a\": 1}' > $1", "{model} {out}/r.json"), "a") == {"a": 1.0}


def test_it_gets_the_weights_and_the_draw_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    kept = tmp_path / "kept.safetensors"
    found = measured(sh(f"cp $0 {kept}; echo $1 $2 $3", "{model} {group} {size} {seed}"))
    assert found == {"score": DRAW.seed}
    assert torch.equal(load_file(kept)["a"], WEIGHTS["a"])
    assert [*tmp_path.iterdir()] == [kept]
    assert CommandScorer(sh("", "{model} {seed}"), BuildContext()).takes_draw
    assert not CommandScorer(sh(""), BuildContext()).takes_draw


@pytest.mark.parametrize(
    ("config", "content", "weights"),
    [
        ("config.json", {"model_type": "gpt2"}, "model.safetensors"),
        ("config.json", {"_class_name": "UNet2DModel"}, "diffusion_pytorch_model.safetensors"),
        ("adapter_config.json", {"peft_type": "LORA"}, "adapter_model.safetensors"),
    ],
)
def test_a_folder_has_the_models_own_files_and_the_merged_weights(
    tmp_path: Path, config: str, content: dict[str, str], weights: str
) -> None:
    (tmp_path / config).write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_text("{}")
    for left_out in ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "optimizer.pt"):
        (tmp_path / left_out).write_text("old")
    command = sh(f"cd $0; test -s {weights} && ls | wc -l")
    assert measured(command, folder=tmp_path) == {"score": 3}


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("half")
    one_line(ObjectiveError, "no readable config.json", lambda: measured(sh("echo 1"), folder=tmp_path))


@pytest.mark.parametrize(
    ("command", "read", "message"),
    [
        ("sh -c 'true {model}", None, "cannot be split"),
        ("true {model} {modle}", None, "{modle} is unknown"),
        ("true {model}", "{model}.acc", "read: {model} is unknown; expected group, seed, size"),
        (sh("echo out; echo no tokens >&2; echo >&2; exit 3"), None, "ended with 3: no tokens"),
        (sh("echo loss nan"), None, "not finite: score is nan"),
        (sh('echo \'{"a": {"b": 1}}\''), "a.c", "a.c: its JSON has no 'c' in b"),
        (sh('echo \'{"a,x": 1, "a,y": 1}\''), "a", "2 'a' in a,x, a,y"),
        (sh("echo half > $1"), "a", "no JSON in out that it wrote; let it print a JSON object last, or write it: half"),
    ],
)
def test_what_fails_is_told_in_one_line(command: str, read: str | None, message: str) -> None:
    one_line(Exception, message, lambda: measured(command, read))


def test_files_that_it_names_belong_to_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = Path("judge.sh")
    script.write_text("echo 1")
    before, again = (CommandScorer("sh judge.sh {model}", BuildContext()).describe() for _ in range(2))
    script.write_text("echo 2")
    assert before == again
    assert before != CommandScorer("sh judge.sh {model}", BuildContext()).describe()


@pytest.mark.parametrize(("arguments", "groups"), [("{group}", ["selection", "held-out"]), ("once{seed}", ["once"])])
def test_a_command_that_knows_no_groups_is_tried_once_before_a_report(
    tmp_path: Path, arguments: str, groups: list[str]
) -> None:
    calls = tmp_path / "calls"
    scorer = CommandScorer(sh(f"echo $1 >> {calls}; echo 1", f"{{model}} {arguments}"), BuildContext())
    assert why_no_report(scorer, WEIGHTS, None) is None
    assert [line.rstrip("0123456789") for line in calls.read_text().splitlines()] == groups
