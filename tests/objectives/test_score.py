"""The objective that scores any model: its settings, its gradient, and what it refuses."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import lcsc_opt
from lcsc_opt.base.errors import LcscError, MetricError, ObjectiveError, StudySpecError
from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate, Noise
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.cli import run as lcsc
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.scorer import Draw, Scored
from lcsc_opt.objective.weight_score import WeightScore
from tests.commands import Typed
from tests.contracts import check_objective
from tests.objectives.image_objectives import one_line

OWN = "tests.objectives.test_score"
ROOT = Path(__file__).parents[2]
MIX = np.array([0.5, -0.3, 0.8])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


def items(seed: int, size: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size or 40, 3, generator=generator, dtype=torch.float64)
    return inputs, (inputs.sum(1) > 0).long()


def loss(model: nn.Module, draw: Draw) -> Tensor:
    inputs, labels = items(draw.seed, draw.size)
    return F.cross_entropy(model(inputs), labels)


def losses(model: nn.Module, draw: Draw) -> Tensor:
    inputs, labels = items(draw.seed, draw.size)
    return F.cross_entropy(model(inputs), labels, reduction="none")


def batches(model: nn.Module, draw: Draw) -> Any:
    inputs, labels = items(draw.seed, draw.size)
    for first in (0, 7):  # of two sizes
        part = slice(first, 7 if first == 0 else None)
        yield F.cross_entropy(model(inputs[part]), labels[part], reduction="none")


def metrics(model: nn.Module) -> dict[str, Any]:
    inputs, labels = items(0, 40)
    logits = model(inputs)
    return {"accuracy": logits.argmax(1) == labels, "loss": F.cross_entropy(logits, labels)}


def named(model: nn.Module, draw: Draw) -> dict[str, Any]:
    return {"cross_entropy": losses(model, draw), "items": 40}


def items_and_worst(model: nn.Module) -> dict[str, Tensor]:
    inputs, labels = items(5, 60)
    values = F.cross_entropy(model(inputs), labels, reduction="none")
    return {"losses": values, "worst": values.max()}


def in_a_list(model: nn.Module, draw: Draw) -> list[Tensor]:
    return list(losses(model, draw))


def in_numpy(model: nn.Module) -> float:
    inputs, labels = items(0, 40)
    return float((model(inputs).numpy().argmax(1) == labels.numpy()).mean())


def without_memory(model: nn.Module) -> Tensor:
    raise torch.OutOfMemoryError("full")


def passes(model: nn.Module) -> None:
    model(items(3, 64)[0])


def returned(model: nn.Module) -> Any:
    return VALUE


VALUE: Any = None


@pytest.fixture
def place(folder: Path) -> Path:
    for step in (10, 20, 30):
        torch.manual_seed(step)
        torch.save(network().state_dict(), folder / f"model{step}.pt")
    return folder


def build(folder: Path, score: str | None = "loss", **changes: Any) -> WeightScore:
    settings = {"checkpoints": "model*.pt", "model": f"{OWN}:network", "device": "cpu", **changes}
    settings |= {} if score is None else {"score": f"{OWN}:{score}"}
    made = load_objective(ObjectiveSpec(file="score.py", settings=settings), BuildContext(folder))
    assert isinstance(made, WeightScore)
    return made


@pytest.mark.parametrize("score", ["loss", "losses", "batches"])
def test_scores_with_a_graph_keep_the_contract(place: Path, score: str) -> None:
    check_objective(lambda: build(place, score, size=30))
    one, whole = (build(place, name, size=30).evaluate(Candidate(MIX, gradient=True)) for name in (score, "loss"))
    assert one.loss == pytest.approx(whole.loss, rel=1e-12)
    assert one.gradient == pytest.approx(whole.gradient, rel=1e-10)


@pytest.mark.parametrize("score", ["losses", "named", "batches"])
def test_repeats_are_means_of_each_item(place: Path, score: str) -> None:
    """Twenty calls on the same forty items do not tell how much forty other items would differ."""
    candidate = Candidate(MIX, noise=HELD_OUT, images=40, gradient=True)
    repeated, once = (build(place, score, repeats=count).evaluate(candidate) for count in (20, 1))
    assert repeated.gradient == pytest.approx(once.gradient)
    assert repeated.metrics == pytest.approx(once.metrics)
    assert repeated.without_groups.keys() == once.without_groups.keys() != set()
    for name, values in once.without_groups.items():
        assert repeated.without_groups[name] == pytest.approx(values)


def test_equal_numbers_of_repeated_calls_tell_no_error(place: Path) -> None:
    candidate = Candidate(MIX, noise=HELD_OUT, images=40)
    repeated, once = (build(place, "loss", repeats=count).evaluate(candidate) for count in (20, 1))
    assert (repeated.metrics, repeated.without_groups) == (once.metrics, {})


def test_held_out_items_are_divided_and_numbers_beside_them_are_not(place: Path) -> None:
    objective = build(place, "losses", held_out=f"{OWN}:items_and_worst")
    chosen, reported = (objective.evaluate(Candidate(MIX, noise=noise)).metrics for noise in (SELECTION, HELD_OUT))
    model = loaded(place, MIX)
    values = items_and_worst(model)["losses"].detach()
    means = [values[first::2].mean().item() for first in (0, 1)]
    assert [chosen["losses"], reported["losses"]] == pytest.approx(means)
    assert chosen["worst"] == reported["worst"] == pytest.approx(values.max().item())


def test_a_list_of_tensors_is_outcomes_without_a_gradient(place: Path) -> None:
    objective = build(place, "in_a_list")
    assert "let it return a tensor" in (objective.why_no_gradient() or "")
    assert objective.evaluate(Candidate(MIX)).loss == pytest.approx(build(place).evaluate(Candidate(MIX)).loss)


def test_a_score_that_cannot_have_a_graph_is_searched_without_a_gradient(place: Path) -> None:
    """Numpy refuses tensors with one, and a user's own script calls the score under no_grad."""
    objective = build(place, "in_numpy")
    assert "raised RuntimeError: Can't call numpy()" in (objective.why_no_gradient() or "")
    assert 0 < objective.evaluate(Candidate(MIX)).loss < 1


