from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform

from hypothesis import given
from hypothesis import strategies as st
from lcsc_opt.study.comparison import _changes as changes
from lcsc_opt.study.comparison import differences

from lcsc_opt.base.reproducibility import derive_seed, environment


def test_the_environment_can_be_stored_as_json() -> None:
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert described["python"] == platform.python_version()
    assert described["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert described["packages"]["nevergrad"] == importlib.metadata.version("nevergrad")
    assert described["blas"], "numpy's BLAS is loaded and has a name"
    assert described["cores"] >= 1


def test_packages_that_an_older_version_did_not_record_are_no_change() -> None:
    now = {"environment": environment()}
    assert {"transformers", "peft", "torchvision"} <= now["environment"]["packages"].keys()
    packages = {name: version for name, version in now["environment"]["packages"].items() if name != "peft"}
    before = {"environment": {**now["environment"], "packages": packages}}
    assert changes(before, now) == ""
    packages["torch"] = "1.0"
    assert changes(before, now).startswith('environment.packages.torch was "1.0"')


def test_every_difference_is_named() -> None:
    before = {"cores": 2, "python": "3.11", "packages": {"torch": "2.13.0", "numpy": "2.4"}, "blas": ["openblas"]}
    now = {"cores": 8, "python": "3.11", "packages": {"torch": "2.14.0", "numpy": "2.4"}, "blas": ["mkl"]}
    assert list(differences(before, now)) == [
        'blas was ["openblas"], is now ["mkl"]',
        "cores was 2, is now 8",
        'packages.torch was "2.13.0", is now "2.14.0"',
    ]


parts = st.one_of(st.text(max_size=8), st.integers(-5, 5))
names = st.lists(parts, max_size=4).map(tuple)


@given(st.integers(0, 3), names, st.integers(0, 3), names)
def test_different_names_give_different_seeds(
    seed: int, name: tuple[str | int, ...], other_seed: int, other_name: tuple[str | int, ...]
) -> None:
    same = (seed, *map(repr, name)) == (other_seed, *map(repr, other_name))
    assert (derive_seed(seed, *name) == derive_seed(other_seed, *other_name)) == same


@given(st.integers(1, 256))
def test_a_seed_is_the_beginning_of_a_sha256(bits: int) -> None:
    digest = int(hashlib.sha256(b'[7,"search",0]').hexdigest(), 16)
    assert derive_seed(7, "search", 0, bits=bits) == digest >> (256 - bits)
    assert derive_seed(7, "search", 0) == digest >> (256 - 63)
