"""How many images the tests draw where a user's study keeps some of a thousand."""

from __future__ import annotations

PAIRS = 60  # more than are shown, so that some are left out


def draw_few() -> None:
    """In this process, and in those that are forked from it."""
    from lcsc_opt.exports import images

    images.PAIRS = PAIRS
