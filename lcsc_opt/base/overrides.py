"""Overrides: values of a study file that the command line replaces (``KEY=VALUE``) or removes (``~KEY``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.settings import excerpt, near_miss, parse_yaml


def with_overrides(content: Any, overrides: Sequence[str]) -> Any:
    """The content of a study file with other values.

    Args:
        content: the content; it is left as it is.
        overrides: such as ``objective.settings.images=500``: keys of the file joined by dots, and a value in YAML.
            ``~held_out`` removes a key, ``~optimizers.LCSC`` an entry of a list.

    Raises:
        StudySpecError: an override has another form; a value on its path is no mapping, or a list has no such entry; or
            what is to be removed is not there. A key that is missing is made.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        is_removed = path.startswith("~")
        if is_removed and not equals:
            content = _removed(content, path[1:].split("."), override)
            continue
        keys = path.split(".")
        if is_removed or not equals or not all(keys):
            raise StudySpecError(
                f"{override}: expected KEY=VALUE, as in objective.settings.images=500, or ~KEY, as in ~held_out"
            )
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise StudySpecError(f"{override}: not valid YAML: {error}") from error
        content = _replaced(content, (), keys, value, override)
    return content


def _replaced(content: Any, path: tuple[str, ...], keys: Sequence[str], value: Any, where: str) -> Any:
    """A copy of a part of the content with one value replaced; missing mappings on the way to it are created.

    Args:
        content: the part.
        path: of keys to it.
        keys: of the value in it. In a list of names, as that of optimizers, a key is one of the names, and the next key
            an option of it.
        value: the new one.
        where: begins the message of an error.

    Raises:
        StudySpecError: a value on the path has no keys, or a list has no entry of that name.
    """
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
    if not any(_is_named(entry, keys[0]) for entry in entries):
        raise StudySpecError(f"{where}: {excerpt(entries)} has no {keys[0]!r}")
    result = []
    for entry in entries:
        if _is_named(entry, keys[0]):
            options = entry if isinstance(entry, Mapping) else {}
            result.append(_replaced(options, path, keys, value, where))
        else:
            result.append(entry)
    return result


def _is_named(entry: Any, name: str) -> bool:
    """Whether an entry of a list, as ``LCSC`` or ``LCSC: {…}``, has this name."""
    return entry == name or (isinstance(entry, Mapping) and list(entry) == [name])


def _removed(content: Any, keys: Sequence[str], where: str) -> Any:
    """A copy of the content without one key; ``where`` begins the message of an error.

    Raises:
        StudySpecError: there is no such key.
    """
    first = keys[0]
    if isinstance(content, list) and any(_is_named(entry, first) for entry in content):
        kept = []
        for entry in content:
            if not _is_named(entry, first):
                kept.append(entry)
            elif len(keys) > 1:  # one of its options is meant
                kept.append(_removed(entry, keys, where))
        return kept
    if not isinstance(content, Mapping) or first not in content:
        names = [str(key) for key in content] if isinstance(content, Mapping) else []
        raise StudySpecError(f"{where}: there is no key {first!r}{near_miss(first, names)}")
    if len(keys) == 1:
        return {key: value for key, value in content.items() if key != first}
    return {**content, first: _removed(content[first], keys[1:], where)}