def test_a_device_without_memory_does_not_mean_that_a_score_has_no_graph(place: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        build(place, "without_memory").why_no_gradient()


def test_the_function_of_the_report_is_described_apart_from_what_decides_the_score(place: Path) -> None:
    alone, both = build(place), build(place, held_out=f"{OWN}:losses")
    assert both.describe() == alone.describe()
    assert both.describe_reports() == {"held_out": f"{OWN}:losses"}
    assert build(place, batch_norm=f"{OWN}:passes").describe() != alone.describe()


def test_the_sign_turns_in_the_loss_alone(place: Path) -> None:
    lower, higher = (
        build(place, "losses", maximize=up).evaluate(Candidate(MIX, gradient=True)) for up in (False, True)
    )
    assert higher.loss == -lower.loss
    assert higher.metrics == lower.metrics
    assert higher.gradient == pytest.approx(-1 * np.asarray(lower.gradient))
    values = losses(loaded(place, MIX), Draw.of(Noise(), None))
    assert lower.metrics == pytest.approx(
        {"losses": values.mean().item(), "losses_stderr": values.std().item() / 40**0.5}
    )


def test_held_out_outcomes_are_compared_item_by_item(place: Path) -> None:
    """Their values without a group of items each leave what is common to two models out of the error."""
    candidate = Candidate(MIX, noise=HELD_OUT, images=120)
    found = build(place, "losses", maximize=True).evaluate(candidate)
    values = losses(loaded(place, MIX), Draw.of(HELD_OUT, 120)).detach().numpy()
    expected = [values[group_of_each(120) != group].mean() for group in range(GROUPS)]
    assert found.without_groups["losses"] == pytest.approx(expected)
    assert found.without_groups["loss"] == pytest.approx([-value for value in expected])
    assert not build(place, "losses").evaluate(Candidate(MIX)).without_groups


def loaded(place: Path, coefficients: np.ndarray) -> nn.Module:
    states = [torch.load(place / f"model{step}.pt") for step in (10, 20, 30)]
    model = network()
    model.load_state_dict(
        {name: sum(a * s[name] for a, s in zip(coefficients, states, strict=True)) for name in states[0]}
    )
    return model.eval()


def test_the_first_metric_is_the_score_and_none_is_called_as_the_loss(place: Path) -> None:
    found = build(place, "metrics", maximize=True).evaluate(Candidate(MIX))
    assert found.loss == -found.metrics["accuracy"]
    assert [*found.metrics] == ["accuracy", "accuracy_stderr", "metrics.loss"]
    assert [*build(place, "loss").evaluate(Candidate(MIX)).metrics] == ["score"]


def test_a_score_without_a_draw_holds_nothing_out(place: Path) -> None:
    assert "has no argument draw" in (build(place, "metrics").why_nothing_held_out() or "")
    assert build(place, "loss").why_nothing_held_out() is None
    for held_out in (None, f"{OWN}:metrics"):
        one_line(
            ObjectiveError,
            "size: the score has no argument draw",
            functools.partial(build, place, "metrics", held_out=held_out, size=3),
        )


def test_draws_of_optimizers_are_of_the_search_and_all_have_seeds_of_their_own() -> None:
    noises = [
        *(Noise(group, seed) for group in ("search", "selection", "held-out") for seed in (0, 1)),
        Noise("gradient", 2**50),
    ]
    draws = [Draw.of(noise, 5) for noise in noises]
    assert [draw.group for draw in draws] == [*(["search"] * 2), *(["selection"] * 2), *(["held-out"] * 2), "search"]
    assert len({draw.seed for draw in draws}) == len(draws)
    assert max(draw.seed for draw in draws) < 2**31


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("good", ObjectiveError, r"returned must return a number, or single outcomes \[n\]; got 'good'"),
        (None, ObjectiveError, "returned must return a number, .* got None"),
        ((torch.tensor(0.5), 0.9), ObjectiveError, "returned a tuple: return the score alone"),
        (torch.zeros(2, 3), ObjectiveError, r"got the shape \[2, 3\]"),
        (float("nan"), MetricError, "the score gave nan as 'returned', expected a finite number"),
        (iter([]), ObjectiveError, "yielded nothing"),
    ],
)
def test_what_is_no_number_fails_with_its_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch, value: Any, kind: type[LcscError], message: str
) -> None:
    monkeypatch.setattr(f"{OWN}.VALUE", value)
    one_line(kind, message, lambda: build(place, "returned").evaluate(Candidate(MIX)))


