"""What libraries show while their code runs."""

from __future__ import annotations

import warnings

from lcsc_opt.base.libraries import quiet_libraries


def test_libraries_show_no_bars_and_no_deprecations() -> None:
    import diffusers

    with quiet_libraries():
        assert not diffusers.utils.logging.is_progress_bar_enabled()
        warnings.warn("dtype has a new name", FutureWarning, stacklevel=1)
    assert diffusers.utils.logging.is_progress_bar_enabled()
