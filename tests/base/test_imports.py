import re
import sys
from pathlib import Path

import pytest

from lcsc_opt.base.errors import MissingPackageError
from lcsc_opt.base.imports import EXTRAS, allow_mismatched_torchvision, import_extra

ROOT = Path(__file__).parents[2]
OTHER_NAMES = {"sklearn": "scikit-learn"}


@pytest.mark.parametrize("package", EXTRAS)
def test_a_package_that_is_not_installed_is_one_line_with_the_extra_that_brings_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"^{package} .*: pip install 'lcsc-opt\[{EXTRAS[package]}\]'$"):
        import_extra(package)
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    brought = re.search(rf"^{EXTRAS[package]} = \[(.*?)\](?:  #.*)?$", extras, re.M | re.S)
    assert f'"{OTHER_NAMES.get(package, package.replace("_", "-"))}' in brought[1]


@pytest.fixture
def torchvision_registering(tmp_path, monkeypatch):
    """A torchvision whose registration of operators runs the given code; what is imported now comes back afterwards."""

    def is_ours(name):
        return name.partition(".")[0] == "torchvision"

    def make(code):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text("from . import _meta_registrations, later")
        (tmp_path / "torchvision" / "_meta_registrations.py").write_text(code)
        (tmp_path / "torchvision" / "later.py").touch()
        monkeypatch.syspath_prepend(tmp_path)

    before = {name: module for name, module in sys.modules.items() if is_ours(name)}
    for name in before:
        del sys.modules[name]
    yield make
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def test_torchvision_is_imported_where_its_operators_are_missing(torchvision_registering):
    torchvision_registering("raise RuntimeError('operator torchvision::nms does not exist')")
    allow_mismatched_torchvision()
    from torchvision import later

    assert later is sys.modules["torchvision.later"]
