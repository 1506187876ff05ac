"""Imports: the user's own functions by name, what extras bring, and torchvision where it does not fit torch."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lcsc_opt.base.code import forget_changed_modules, module_file
from lcsc_opt.base.errors import LcscError, MissingPackageError, ObjectiveError, raised_as
from lcsc_opt.base.machine import collector_resting
from lcsc_opt.base.progress import said_if_slow

HANDED_OVER = "<python>:"
"""Begins the name of a function in settings that was handed over as an object; ``module:function`` can be imported."""

_SCRIPT = "__main__"  # the module of scripts, notebooks and the REPL


def importable_name(function: Callable[..., Any]) -> str | None:
    """``module:function`` for a function or class at the top of a module with a file, or of a script; else ``None``.

    Of a script this is the name under which others import it, in which ``import_dotted`` finds the script that runs.
    """
    module_name = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", "")
    if not module_name or not name or "." in name:
        return None
    module = sys.modules.get(module_name)
    # by their names: it is another object once an edited module was imported again
    imported_object = getattr(module, name, None)
    if getattr(imported_object, "__qualname__", None) != name:
        return None
    if getattr(imported_object, "__module__", None) != module_name:
        return None
    if module_name == _SCRIPT:
        module_name = _name_of_script()
    elif module_file(module_name) is None:
        return None
    if module_name is None:
        return None
    return f"{module_name}:{name}"


def _name_of_script() -> str | None:
    """The module that the running script would be if it were imported.

    ``None`` in notebooks and the REPL, and for a script that cannot be imported, such as one outside of ``sys.path``.
    """
    script = sys.modules[_SCRIPT]
    file = getattr(script, "__file__", None)
    if file is None:
        return None
    name = Path(file).stem
    if script.__spec__ is not None:  # of `python -m package.module`
        name = script.__spec__.name
    importable = module_file(name)
    if importable is None or not importable.exists() or not importable.samefile(file):
        return None
    return name


def import_dotted(
    name: str,
    *,
    setting: str,
    error: type[LcscError] = ObjectiveError,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Import ``"package.module:function"``, from wherever Python finds it, also next to the study file.

    A local module that was edited since its last import is imported again.

    Args:
        name: what to import.
        setting: its place in the study file, for error messages.
        error: the type of the error that is raised.
        functions: those of :class:`lcsc_opt.base.paths.BuildContext`, which are not imported.

    Raises:
        LcscError: of the type ``error``; the name has another form, its module cannot be imported, it cannot be called,
            or it was handed over and ``functions`` lacks it. An error of lcsc_opt that its import raises is left as it
            is, but for MissingPackageError.
    """
    if name.startswith(HANDED_OVER):
        if functions is None or name not in functions:
            raise error(
                f"{setting}: its function was handed to lcsc_opt.search, and no other process can import it; call "
                "lcsc_opt.search again with resume=True"
            )
        return functions[name]
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise error(f"{setting}: expected 'module:function', got {name!r}")
    file = module_file(module_name)
    if file is not None:
        forget_changed_modules({module_name: file})
    allow_mismatched_torchvision()
    with raised_as(error, f"{setting}: importing {name!r}"):
        try:
            runs_already = module_name == _name_of_script()
            module = sys.modules[_SCRIPT] if runs_already else importlib.import_module(module_name)
            function = getattr(module, attribute)
        except (ImportError, AttributeError) as reason:
            raise error(f"{setting}: {name!r} cannot be imported: {reason}") from reason
    if not callable(function):
        raise error(f"{setting}: {name!r} is a {type(function).__name__}; expected a function or a class")
    return function  # type: ignore[no-any-return]


def has_parameter(function: Callable[..., Any], name: str, *, required: bool = False) -> bool:
    """Whether a function has a parameter of this name; ``False`` where Python cannot tell, as of some built-in ones.

    With ``required``: whether it has one without a default.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return False
    return name in parameters and not (required and parameters[name].default is not inspect.Parameter.empty)


EXTRAS = {
    "diffusers": "images",
    "huggingface_hub": "images",
    "sklearn": "images",
    "torch_fidelity": "images",
    "torchvision": "images",
    "dash": "dashboard",
    "dash_ag_grid": "dashboard",
    "kaleido": "dashboard",
    "transformers": "text-to-image",
    "peft": "text-to-image",
    "accelerate": "text-to-image",
    "ray": "ray",
}
"""Package → the extra of lcsc_opt that brings it."""

_IMPORT_TORCHVISION = {"accelerate", "diffusers", "peft", "torch_fidelity", "torchvision", "transformers"}


def import_extra(name: str) -> Any:
    """Import a module of a package in :data:`EXTRAS`.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    package = name.partition(".")[0]
    if package in _IMPORT_TORCHVISION:
        allow_mismatched_torchvision()
    try:
        with said_if_slow(f"importing {package}"), collector_resting():  # all that is made stays
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"{name} cannot be imported ({error}): pip install 'lcsc-opt[{EXTRAS[package]}]'"
        ) from error


_OPERATORS = "torchvision._meta_registrations"  # registers operators without asking whether they were loaded


class _WithoutOperators(importlib.abc.MetaPathFinder):
    """Imports torchvision also where its operators do not fit torch: what registers them is cut short.

    Nothing here calls them. Without this, torch-fidelity and the models of diffusers and transformers, which import
    torchvision, cannot be imported there either.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _OPERATORS:
            return None  # Python's own finders find it
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        register = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                register(module)
            except RuntimeError as error:
                # "operator torchvision::nms does not exist" is expected; anything else is an error of the installation
                if "does not exist" not in str(error):
                    raise ImportError(f"{error}; install the torchvision that belongs to this torch") from error

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _WithoutOperators()


def allow_mismatched_torchvision() -> None:
    """From now on, torchvision can be imported in this process where its operators do not fit torch.

    Whatever imports user code or an extra here calls this first. A script that imports diffusers or transformers by
    itself may call it, too.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
