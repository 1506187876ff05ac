"""How checks report a broken contract."""

from __future__ import annotations

from lcsc_opt.base.errors import ContractError


def require(kept: bool, broken: str) -> None:
    """Raise a :class:`ContractError` that says what is ``broken``, unless it is ``kept``."""
    if not kept:
        raise ContractError(broken)
