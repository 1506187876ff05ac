"""Settings in YAML, parsed once. An error names the key's path, the allowed values and a near miss."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

from lcsc_opt.base.errors import LcscError, StudySpecError

Model = TypeVar("Model", bound=pydantic.BaseModel)

Second = TypeVar("Second", bound="AlsoSettings")


class FrozenModel(pydantic.BaseModel):
    """A validated mapping: frozen, no unknown keys, no conversion of types."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class AlsoSettings(FrozenModel):
    """Settings of sampling, of which reports use a second version.

    Attributes:
        also: the settings that differ there; ``None`` if there is no second version.
    """

    also: dict[str, pydantic.JsonValue] | None = None

    @pydantic.model_validator(mode="after")
    def _check_second(self) -> AlsoSettings:
        try:
            second_of(self)
        except StudySpecError as error:
            raise ValueError(str(error)) from error
        return self


def second_of(settings: Second) -> Second | None:
    """The settings with those of ``also``; ``None`` if there is no second version.

    Raises:
        StudySpecError: they are not valid.
    """
    if settings.also is None:
        return None
    given = {name: getattr(settings, name) for name in settings.model_fields_set - {"also"}}
    return parse_settings(type(settings), {**given, **settings.also}, source="also")


def parse_settings(model: type[Model], content: Any, *, source: str) -> Model:
    """Validate a mapping as ``model``; all problems become one line, each with the path of its key.

    Raises:
        StudySpecError: ``source: path: what was expected; path: …``.
    """
    if not isinstance(content, Mapping):
        raise StudySpecError(f"{source}: expected a mapping of keys to values, got {excerpt(content)}")
    try:
        return model.model_validate(dict(content))
    except pydantic.ValidationError as error:
        problems = "; ".join(_problems(model, content, error.errors()))
        raise StudySpecError(f"{source}: {problems}") from error


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], *, source: str, positional: Collection[str] = ()
) -> None:
    """Compare options with the keywords of what they are for: with its annotations, as pydantic reads them.

    Args:
        function: a function or a class.
        options: keyword → value.
        source: begins the message of an error.
        positional: names of parameters that are no options.

    Raises:
        StudySpecError: a keyword is unknown or missing, or its value has another type.
    """
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.name in positional or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (annotation, default)
    model = pydantic.create_model(source, __base__=FrozenModel, **fields)
    parse_settings(model, options, source=source)


_Path = tuple[str | int, ...]
"""The keys and the indices of lists that lead to a value of the file."""

_EXPECTED = {
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
    "sequence_str": "a list",
    "invalid_key": "a key that is text",
    "invalid-json-value": "a text, a number, true, false, a list or a mapping",
    "recursion_loop": "no alias that contains itself",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
}


def _problems(model: type[pydantic.BaseModel], content: Any, details: Iterable[Any]) -> list[str]:
    """One line for each wrong value.

    Where a value may have several forms, such as ``str | dict``, pydantic complains about each form. Complaints about
    one value become one line. A complaint that a value is not of one form is dropped if there is also one about a part
    of the value: the user chose the form that has this part.
    """
    by_path: dict[_Path, list[Any]] = {}
    for detail in details:
        by_path.setdefault(_path_in(content, detail), []).append(detail)
    lines = []
    misspelt = _misspelt(model, by_path)
    for path, complaints in by_path.items():
        if path in misspelt:  # the line about the unknown key suggests this one
            continue
        has_wrong_part = any(len(longer) > len(path) and longer[: len(path)] == path for longer in by_path)
        if has_wrong_part and _are_about_form(complaints):
            continue
        lines += _lines(model, path, complaints)
    return list(dict.fromkeys(lines))


def _misspelt(model: type[pydantic.BaseModel], by_path: Mapping[_Path, Sequence[Any]]) -> set[_Path]:
    """The paths of keys that are missing since an unknown key beside them is their misspelling."""
    paths: set[_Path] = set()
    for path, complaints in by_path.items():
        for complaint in complaints:
            if complaint["type"] == "extra_forbidden":
                intended_key = _near_name(str(path[-1]), _keys_at(model, complaint["loc"][:-1]))
                if intended_key is not None:
                    paths.add((*path[:-1], intended_key))
    return {path for path in paths if all(complaint["type"] == "missing" for complaint in by_path.get(path, ()))}


def _are_about_form(complaints: Sequence[Any]) -> bool:
    """Whether these complaints are only that a value is not of one of its forms."""
    return all(complaint["type"].endswith(("_type", "literal_error")) for complaint in complaints)


def _path_in(content: Any, detail: Any) -> _Path:
    """The part of pydantic's location that is in the file; it also contains names of types and functions."""
    path: list[str | int] = []
    value = content
    for part in detail["loc"]:
        if _has(value, part):
            value = value[part]
            path.append(part)
    if isinstance(value, Mapping) and detail["type"] != "missing":
        # a short form, such as {LCSC: 3}, has the value under another key
        path += [key for key, item in value.items() if item is detail["input"]][:1]
    if detail["type"] in ("missing", "extra_forbidden") and detail["loc"][-1:] != tuple(path[-1:]):
        path.append(detail["loc"][-1])  # the file lacks the key, or has its parent in a short form
    return tuple(path)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value)


