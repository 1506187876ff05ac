from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform

from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.base.reproducibility import derive_seed, environment


def test_the_environment_can_be_stored_as_json() -> None:
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert described["python"] == platform.python_version()
    assert described["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert described["packages"]["nevergrad"] == importlib.metadata.version("nevergrad")
    assert described["blas"], "numpy's BLAS is loaded and has a name"
    assert described["cores"] >= 1
    assert {"transformers", "peft", "torchvision"} <= described["packages"].keys()


@given(st.integers(1, 256))
def test_a_seed_is_the_beginning_of_a_sha256(bits: int) -> None:
    digest = int(hashlib.sha256(b'[7,"search",0]').hexdigest(), 16)
    assert derive_seed(7, "search", 0, bits=bits) == digest >> (256 - bits)
    assert derive_seed(7, "search", 0) == digest >> (256 - 63)
