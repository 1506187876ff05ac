"""Functions and classes of the user's own code, by name."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from lcsc_opt.base.code import note_called
from lcsc_opt.base.errors import LcscError, ObjectiveError


def import_dotted(name: str, *, setting: str, error: type[LcscError] = ObjectiveError) -> Callable[..., Any]:
    """Import ``"package.module:function"``, from wherever Python finds it, also beside the study file.

    Args:
        name: what to import.
        setting: its place in the study file, for error messages.
        error: the type of the error that is raised.

    Raises:
        LcscError: of the type ``error``; the name has another form, cannot be imported, or cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise error(f"{setting}: expected 'module:function', got {name!r}")
    note_called(module_name)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as reason:
        raise error(f"{setting}: {name!r} cannot be imported: {reason}") from reason
    if not callable(found):
        raise error(f"{setting}: {name!r} is a {type(found).__name__}; expected a function or a class")
    function: Callable[..., Any] = found
    return function


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While this is open, diffusers and transformers show no progress bars and no warnings.

    This library reports what matters itself.
    """
    loud = []
    for name in ("diffusers.utils.logging", "transformers.utils.logging"):
        if name in sys.modules:
            library: Any = sys.modules[name]
            loud.append((library, library.get_verbosity(), library.is_progress_bar_enabled()))
    try:
        for library, _, _ in loud:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, bars in loud:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


STAND_IN = "torchvision._meta_registrations"


def prepare_torchvision() -> None:
    """Import torchvision, with a stand-in for its operator registrations when they cannot be imported.

    Call it before torch-fidelity or a model of diffusers is imported. It does nothing where torchvision is not
    installed. It raises ImportError, with the remedy, when torchvision cannot be imported even with the stand-in.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise _unusable(error) from error
        _import_with_stand_in()


def _import_with_stand_in() -> None:
    _forget_half_imported()
    sys.modules[STAND_IN] = ModuleType(STAND_IN, "Stands in for the registrations of operators that did not load.")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        _forget_half_imported()
        raise _unusable(error) from error


def _forget_half_imported() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _unusable(error: Exception) -> ImportError:
    return ImportError(
        f"torchvision cannot be imported ({error}); install the torchvision that belongs to this torch, "
        "from the same index"
    )
