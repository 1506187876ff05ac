"""What libraries warn of while their code runs."""

from __future__ import annotations

import logging
import warnings

import pytest

from lcsc_opt.base.libraries import collected_messages


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_what_a_library_warns_of_is_a_notice_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    import diffusers

    caplog.set_level("DEBUG", logger="lcsc_opt")
    library = logging.getLogger("diffusers")
    before = [*library.handlers]
    assert diffusers.utils.logging.is_progress_bar_enabled()
    with collected_messages():
        assert not diffusers.utils.logging.is_progress_bar_enabled()
        for _ in range(2):
            logging.getLogger("diffusers.models").warning("settings {'a'} are\nignored")
        warnings.warn("weights of 'head' were drawn", stacklevel=1)
        warnings.warn("dtype has a new name", FutureWarning, stacklevel=1)
        logging.getLogger("diffusers.loaders").warning("No LoRA keys associated to CLIPTextModel found")
    assert lines(caplog, logging.INFO) == ["diffusers: settings {'a'} are ignored", "weights of 'head' were drawn"]
    assert len(lines(caplog, logging.DEBUG)) == 2, "nothing is lost"
    assert library.handlers == before
    assert diffusers.utils.logging.is_progress_bar_enabled()


def test_what_a_library_says_before_it_raises_is_said_by_our_own_line_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="lcsc_opt")

    def load() -> None:
        with collected_messages():
            logging.getLogger("diffusers").error("the weights cannot be found")
            raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        load()
    assert lines(caplog, logging.INFO) == []
    assert lines(caplog, logging.DEBUG) == ["diffusers: the weights cannot be found"]