def _lines(model: type[pydantic.BaseModel], path: _Path, complaints: Sequence[Any]) -> list[str]:
    """The complaints about one value; those about its type or form are joined to one ``expected A or B, got …``."""
    shown_path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    lines: list[str] = []
    expected: list[str] = []
    hints: list[str] = []
    for complaint in complaints:
        kind = complaint["type"]
        if kind == "extra_forbidden":
            keys = _keys_at(model, complaint["loc"][:-1])
            hint = near_miss(str(path[-1]), keys)
            lines.append(f"{shown_path}: unknown key{hint}; expected one of {', '.join(keys)}")
        elif kind == "missing":
            lines.append(f"{shown_path}: missing")
        elif kind == "value_error":
            message = complaint["msg"].removeprefix("Value error, ")
            lines.append(f"{shown_path}: {message}" if path else message)
        else:
            expected.append(_expected(complaint))
            # where several forms are possible, a hint would suggest only one of them
            if kind == "literal_error" or len(complaints) == 1:
                hints.append(_hint(complaint))
    if expected:
        choices = " or ".join(dict.fromkeys(expected))
        value = excerpt(complaints[0]["input"])
        lines.append(f"{shown_path}: expected {choices}, got {value}{''.join(dict.fromkeys(hints))}")
    return lines


def _expected(complaint: Any) -> str:
    """What a value should be: the text that follows ``expected`` in an error."""
    kind = complaint["type"]
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**complaint.get("ctx", {}))
    message: str = complaint["msg"].removeprefix("Input should be ")
    if kind == "literal_error":
        return message.replace("True", "true").replace("False", "false")
    return message.replace("String should match pattern", "text that matches")


def _hint(complaint: Any) -> str:
    """A likely cause in brackets; or an empty text."""
    value = complaint["input"]
    if complaint["type"] == "literal_error":
        choices = complaint["ctx"]["expected"].replace(" or ", ",").split(",")
        return near_miss(str(value), [choice.strip("' ") for choice in choices])
    if complaint["type"] == "string_type" and isinstance(value, (int, float)):
        return f" (it is text in quotes, in a shell '\"{value}\"')"
    return ""


def _keys_at(model: type[pydantic.BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that a mapping at this place of the file may have."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The first model in an annotation such as ``tuple[OptimizerSpec, ...] | None``."""
    arguments = getattr(annotation, "__args__", ())
    if not arguments and isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in arguments:
        model = _model_in(argument)
        if model is not None:
            return model
    return None


def near_miss(name: str, names: Sequence[str]) -> str:
    """`` (did you mean 'x'?)``, or an empty text if none of the names is similar."""
    close = _near_name(name, names)
    return "" if close is None else f" (did you mean {close!r}?)"


def _near_name(name: str, names: Sequence[str]) -> str | None:
    """The most similar of the names; ``None`` if none is similar."""
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return by_lower_case[close[0]] if close else None


def excerpt(value: Any) -> str:
    """The value as an error shows it: at most 60 characters, in one line."""
    text = repr(value)
    if "\n" in text:  # of a tensor
        text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but keys are text and unique, 1e-4 is a number, 010 is ten, and a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _error_at(key, f"{key.value} is given twice")
            if key.tag == _NUMBER:  # 0,02 in a mapping on one line
                raise _error_at(key, f"{key.value} is not a key (write numbers with a point: 0.02)")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _error_at(node: yaml.ScalarNode, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_NUMBER = "!number"
_NUMBER_FORM = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$")


def _number(_: _Loader, node: yaml.ScalarNode) -> float:
    """The value of a number. One with an exponent may be an integer."""
    text = node.value
    if "e" in text.lower():
        number = float(text)
        return int(number) if number.is_integer() else number
    return float(text) if "." in text else int(text)


# without PyYAML's own rules for numbers and dates, in favour of _NUMBER_FORM
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBER, _NUMBER_FORM, list("-+.0123456789"))
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
    except yaml.MarkedYAMLError as error:
        raise ValueError(_problem_and_place(error)) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer with too many digits
        raise ValueError(" ".join(str(error).split())) from error


def _problem_and_place(error: yaml.MarkedYAMLError) -> str:
    """The problem, its line and its column, without PyYAML's quotation of the text."""
    mark = error.problem_mark
    if mark is None:
        return " ".join(str(error).split())
    context = "" if error.context is None else f"{error.context}: "
    return f"{context}{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


@contextlib.contextmanager
def naming_setting(settings: Mapping[str, Any]) -> Iterator[None]:
    """Where an error begins with the name of a setting, say where in the study file the setting is."""
    try:
        yield
    except LcscError as error:
        message = str(error)
        name = re.split(r"[:.\[ ]", message, maxsplit=1)[0]
        if name not in settings:
            raise
        raise type(error)(f"objective.settings.{message}") from error
