"""YAML as people write it: study files, and values on the command line."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key is text and given once, 1e-4 is a number, 010 is ten, and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _refused(f"{key.value} is given twice", key)
            if key.tag == NUMBER:
                raise _refused(f"{key.value} is no key (a comma ends a value: write 0.02, or 10000)", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _refused(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


NUMBER = "!number"


def _number(_: _Loader, node: yaml.ScalarNode) -> float:
    """The value of a number. One with an exponent may be whole."""
    text = node.value
    if re.fullmatch(r"[-+]?[1-9][0-9]{0,2}\.000", text):
        raise _refused(f"{text} means {text[:-4]} to some and {text[:-4]}000 to others (write one of these)", node)
    if "e" not in text.lower():
        return float(text) if "." in text else int(text)
    number = float(text)
    return int(number) if number.is_integer() else number


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    NUMBER, re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)
_Loader.add_constructor(NUMBER, _number)


def parse_yaml(text: str) -> Any:
    """The content of a text in YAML.

    Raises:
        ValueError: the text is not YAML; the message says what is wrong, and where.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: numbers of too many digits
        raise ValueError(_wrong(error)) from error


def _wrong(error: Exception) -> str:
    """The message of an error, without the lines of the text, which the reader has."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        context = "" if error.context is None else f"{error.context}: "
        where = error.problem_mark
        return f"{context}{error.problem} in line {where.line + 1}, column {where.column + 1}"
    return " ".join(str(error).split())
