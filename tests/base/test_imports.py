from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lcsc_opt.base.imports import source_sha256

BEFORE = "def sample(model, noise):\n    return model(noise)\n"


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Text of a module → digest of its function, as a new process would find it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def of(text: str) -> str | None:
        (tmp_path / "users_sampler.py").write_text(text)
        sys.modules.pop("users_sampler", None)
        importlib.invalidate_caches()
        return source_sha256(importlib.import_module("users_sampler").sample)

    return of


def test_code_that_changed_is_noticed_and_comments_are_not(digest) -> None:
    before = digest(BEFORE)
    assert before is not None
    assert digest("# a note\n\n" + BEFORE.replace("model(noise)", "model( noise )  # here")) == before
    assert digest(BEFORE.replace("model(noise)", "model(2 * noise)")) != before
    assert digest("SCALE = 2\n" + BEFORE) != before  # which the function may use


@pytest.mark.parametrize("definition", [len, torch.nn.Linear])
def test_what_is_installed_is_known_by_its_version(definition: object) -> None:
    assert source_sha256(definition) is None


def test_what_has_no_source_has_no_digest() -> None:
    assert source_sha256(OrderedDict.fromkeys) is None
