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
from lcsc_opt.base.settings import excerpt

VARY = "vary"
_FIXED = ("name", "storage", VARY)  # of the whole file
_IN_A_NAME = re.compile(r"[^\w.+-]+")


def points(content: Mapping[str, Any], *, source: str) -> list[tuple[dict[str, Any], str]]:
    """The points of a study file's sweep: the content for each alone, and how its name says it (``images=200,nfe=2``).

    The last of the varied keys changes fastest.

    Args:
        content: of a study file that has ``vary``.
        source: begins the message of an error.

    Raises:
        StudySpecError: ``vary`` is no mapping of keys to lists of values, a key cannot be varied, or two points would
            have one name.
    """
    varied = content[VARY]
    if not isinstance(varied, Mapping):
        example = f"keys with lists of values, as in {VARY}: {{objective.settings.images: [200, 1000]}}"
        raise StudySpecError(f"{source}: {VARY}: expected {example}, got {excerpt(varied)}")
    for key, values in varied.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise StudySpecError(f"{source}: {VARY}: expected keys with dots between, got {excerpt(key)}")
        if key.split(".")[0] in _FIXED:
            raise StudySpecError(f"{source}: {VARY}.{key}: cannot be varied")
        if not isinstance(values, list) or not values:
            raise StudySpecError(f"{source}: {VARY}.{key}: expected a list of values, got {excerpt(values)}")
    short = _short_names(list(varied))
    made = []
    for values in itertools.product(*varied.values()):
        here = dict(zip(varied, values, strict=True))
        texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
        texts = [_IN_A_NAME.sub("-", text).strip("-") if _IN_A_NAME.search(text) else text for text in texts]
        shown = ",".join(f"{short[key]}={text or 'none'}" for key, text in zip(here, texts, strict=True))
        point: Any = {**content, VARY: {key: [value] for key, value in here.items()}}
        for key, value in here.items():
            point = replaced(point, key.split("."), value, where=f"{source}: {VARY}.{key}")
        if here and isinstance(content.get("name"), str):
            point["name"] = f"{content['name']},{shown}"
        made.append((point, shown))
    twice = [shown for shown, count in collections.Counter(shown for _, shown in made).items() if count > 1]
    if twice:
        raise StudySpecError(f"{source}: {VARY}: two points are called {twice[0]}; each needs a name of its own")
    return made


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key → its last part, or more of its last parts where two keys end alike."""
    short = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        short[key] = next((tail for tail in tails if not any(o.endswith(f".{tail}") for o in others)), key)
    return short


def split_point(experiment: str) -> tuple[str, dict[str, str]]:
    """``samples,images=200`` → ``samples`` and ``{"images": "200"}``, which is empty if nothing is varied."""
    sweep, *varied = experiment.split(",")
    return sweep, dict(part.partition("=")[::2] for part in varied)


def replaced(content: Any, keys: Sequence[str], value: Any, *, where: str) -> Any:
    """A copy of the content with one value replaced; missing mappings on the way to it are created.

    Args:
        content: of a study file, or a part of it; it is left as it is.
        keys: the way to the value. In a list of optimizers, a key is an optimizer's name, the next key an option.
        value: the new one.
        where: begins the message of an error.

    Raises:
        StudySpecError: a value on the way has no keys, or a list has no optimizer of that name.
    """
    if not keys:
        return value
    if content is None:
        content = {}
    if isinstance(content, list):
        called = [entry == keys[0] or (isinstance(entry, Mapping) and list(entry) == [keys[0]]) for entry in content]
        if not any(called):
            raise StudySpecError(f"{where}: {excerpt(content)} has no {keys[0]!r}")
        return [  # an optimizer is written as LCSC, or LCSC: {…}
            replaced(entry if isinstance(entry, Mapping) else {}, keys, value, where=where) if own else entry
            for entry, own in zip(content, called, strict=True)
        ]
    if not isinstance(content, Mapping):
        raise StudySpecError(f"{where}: {excerpt(content)} has no key {keys[0]!r}; replace all of it")
    return {**content, keys[0]: replaced(content.get(keys[0]), keys[1:], value, where=where)}
