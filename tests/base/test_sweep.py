"""A study file that varies settings stands for an experiment at each point of the product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.study_file import StudyFile, only_one, parse_studies, read_studies
from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.base.sweep import split_point
from tests.study_examples import read_study_file

MINIMAL = {"name": "s", "objective": {"file": "a.py"}, "optimizers": ["LCSC"], "budget": {"evaluations": 4}}
IMAGES = "objective.settings.images"


def studies(varied: Any, **changes: Any) -> tuple[StudyFile, ...]:
    return parse_studies({**MINIMAL, **changes, "vary": varied}, source="test")


def test_every_point_of_the_product_is_an_experiment_with_its_values_in_its_name() -> None:
    made = studies(
        {IMAGES: [200, 1000], "objective.settings.nfe": [1, 2]}, objective={"file": "a.py", "settings": {"x": 1}}
    )
    assert [spec.name for spec in made] == [f"s,images={images},nfe={nfe}" for images in (200, 1000) for nfe in (1, 2)]
    assert made[1].objective.settings == {"x": 1, "images": 200, "nfe": 2}
    assert made[1].vary == {IMAGES: [200], "objective.settings.nfe": [2]}


def test_other_keys_are_varied_as_well() -> None:
    made = studies({"budget.evaluations": [4, 8], "space": ["affine", "convex"]})
    found = [(spec.budget.evaluations, spec.space.kind) for spec in made]
    assert found == [(count, kind) for count in (4, 8) for kind in ("affine", "convex")]
    assert made[-1].name == "s,evaluations=8,space=convex"
    [spec] = studies({"held_out.images": [5], IMAGES: [6], "space": ["affine"]})
    assert spec.name == "s,held_out.images=5,settings.images=6,space=affine", "equal ends are told apart by more"


@pytest.mark.parametrize("entry", ["LCSC", {"LCSC": {"max_parents": 3}}, {"LCSC": None}])
def test_an_option_of_an_optimizer_is_reached_by_its_name(entry: Any) -> None:
    first, second = studies({"optimizers.LCSC.mutation": [0.1, 0.2]}, optimizers=["CMA", entry])
    kept = {} if entry in ("LCSC", {"LCSC": None}) else {"max_parents": 3}
    assert first.optimizers[0] == OptimizerSpec(name="CMA")
    assert first.optimizers[1] == OptimizerSpec(name="LCSC", options={**kept, "mutation": 0.1})
    assert second.optimizers[1].options["mutation"] == 0.2
    assert [spec.name for spec in (first, second)] == ["s,mutation=0.1", "s,mutation=0.2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        (1e-5, "1e-05"),
        (-2, "-2"),
        ("runs/a b", "runs-a-b"),
        ([1, 2], "1-2"),
        ("/", "none"),
    ],
)
def test_values_in_names_have_no_letters_that_a_shell_reads(value: Any, text: str) -> None:
    [spec] = studies({"objective.settings.x": [value]})
    assert spec.name == f"s,x={text}"
    assert spec.objective.settings["x"] == value
    assert split_point(spec.name) == ("s", {"x": text})


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        ([1], "test: vary: expected keys with lists of values, as in vary: {objective.settings.images: [200, 1000]}"),
        ({IMAGES: 200}, f"vary.{IMAGES}: expected a list of values, got 200"),
        ({"objective..x": [1]}, "vary: expected keys with dots between, got 'objective..x'"),
        ({"name": ["a"]}, "vary.name: cannot be varied"),
        (
            {"budget.evaluations": [3, 4], "budget": [{"images": 9}]},
            "vary: budget has budget.evaluations in it; vary one of them",
        ),
        ({IMAGES: [1, 1]}, "vary: two points are called images=1; each needs its own name"),
        ({"objective.setings.images": [1]}, "images=1: objective.setings: unknown key (did you mean 'settings'?)"),
        ({"optimizers.CMA.step_size": [1]}, "vary.optimizers.CMA.step_size: ['LCSC'] has no 'CMA'"),
        (
            {"optimizers.LCSC.step_size": [2], "optimizers.LCSC.step_size.x": [1]},
            "vary: optimizers.LCSC.step_size has optimizers.LCSC.step_size.x in it; vary one of them",
        ),
        ({"space.kind.x": [1]}, "vary.space.kind.x: 'affine' has no key 'kind'; set space itself"),
    ],
)
def test_what_is_wrong_is_one_line(varied: Any, said: str) -> None:
    with pytest.raises(StudySpecError) as caught:
        studies(varied, space="affine")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_one_experiment_is_needed_a_sweep_is_refused() -> None:
    assert only_one(studies({IMAGES: [7]}), source="s").objective.settings == {"images": 7}
    with pytest.raises(StudySpecError, match=r"varies objective\.settings\.images and stands for 2 experiments"):
        only_one(studies({IMAGES: [7, 8]}), source="s")


def test_overrides_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "vary": {IMAGES: [200, 1000]}}))
    made = read_studies(path, ["objective.settings.nfe=2", "seeds=[3]"])  # at every point
    found = [(spec.name, spec.objective.settings["nfe"], spec.seeds) for spec in made]
    assert found == [(f"s,images={images}", 2, (3,)) for images in (200, 1000)]
    spec = read_study_file(path, [f"{IMAGES}=500"])  # a varied key then has one value
    assert (spec.name, spec.objective.settings) == ("s,images=500", {"images": 500})
    made = read_studies(path, [f"vary.{IMAGES}=[7, 8]", "vary.space=[affine, convex]"])
    assert [spec.name for spec in made] == [f"s,images={n},space={s}" for n in (7, 8) for s in ("affine", "convex")]
    assert [spec.name for spec in read_studies(path, ["vary={}"])] == ["s"]
    made = read_studies(path, ["vary.space=[affine, convex]", f"~vary.{IMAGES}"])
    assert [spec.name for spec in made] == ["s,space=affine", "s,space=convex"]
