"""A sweep: a study file that varies settings stands for one experiment for each combination of their values.

``vary: {objective.settings.images: [200, 1000]}`` in an experiment ``samples`` gives the experiments
``samples,images=200`` and ``samples,images=1000``. The names alone say which experiments belong together.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.settings import excerpt, near_miss

VARY = "vary"
_FIXED = ("name", "storage", VARY)  # of the whole file
_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")


def points(content: Mapping[str, Any], *, source: str) -> list[tuple[dict[str, Any], str]]:
    """The points of a study file's sweep: the content for each alone, and its end of the name (``images=200,nfe=2``).

    In the content of a point each varied key has its value, which ``vary`` lists alone.

    The last of the varied keys changes fastest. ``vary: {}`` is one point; the end of its name is empty.

    Args:
        content: the content of a study file that has ``vary``.
        source: begins the message of an error.

    Raises:
        StudySpecError: ``vary`` is no mapping of keys to lists of values, a key cannot be varied, or two points would
            have one name.
    """
    varied = _checked_vary(content[VARY], source)
    short_names = _short_names(list(varied))
    result: list[tuple[dict[str, Any], str]] = []
    for values in itertools.product(*varied.values()):
        values_by_key = dict(zip(varied, values, strict=True))
        end_of_name = ",".join(f"{short_names[key]}={_in_a_name(value)}" for key, value in values_by_key.items())
        point: Any = {**content, VARY: {key: [value] for key, value in values_by_key.items()}}
        for key, value in values_by_key.items():
            point = replaced(point, key.split("."), value, where=f"{source}: {VARY}.{key}")
        if values_by_key and isinstance(content.get("name"), str):  # pydantic refuses any other name
            point["name"] = f"{content['name']},{end_of_name}"
        result.append((point, end_of_name))
    counts = collections.Counter(end_of_name for _, end_of_name in result)
    for end_of_name, count in counts.items():
        if count > 1:
            raise StudySpecError(f"{source}: {VARY}: two points are called {end_of_name}; each needs its own name")
    return result


def _checked_vary(varied: Any, source: str) -> Mapping[str, Sequence[Any]]:
    """The mapping of keys with dots to their values.

    Raises:
        StudySpecError: it has another form, a key belongs to the whole file, or one key is a part of another.
    """
    if not isinstance(varied, Mapping):
        example = f"keys with lists of values, as in {VARY}: {{objective.settings.images: [200, 1000]}}"
        raise StudySpecError(f"{source}: {VARY}: expected {example}, got {excerpt(varied)}")
    for key, values in varied.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise StudySpecError(f"{source}: {VARY}: expected keys with dots between, got {excerpt(key)}")
        if key.split(".")[0] in _FIXED:
            raise StudySpecError(f"{source}: {VARY}.{key}: cannot be varied")
        if not isinstance(values, (list, tuple)) or not values:
            raise StudySpecError(f"{source}: {VARY}.{key}: expected a list of values, got {excerpt(values)}")
        for other_key in varied:
            if str(other_key).startswith(f"{key}."):
                raise StudySpecError(f"{source}: {VARY}: {key} has {other_key} in it; vary one of them")
    return varied


def _in_a_name(value: Any) -> str:
    """A value as it stands in the name of a point: other characters become ``-``; ``none`` if nothing is left."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if _NOT_IN_A_NAME.search(text):
        text = _NOT_IN_A_NAME.sub("-", text).strip("-")
    return text or "none"


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key → its last part, or more of its last parts where two keys end alike."""
    short_names = {}
    for key in keys:
        other_keys = [f".{other_key}" for other_key in keys if other_key != key]
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            tail = ".".join(parts[-count:])
            if not any(other_key.endswith(f".{tail}") for other_key in other_keys):
                break
        short_names[key] = tail
    return short_names


def split_point(experiment: str) -> tuple[str, dict[str, str]]:
    """``samples,images=200`` → ``samples`` and ``{"images": "200"}``, which is empty if nothing is varied."""
    sweep, *varied = experiment.split(",")
    return sweep, dict(part.partition("=")[::2] for part in varied)


def replaced(content: Any, keys: Sequence[str], value: Any, *, where: str) -> Any:
    """A copy of the content with one value replaced; missing mappings on the way to it are created.

    Args:
        content: the content of a study file, or a part of it; it is left as it is.
        keys: the path of keys to the value. In a list of names, as that of optimizers, a key is one of the names, and
            the next key an option of it.
        value: the new one.
        where: begins the message of an error.

    Raises:
        StudySpecError: a value on the path has no keys, or a list has no entry of that name.
    """
    return _replaced(content, (), keys, value, where)


def _replaced(
    content: Any,
    path: tuple[str, ...],
    keys: Sequence[str],
    value: Any,
    where: str,
) -> Any:
    """As :func:`replaced`, of the content at ``path``, with the keys that remain."""
    if not keys:
        return value
    if content is None:
        content = {}
    if isinstance(content, list):
        return _replaced_in_list(content, path, keys, value, where)
    key = keys[0]
    if not isinstance(content, Mapping):
        advice = f"set {'.'.join(path)} itself" if path else "expected a mapping of settings"
        raise StudySpecError(f"{where}: {excerpt(content)} has no key {key!r}; {advice}")
    return {**content, key: _replaced(content.get(key), (*path, key), keys[1:], value, where)}


def _replaced_in_list(
    entries: list[Any], path: tuple[str, ...], keys: Sequence[str], value: Any, where: str
) -> list[Any]:
    """As :func:`_replaced`, of a list of names, each as ``LCSC`` or ``LCSC: {…}``; the first key is one of them."""
    has_name = [entry == keys[0] or (isinstance(entry, Mapping) and list(entry) == [keys[0]]) for entry in entries]
    if not any(has_name):
        raise StudySpecError(f"{where}: {excerpt(entries)} has no {keys[0]!r}")
    result = []
    for entry, is_meant in zip(entries, has_name, strict=True):
        if is_meant:
            options = entry if isinstance(entry, Mapping) else {}
            result.append(_replaced(options, path, keys, value, where))
        else:
            result.append(entry)
    return result


def removed(content: Any, keys: Sequence[str], *, where: str) -> Any:
    """A copy of the content without one key.

    Args:
        content: the content of a study file; it is left as it is.
        keys: the path of keys to it.
        where: begins the message of an error.

    Raises:
        StudySpecError: there is no such key.
    """
    first = keys[0]
    if not isinstance(content, Mapping) or first not in content:
        raise StudySpecError(f"{where}: there is no key {first!r}{near_miss(first, _names(content))}")
    if len(keys) == 1:
        return {key: value for key, value in content.items() if key != first}
    return {**content, first: removed(content[first], keys[1:], where=where)}


def _names(content: Any) -> list[str]:
    return [str(key) for key in content] if isinstance(content, Mapping) else []
