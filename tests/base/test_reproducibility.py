from __future__ import annotations

import importlib.metadata
import json
import platform

from lcsc_opt.base.reproducibility import decisive, describe_difference, environment


def test_the_environment_can_be_stored_as_json() -> None:
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert described["python"] == platform.python_version()
    assert described["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert described["packages"]["nevergrad"] == importlib.metadata.version("nevergrad")
    assert described["blas"], "numpy's BLAS is loaded and has a name"
    assert described["cores"] >= 1


def test_every_difference_is_named() -> None:
    before = {"cores": 2, "python": "3.11", "packages": {"torch": "2.13.0", "numpy": "2.4"}, "blas": ["openblas"]}
    now = {"cores": 8, "python": "3.11", "packages": {"torch": "2.14.0", "numpy": "2.4"}, "blas": ["mkl"]}
    assert describe_difference(before, now) == "blas ['openblas'] → ['mkl'], cores 2 → 8, torch 2.13.0 → 2.14.0"


def test_versions_and_blas_decide_results_and_the_number_of_cores_does_not() -> None:
    here = environment()
    assert decisive({**here, "cores": 4096, "python": "3.99"}) == decisive(here)
    for key, other in (("packages", {"torch": "9"}), ("blas", ["mkl"]), ("machine", "riscv64")):
        assert decisive({**here, key: other}) != decisive(here)
