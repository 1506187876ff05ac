"""Parts that other installed packages add, by the entry points of their distributions.

A package names its parts in its ``pyproject.toml``, and they are found by these names, as ours are::

    [project.entry-points."lcsc_opt.metrics"]
    energy = "my_package:energy_distance"

Nothing of such a package is imported before a name is asked for that is not ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from lcsc_opt.base.errors import LcscError

Group = Literal["formats", "metrics", "extractors", "optimizers", "spaces"]
"""The last part of a group of entry points, ``lcsc_opt.metrics`` and so on."""

_KINDS: dict[Group, str] = {
    "formats": "checkpoint format",
    "metrics": "metric",
    "extractors": "extractor",
    "optimizers": "optimizer",
    "spaces": "coefficient space",
}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A part that another package adds.

    Attributes:
        group: what it is.
        name: as it is asked for.
        distribution: the name of its package, as pip knows it.
        version: of its package.
    """

    group: Group
    name: str
    distribution: str
    version: str
    _entry_point: importlib.metadata.EntryPoint = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"the {_KINDS[self.group]} {self.name} of {self.distribution} {self.version}"

    def load(self, error: type[LcscError]) -> Any:
        """The object that the entry point names.

        Raises:
            LcscError: of the type ``error``; it cannot be imported, or cannot be called.
        """
        with self.blamed(error, "cannot be loaded"):
            part = self._entry_point.load()
        if not callable(part):
            raise error(f"{self}: {self._entry_point.value} is a {type(part).__name__}; expected something to call")
        return part

    @contextlib.contextmanager
    def blamed(self, error: type[LcscError], what: str) -> Iterator[None]:
        """Whatever the package's code raises while this is open becomes one line that names the package."""
        try:
            yield
        except LcscError:
            raise
        except Exception as reason:
            first_line = str(reason).partition("\n")[0]
            raise error(f"{self}: {what}: {type(reason).__name__}: {first_line}".rstrip(": ")) from reason


def plugin_names(group: Group) -> list[str]:
    """The names that installed packages add to a group, sorted; nothing is imported."""
    return sorted(_by_name(group, tuple(sys.path)))


def installed_plugins() -> list[Plugin]:
    """All that installed packages add; a name that two of them claim is listed twice. Nothing is imported."""
    plugins: list[Plugin] = []
    for group in _KINDS:
        for name in plugin_names(group):
            plugins += _by_name(group, tuple(sys.path))[name]
    return plugins


def find_plugin(group: Group, name: str, *, error: type[LcscError]) -> Plugin | None:
    """The part of this name; ``None`` if no installed package has one. Nothing is imported.

    Ask only for what is not ours: our names win.

    Raises:
        LcscError: of the type ``error``; two packages have a part of this name.
    """
    claimed = _by_name(group, tuple(sys.path)).get(name, ())
    if len(claimed) > 1:
        packages = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in claimed)
        raise error(f"{name}: {packages} both have a {_KINDS[group]} of this name; uninstall one of them")
    return claimed[0] if claimed else None


def versions(plugins: Iterable[Plugin | None]) -> dict[str, str]:
    """Distribution → version, for a study's fingerprint."""
    return {plugin.distribution: plugin.version for plugin in plugins if plugin is not None}


@functools.lru_cache(maxsize=64)
def _by_name(group: Group, path: tuple[str, ...]) -> dict[str, tuple[Plugin, ...]]:  # noqa: ARG001 - the cache's key
    """Name → the parts of this name, of what is installed in the folders of ``path``; reading it takes milliseconds."""
    plugins: dict[str, tuple[Plugin, ...]] = {}
    for entry_point in importlib.metadata.entry_points(group=f"lcsc_opt.{group}"):
        distribution = entry_point.dist
        if distribution is None:  # it was made by hand
            continue
        plugin = Plugin(group, entry_point.name, distribution.name, distribution.version, entry_point)
        plugins[plugin.name] = (*plugins.get(plugin.name, ()), plugin)
    return plugins
