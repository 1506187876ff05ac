"""Making torchvision importable beside a torch build that its compiled operators do not match.

torch-fidelity always imports torchvision, and the models of diffusers do where it is installed. The
torchvision of the package index carries operators that need the CUDA build of torch; beside a CPU build they
do not load, and then torchvision's registration of their shapes fails with "operator torchvision::nms does
not exist". Neither of the two libraries uses those operators, so an empty module in place of the
registrations is enough. Where torchvision imports as it is, nothing is replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

STAND_IN = "torchvision._meta_registrations"


def prepare_torchvision() -> None:
    """Import torchvision, with a stand-in for its operator registrations when they cannot be imported.

    To be called before torch-fidelity or a model of diffusers is imported. Does nothing where torchvision is
    not installed. Raises ImportError, with the remedy, when torchvision cannot be imported even so.
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
