"""Settings in YAML, parsed once. An error is pydantic's, with the path of its key; an unknown key names a near miss."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from lcsc_opt.base.errors import LcscError, StudySpecError, text_of

Count = Annotated[int, pydantic.Field(ge=1)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Positive = Annotated[Finite, pydantic.Field(gt=0)]
"""Types of settings."""

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
        second_of(self)  # refuses what is not valid
        return self


def second_of(settings: Second) -> Second | None:
    """The settings of the second way of sampling, which only reports use: these, but for those of ``also``.

    ``None`` if there is no ``also``.

    Raises:
        StudySpecError: they are not valid.
    """
    if settings.also is None:
        return None
    # without defaults, as if the user had written the second version out
    named_settings = {name: getattr(settings, name) for name in settings.model_fields_set - {"also"}}
    return parse_settings(type(settings), {**named_settings, **settings.also}, source="also")


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
        details = error.errors()
        wrong_entries = {detail["loc"][:-1] for detail in details}
        # pydantic counts only valid entries: a list of wrong ones is also "too short"
        reported = [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in wrong_entries]
        problems = "; ".join(_problem(model, detail) for detail in _one_for_each_place(reported))
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


def first_problem(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong with what a file holds, in one line, with its place if it has one."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if place:
        return f"{place}: {message}"
    return message


def _is_form(part: str | int) -> bool:
    """Whether a part of a place is no key: where a value may have several forms, pydantic adds the one it tried."""
    return part in ("str", "int", "float", "bool") or "[" in str(part)


def _one_for_each_place(details: Sequence[Any]) -> list[Any]:
    """Join the errors of one value, for which pydantic has one for each form: at ``loss.str`` and ``loss.dict[…]``."""
    merged: dict[tuple[str | int, ...], Any] = {}
    for detail in details:
        *way, last = detail["loc"] or ("",)
        place = tuple(part for part in way if not _is_form(part))
        # of a key that is unknown or missing the last part is its name, even if it is called ``str``
        if detail["type"] in ("extra_forbidden", "missing") or not _is_form(last):
            place = (*place, last)
        if place in merged:
            merged[place]["msg"] += f" or {detail['msg'].removeprefix('Input should be ')}"
        else:
            merged[place] = {**detail, "loc": place}
    return list(merged.values())


def _problem(model: type[pydantic.BaseModel], detail: Any) -> str:
    """One line: where the value is, and what pydantic says of it; for an unknown key, which keys there are."""
    location: tuple[str | int, ...] = detail["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    kind = detail["type"]
    message: str = detail["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        keys = _keys_at(model, location[:-1])
        message = f"unknown key{near_miss(str(location[-1]), keys)}; expected one of {', '.join(keys)}"
    elif kind not in ("missing", "value_error"):
        message = f"{message}, got {excerpt(detail['input'])}"
    if path:
        return f"{path}: {message}"
    return message


def _keys_at(model: type[pydantic.BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that a mapping at this place of the file may have; numbers in the place are positions in a list."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The first model in an annotation such as ``tuple[OptimizerSpec, ...] | None``; ``None`` if it has none."""
    arguments = getattr(annotation, "__args__", ())
    if not arguments and isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in arguments:
        model = _model_in(argument)
        if model is not None:
            return model
    return None


def near_miss(name: str, names: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` with the most similar name, or an empty text if none is similar."""
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    for close in difflib.get_close_matches(name.lower(), by_lower_case, n=1):
        return f" (did you mean {by_lower_case[close]!r}?)"
    return ""


def plain(value: Any) -> Any:
    """What a caller of Python gives, as a study file has it: NumPy's numbers as Python's, sequences as lists, paths as
    text.

    Whatever has two axes or more, such as a tensor of images, stays as it is, and so does what is no data.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist") and getattr(value, "ndim", None) in (0, 1):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(entry) for entry in value]
    return value


def excerpt(value: Any) -> str:
    """The value as an error shows it: at most 60 characters, in one line."""
    text = repr(value)
    if "\n" in text:  # of a tensor
        text = " ".join(text.split())
    if len(text) <= 60:
        return text
    return f"{text[:57]}..."


def _yaml() -> YAML:
    """Plain data in YAML 1.2: 1e-4 is a number, 000500 five hundred, as in the name of a checkpoint, 1:30 is text."""
    yaml = YAML(typ="safe", pure=True)  # what is not pure reads YAML 1.1
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # which its stub has as None
    return yaml


def dump_yaml(content: Any, *, flow: bool | None = False, width: int = 80) -> str:
    """YAML from which :func:`parse_yaml` reads the same content, with its keys in their order.

    Args:
        content: mappings, lists, text and numbers.
        flow: whether in braces and brackets; ``None``: only the innermost.
        width: of a line.
    """
    yaml = _yaml()
    yaml.default_flow_style = flow
    yaml.width = width
    text = io.StringIO()
    yaml.dump(content, text)
    return text.getvalue()


def parse_yaml(text: str) -> Any:
    """The content of a text in YAML; a key that is given twice is an error.

    Raises:
        ValueError: the text is not YAML; one line says what is wrong, and where.
    """
    try:
        return _yaml().load(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except DuplicateKeyError as error:
        problem = " ".join(error.problem.split())  # it has the values, which may be of several lines
        raise ValueError(f"{problem} in line {error.problem_mark.line + 1}") from error
    except (YAMLError, ValueError) as error:  # ValueError: an integer with too many digits
        raise ValueError(text_of(error)) from error


@contextlib.contextmanager
def naming_setting(settings: Mapping[str, Any]) -> Iterator[None]:
    """Where an error begins with one of an objective's ``settings``, say where in the study file the setting is.

    Such an error begins as ``name: …``, ``name.key`` or ``name[0]``, and gets ``objective.settings.`` before it.
    Its type stays, and other errors stay as they are.
    """
    try:
        yield
    except LcscError as error:
        message = str(error)
        name = re.split(r"[:.\[]", message, maxsplit=1)[0]
        if name in settings:
            error.args = (f"objective.settings.{message}", *error.args[1:])
        raise
