"""Other libraries' code, run without what is of no use to our users."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

_WITH_BARS = ("diffusers", "transformers")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While this is open, libraries show no progress bars, and nothing that is deprecated is warned of.

    What else they warn of is printed as they print it.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        for name in _WITH_BARS:
            library: Any = sys.modules.get(f"{name}.utils.logging")
            if library is not None and library.is_progress_bar_enabled():
                library.disable_progress_bar()
                undo.callback(library.enable_progress_bar)
        yield
