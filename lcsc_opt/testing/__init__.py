"""The contracts of objectives, optimizers, feature extractors, checkpoint formats and storages, as checks to call.

Each check is a function that returns if the contract is kept, and raises
:class:`AssertionError` if it is not. The error says what was expected and what was found. The
checks need no test framework::

    from lcsc_opt.testing import check_objective

    def test_my_objective_keeps_the_contract():
        check_objective(lambda: build({"images": 20}))
"""

from lcsc_opt.testing.contracts import (
    check_checkpoint,
    check_extractor,
    check_objective,
    check_optimizer,
    check_storage,
)

__all__ = ["check_checkpoint", "check_extractor", "check_objective", "check_optimizer", "check_storage"]
