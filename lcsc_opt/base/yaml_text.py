"""YAML as people write it: study files, and values on the command line."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but it refuses a key that is given twice, and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _power_of_ten(_: _Loader, node: yaml.ScalarNode) -> float:
    """Read 1e-4, and 1e4 as a whole number. In YAML 1.1, which PyYAML reads, they are texts: they lack a point or a
    sign.
    """
    number = float(node.value)
    return int(number) if number.is_integer() else number


_Loader.add_implicit_resolver("!exponent", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_constructor("!exponent", _power_of_ten)


def parse_yaml(text: str) -> Any:
    """The content of a text in YAML.

    Raises:
        ValueError: the text is not YAML; the message says what is wrong, and where.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: dates and numbers that cannot be
        raise ValueError(_wrong(error)) from error


def _wrong(error: Exception) -> str:
    """The message of an error, without the lines of the text, which the reader has."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        context = "" if error.context is None else f"{error.context}: "
        where = error.problem_mark
        return f"{context}{error.problem} in line {where.line + 1}, column {where.column + 1}"
    return " ".join(str(error).split())