def test_what_a_repeated_score_returns_is_read_as_that_of_one_call(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = build(place, "returned", repeats=2)
    monkeypatch.setattr(f"{OWN}.VALUE", 0.1)
    assert objective.evaluate(Candidate(MIX)).loss == 0.1
    monkeypatch.setattr(f"{OWN}.VALUE", (torch.tensor(0.5), 0.9))
    with pytest.raises(ObjectiveError, match="returned a tuple"):
        objective.evaluate(Candidate(MIX))


@pytest.mark.parametrize(
    ("value", "phrase"),
    [(0.5, "a float without a graph"), (torch.tensor(0.5), "a tensor without a graph; let it compute without no_grad")],
)
def test_a_score_without_a_graph_is_refused_before_anything_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: Any, phrase: str
) -> None:
    monkeypatch.setattr(f"{OWN}.VALUE", value)
    assert phrase in (build(place, "returned").why_no_gradient() or "")
    settings = {"checkpoints": "model*.pt", "model": f"{OWN}:network", "score": f"{OWN}:returned"}
    study = {"name": "s", "objective": {"file": "score.py", "settings": settings}, "budget": {"evaluations": 5}}
    (place / "s.yaml").write_text(json.dumps({**study, "optimizers": ["LCSCGradient"]}))
    monkeypatch.chdir(place)
    assert lcsc(["run", "s.yaml", "--dry-run"]) == 2
    assert phrase in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": f"{OWN}:normalized"}, ObjectiveError, "do not fit the network"),
        ({"model": None}, StudySpecError, "model: Input should be a valid string, got None"),
        ({"text": "corpus.txt"}, StudySpecError, "text: unknown key"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    place: Path, changes: dict[str, Any], kind: type[LcscError], message: str
) -> None:
    one_line(kind, message, lambda: build(place, **changes))


