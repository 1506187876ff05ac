"""The score in what a command printed or wrote: its last number, or a value in its JSON."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import STANDARD_ERROR
from lcsc_opt.objective.scorer import metrics_of

_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf|infinity|nan)"
_NUMBERS = re.compile(  # joined by commas; not inside words, paths and versions
    rf"(?<![\w./-])(?<!\d,){_NUMBER}(?:,{_NUMBER})*(?![\w/]|\.\d)", re.IGNORECASE
)
_JSON_AT_LINE_START = re.compile(r"^[\[{]", re.MULTILINE)  # inner objects of indented JSON stand further right
_WITH_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?")


def last_number(output: str) -> float:
    """The last number in a text. ``1,234.5`` is one number, and of ``3,0.25`` the last is 0.25.

    Raises:
        ObjectiveError: the text has no number; or its last one is like ``0,5``, whose comma may be a decimal point.
    """
    tokens = _NUMBERS.findall(output)
    if not tokens:
        raise ObjectiveError(f"command: printed no number{last_line(output)}")
    token: str = tokens[-1]
    if _WITH_THOUSANDS.fullmatch(token):
        return float(token.replace(",", ""))
    before, _, number = token.rpartition(",")
    if before and number.isdigit():
        raise ObjectiveError(
            f"command: printed {token}, which may be one number or several; "
            "let it print one number with a decimal point last, or JSON, and set read"
        )
    return float(number)


def metrics_in_json(content: Any, path: str, *, name: str) -> dict[str, float]:
    """The number or the outcomes at ``path``, and the standard error that lm_eval writes next to a number.

    Args:
        content: parsed JSON.
        path: keys with dots between them. A key also matches the only one that continues it after a comma: ``acc``
            matches lm_eval's ``acc,none``.
        name: the name of the score among the metrics.

    Raises:
        ObjectiveError: there is nothing at ``path``, or neither a number nor outcomes.
        MetricError: the number is not finite.
    """
    metrics = metrics_of(_value_at(content, path), name)
    try:
        standard_error = _value_at(content, f"{path}{STANDARD_ERROR}")
    except ObjectiveError:
        return metrics
    if isinstance(standard_error, float):
        metrics[f"{name}{STANDARD_ERROR}"] = standard_error
    return metrics


def json_of_command(out: Path, output: str) -> Any:
    """Parse the newest JSON at or below ``out``; if the command wrote none, what it printed.

    Lines of a log may stand before the JSON, which then begins on a line of its own.

    Raises:
        ObjectiveError: that is not JSON.
    """
    files = [path for path in out.parent.rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix == ".json" or path == out]
    if files:
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        text = newest.read_text(encoding="utf-8", errors="replace")
        source = f"{newest.name} that it wrote"
    else:
        text = output
        source = "its standard output, and it wrote no file"
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    for first in reversed(list(_JSON_AT_LINE_START.finditer(text))):
        with contextlib.suppress(ValueError, RecursionError):
            content, _ = json.JSONDecoder().raw_decode(text, first.start())
            return content
    raise ObjectiveError(f"command: no JSON in {source}; let it print a JSON object last, or write it{last_line(text)}")


def last_line(text: str) -> str:
    """``: LINE``, the end of an error message; empty if there is no line."""
    for line in reversed(re.split(r"[\r\n]", text)):  # progress bars end their lines with \r
        if line.strip():
            return f": {line.strip()[:300]}"
    return ""


def _value_at(content: Any, path: str) -> Any:
    value: Any = content
    for name in path.split("."):
        keys = list(value) if isinstance(value, Mapping) else []
        matches = [key for key in keys if key.partition(",")[0] == name]
        if name in keys:
            matches = [name]
        if len(matches) != 1:
            choices = ", ".join(matches or keys[:8]) or json.dumps(value)[:80]
            raise ObjectiveError(f"command: {path}: its JSON has {len(matches) or 'no'} {name!r} in {choices}")
        value = value[matches[0]]
    return value
