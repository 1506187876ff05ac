from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from lcsc_opt.base.spans import listening, span


class Heard:
    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.lines.append(f"{name} begins")
        yield
        self.lines.append(f"{name} ends")


def test_spans_are_heard_while_somebody_listens() -> None:
    heard = Heard()
    with span("before"):
        pass
    with listening(heard), span("merge"):
        heard.lines.append("merging")
    with span("after"):
        pass
    assert heard.lines == ["merge begins", "merging", "merge ends"]


def test_all_who_listen_hear_and_one_may_leave_before_the_other() -> None:
    first, second = Heard(), Heard()
    with listening(first):
        with listening(second), span("ask"):
            pass
        with span("tell"):
            pass
    assert first.lines == ["ask begins", "ask ends", "tell begins", "tell ends"]
    assert second.lines == ["ask begins", "ask ends"]


def test_spans_of_other_threads_are_heard() -> None:
    heard = Heard()

    def work() -> None:
        with span("merge"):
            pass

    with listening(heard):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert heard.lines == ["merge begins", "merge ends"]


def test_an_error_inside_goes_through_and_nobody_listens_any_more() -> None:
    heard = Heard()
    with pytest.raises(ZeroDivisionError), listening(heard), span("sample"):
        raise ZeroDivisionError
    with span("later"):
        pass
    assert heard.lines == ["sample begins"]