def test_statistics_of_batch_normalization_come_from_the_users_passes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20, 30):
        torch.manual_seed(step)
        weights = normalized().state_dict()
        weights["1.running_var"] += step  # which MIX still leaves positive
        torch.save(weights, folder / f"model{step}.pt")
    merged = build(folder, model=f"{OWN}:normalized")
    assert "batch_norm: module:function" in capsys.readouterr().err
    again = build(folder, model=f"{OWN}:normalized", batch_norm=f"{OWN}:passes")
    assert merged(MIX) != again(MIX)
    weights = again.trajectory.merge(MIX)
    hidden = F.linear(items(3, 64)[0], weights["0.weight"], weights["0.bias"])
    assert torch.allclose(again.statistics(MIX)["1.running_mean"], hidden.mean(0), atol=1e-12)
    assert again.evaluate(Candidate(MIX, noise=HELD_OUT)).loss != again(MIX)
    assert "no gradient in a batch normalization's" in (again.why_no_gradient() or "")


@pytest.mark.parametrize("example", ["characters", "text"])
def test_the_worked_examples_train_and_are_searched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, example: str
) -> None:
    pytest.importorskip("transformers")
    for kind in ("py", "yaml"):
        text = (ROOT / f"studies/any_weights/{example}.{kind}").read_text()
        (folder / f"{example}.{kind}").write_text(text.replace("POOL = 30_000", "POOL = 100"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    importlib.import_module(example).train(folder / "runs" / example, steps=8, every=2)
    small = ["budget.evaluations=2", "objective.settings.size=8", "held_out.images=20"]
    small += ["objective.settings.model=runs/text/checkpoint-8"] if example == "text" else []
    assert lcsc(["run", f"{example}.yaml", *small, "--optimizer", "Grid", "--optimizer", "LCSCGradient"]) == 0


def language_model(folder: Path) -> list[nn.Module]:
    """Three checkpoint folders of a tiny GPT-2 with tied weights, the last of them in shards."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    models = []
    for step in (1, 2, 3):
        torch.manual_seed(step)
        models.append(transformers.GPT2LMHeadModel(config).eval())
        models[-1].save_pretrained(folder / f"checkpoint-{step}", **({"max_shard_size": "3KB"} if step == 3 else {}))
    return models


TOKENS = torch.arange(8)[None]
NAME = "gpt/LCSC/0"
MOVED = "objective.settings.model=last"


def test_a_study_knows_its_models_files_wherever_they_are(workplace: Path, typed: Typed) -> None:
    language_model(Path("out/of/gpt"))
    settings = {"checkpoints": "out/of/gpt/*", "model": "out/of/gpt/checkpoint-3", "score": f"{OWN}:perplexity"}
    study = {"name": "gpt", "objective": {"file": "score.py", "settings": settings}, "optimizers": ["LCSC"]}
    Path("gpt.yaml").write_text(json.dumps({**study, "budget": {"evaluations": 3}}))
    typed("run", "gpt.yaml")

    config = Path("out/of/gpt/checkpoint-3/config.json")
    original = config.read_text()
    config.write_text(original.replace("1e-05", "1e-02"))
    said = typed("run", NAME, "--budget", "4", status=2).err
    assert "changed since it began: objective.model_files.config.json was" in said
    config.write_text(original)
    tokenizer = Path("out/of/gpt/checkpoint-3/tokenizer.json")
    tokenizer.write_text("{}")
    assert "model_files.tokenizer.json was null" in typed("run", NAME, "--budget", "4", status=2).err
    tokenizer.unlink()

    Path("out/of/gpt/checkpoint-3").rename("last")
    said = typed("run", NAME, "--budget", "4", status=2).err
    assert "model: out/of/gpt/checkpoint-3 is no folder" in said
    assert f"{MOVED[:-4]}PLACE" in said
    typed("export", NAME, "-o", "best.safetensors")
    typed("export", NAME, "-o", "best", "--config", "last")
    assert lcsc_opt.load_study(NAME).merge().keys() >= {"transformer.wte.weight"}
    typed("run", "gpt.yaml", MOVED)
    typed("run", NAME, "--budget", "4")
    typed("run", "gpt.yaml", MOVED, "seeds=[1]")


def perplexity(model: Any) -> Tensor:
    return model(TOKENS, labels=TOKENS).loss.exp()


def test_folders_of_transformers_are_merged_and_scored(folder: Path) -> None:
    models = language_model(folder)
    objective = build(folder, "perplexity", checkpoints="checkpoint-*", model="checkpoint-2")
    for one, model in zip(np.eye(3), models, strict=True):
        assert objective(one) == pytest.approx(perplexity(model).item(), rel=1e-6)
    found, behind, ahead = (
        objective.evaluate(Candidate(MIX + sign * np.array([0.01, -0.01, 0]), gradient=not sign)) for sign in (0, -1, 1)
    )
    assert found.gradient is not None
    slope = (ahead.loss - behind.loss) / 0.02
    assert found.gradient @ [1, -1, 0] == pytest.approx(slope, rel=1e-2), "also in what is tied"
    (folder / "half").mkdir()
    half = folder / "half" / "config.json"
    half.write_text('{"model_type": "gpt2"}')
    one_line(ObjectiveError, "architectures", lambda: build(folder, checkpoints="checkpoint-*", model="half"))
    half.unlink()
    one_line(ObjectiveError, "holds no config.json", lambda: build(folder, checkpoints="checkpoint-*", model="half"))


def test_outcomes_in_half_precision_are_summed_in_another() -> None:
    values = np.random.default_rng(0).normal(2000, 400, 100).astype(np.float16)
    wide = values.astype(np.float64)
    found = Scored.of(values, "loss_of_each").metrics
    assert [*found.values()] == pytest.approx([wide.mean(), wide.std(ddof=1) / 10])


@pytest.mark.parametrize("values", [[1.0, 2.0, 1e6], [1.0, np.nan, 2.0]])
def test_what_is_masked_out_does_not_count(values: list[float]) -> None:
    masked = np.ma.masked_array(values, mask=[value not in (1.0, 2.0) for value in values])
    assert Scored.of(masked, "accuracy").metrics["accuracy"] == 1.5
    assert Scored.of({"loss": 3.0, "accuracy": masked}, "score").metrics["accuracy"] == 1.5


def mean_of_many(model: nn.Module) -> Tensor:
    """A mean over so many outputs that gradients in half precision would be zero."""
    outputs = model(torch.ones(20_000, 3)).float()
    return (outputs - 0.1).square().mean()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 8, bias=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_gradient_in_half_precision_is_not_rounded_to_zero(place: Path, dtype: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        torch.save({"weight": 0.1 * torch.randn(8, 3, generator=draw)}, f"small{step}.pt")

    def gradient(dtype: str) -> Any:
        settings: dict[str, Any] = {"checkpoints": "small*.pt", "model": f"{OWN}:small", "dtype": dtype}
        settings["score"] = f"{OWN}:mean_of_many"
        objective = load_objective(ObjectiveSpec(file="score.py", settings=settings), BuildContext())
        return objective.evaluate(Candidate(MIX, gradient=True)).gradient

    exact = gradient("fp32")
    assert np.linalg.norm(gradient(dtype) - exact) < 0.05 * np.linalg.norm(exact)


def test_a_recipe_has_the_statistics_that_no_merge_gives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    monkeypatch.chdir(folder)
    for step in (10, 20, 30):
        torch.manual_seed(step)
        trained = normalized()
        passes(trained)
        torch.save(trained.state_dict(), folder / f"model{step}.pt")
    names = {name: f"{OWN}:{name}" for name in ("losses", "passes", "normalized")}
    settings = {"checkpoints": "model*.pt", "model": names["normalized"], "score": names["losses"], "device": "cpu"}
    objective = {"file": "score.py", "settings": {**settings, "batch_norm": names["passes"]}}
    study = {"name": "s", "objective": objective, "budget": {"evaluations": 4}, "optimizers": ["LCSC"]}
    (folder / "s.yaml").write_text(json.dumps({**study, "space": {"rows": None}}))
    typed("run", "s.yaml")
    for out in ("s.json", "s.safetensors"):
        typed("export", "s/LCSC/0", "--trial", "3", "-o", out)
    typed("apply", "s.json", *(f"model{step}.pt" for step in (10, 20, 30)), "-o", "again.safetensors")
    expected, again = (load_file(folder / name) for name in ("s.safetensors", "again.safetensors"))
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(again[name], tensor, msg=name)
