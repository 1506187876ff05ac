"""Settings that people write: YAML, parsed once, and refused with the path, the allowed values and a near miss."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

from lcsc_opt.base.errors import StudySpecError

Model = TypeVar("Model", bound=pydantic.BaseModel)


class FrozenModel(pydantic.BaseModel):
    """A validated mapping: frozen, no unknown keys, no guessing of types."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def parse_settings(model: type[Model], content: Any, *, source: str) -> Model:
    """Validate a mapping as ``model``, turning every complaint into one line with the path of the key.

    Raises:
        StudySpecError: ``source: path: what was expected; path: …``.
    """
    if not isinstance(content, Mapping):
        raise StudySpecError(f"{source}: expected a mapping of keys to values, got {excerpt(content)}")
    try:
        return model.model_validate(dict(content))
    except pydantic.ValidationError as error:
        problems = [_problem(model, detail) for detail in error.errors()]
        raise StudySpecError(f"{source}: {'; '.join(dict.fromkeys(problems))}") from error


_EXPECTED = {
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
    "sequence_str": "a list",
    "invalid_key": "a key that is text",
    "invalid-json-value": "a text, a number, true, false, a list or a mapping",
    "recursion_loop": "no alias that contains itself",
}


def _problem(model: type[pydantic.BaseModel], detail: Any) -> str:
    location = [part for part in detail["loc"] if not str(part).startswith("function-")]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        return f"{path}: unknown key{near_miss(str(location[-1]), known)}; expected one of {', '.join(known)}"
    if kind == "missing":
        return f"{path}: missing"
    message = _EXPECTED.get(kind) or detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message.replace("String should match pattern", "text that matches")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    given, hint = detail["input"], ""
    if kind == "literal_error":
        choices = detail["ctx"]["expected"].replace(" or ", ",").split(",")
        hint = near_miss(str(given), [part.strip("' ") for part in choices])
    elif kind == "string_type" and isinstance(given, (int, float)):
        hint = f" (it is text in quotes, in a shell '\"{given}\"')"
    return f"{path}: expected {message}, got {excerpt(given)}{hint}"


def _keys_at(model: type[pydantic.BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that a mapping at this place of the file may have."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    parts = getattr(annotation, "__args__", ())
    if not parts and isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    found = (_model_in(part) for part in parts)
    return next((part for part in found if part is not None), None)


def near_miss(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing when no known name is near."""
    lowered = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f" (did you mean {lowered[close[0]]!r}?)" if close else ""


def excerpt(value: Any) -> str:
    """The value as an error shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key is text and given once, 1e-4 is a number, 010 is ten, and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            problem = "is given twice" if key.value in seen else "is no key (a number has a point: 0.02)"
            if key.value in seen or key.tag == _NUMBER:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} {problem}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_NUMBER = "!number"


def _number(_: _Loader, node: yaml.ScalarNode) -> float:
    """The value of a number. One with an exponent may be whole."""
    text = node.value
    if "e" not in text.lower():
        return float(text) if "." in text else int(text)
    number = float(text)
    return int(number) if number.is_integer() else number


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _NUMBER, re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)
_Loader.add_constructor(_NUMBER, _number)


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
        said = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:  # without the lines of the text
            context, where = "" if error.context is None else f"{error.context}: ", error.problem_mark
            said = f"{context}{error.problem} in line {where.line + 1}, column {where.column + 1}"
        raise ValueError(said) from error
