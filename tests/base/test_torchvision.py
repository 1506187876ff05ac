"""torchvision is imported also where its operators do not fit torch."""

import sys

import pytest


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
    from torchvision import later

    assert later is sys.modules["torchvision.later"]
