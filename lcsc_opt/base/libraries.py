"""What other libraries say while their code runs: collected in one place, and said in lines of ours."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from lcsc_opt.base.progress import log, notice

_LIBRARIES = ("diffusers", "transformers")  # which have progress bars and loggers
_NOT_FOR_USERS = (  # words of what only callers can change, and of what is so by design
    "deprecated",
    "will be removed",
    "No LoRA keys associated to",  # of a component that a LoRA does not change
)
_MOST_CHARACTERS = 200


@contextlib.contextmanager
def collected_messages() -> Iterator[None]:
    """While this is open, libraries show no progress bars, and what they warn of is collected.

    Afterwards each message is a notice, but for those that are not for users, which ``--verbose`` shows. If their code
    raises, all are shown there only: then one line of ours says what they cannot do.
    """
    messages: list[str] = []
    is_done = False
    with contextlib.ExitStack() as undo:
        caught = undo.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("default")
        for name in _LIBRARIES:
            _collect(name, messages, undo)
        try:
            yield
            is_done = True
        finally:
            messages += [_of_warning(warning) for warning in caught]
            for message in dict.fromkeys(messages):
                line = _in_one_line(message)
                if is_done and not any(words in message for words in _NOT_FOR_USERS):
                    notice(line)
                else:
                    log.debug("%s", line)


def _of_warning(warning: warnings.WarningMessage) -> str:
    """What a warning says; of what Python calls a deprecation, with this word."""
    is_deprecation = issubclass(warning.category, (FutureWarning, DeprecationWarning))
    if is_deprecation:
        return f"deprecated: {warning.message}"
    return str(warning.message)


def _collect(name: str, messages: list[str], undo: contextlib.ExitStack) -> None:
    """Turn off a library's bars, and add what it logs to the messages instead."""
    library: Any = sys.modules.get(f"{name}.utils.logging")
    if library is None:  # nothing has imported it
        return
    if library.is_progress_bar_enabled():
        library.disable_progress_bar()
        undo.callback(library.enable_progress_bar)
    logger = logging.getLogger(name)
    undo.callback(setattr, logger, "handlers", logger.handlers)
    undo.callback(setattr, logger, "propagate", logger.propagate)
    logger.handlers = [_Collector(name, messages)]
    logger.propagate = False


class _Collector(logging.Handler):
    """Adds what a library logs to a list."""

    def __init__(self, library: str, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._library = library
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Add a record's message."""
        self._messages.append(f"{self._library}: {record.getMessage()}")


def _in_one_line(message: str) -> str:
    line = " ".join(message.split())
    if len(line) <= _MOST_CHARACTERS:
        return line
    return f"{line[: _MOST_CHARACTERS - 1]}…"
