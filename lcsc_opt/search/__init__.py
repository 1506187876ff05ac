"""A study from its plan to its answer: ask, write the candidate, evaluate, write the result, tell.

``plan`` is the specification of a study. ``resources`` reads what ``resolving`` decides from: what is stored, what
changed, what will be written. ``execution`` runs what is resolved: ``runner`` is the one loop, ``held_out`` the final
choice on other noise. ``landscape`` is a study of a plane, ``api`` and ``calling`` are the interfaces for Python.

The package can be called: ``lcsc_opt.search(...)`` is :func:`lcsc_opt.search.calling.search`. See
``help(lcsc_opt.search.calling.search)`` for its arguments.
"""

import inspect
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """This package, which Python binds to ``lcsc_opt.search`` whenever one of its modules is imported."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from lcsc_opt.search.calling import search

        return search(*arguments, **keywords)

    @property
    def __signature__(self) -> inspect.Signature:
        from lcsc_opt.search.calling import search

        return inspect.signature(search)


sys.modules[__name__].__class__ = _Callable
