"""The weights in the module tree of a TorchScript archive; OpenAI publishes CLIP as such an archive.

``torch.jit.save`` writes a zip file with source code, a pickle of the module tree, and one member for each storage. The
code is never read.
"""

from __future__ import annotations

from typing import Any

from lcsc_opt.checkpoints.contents import Record, Refused, is_tensor, kind

MAX_ATTRIBUTES = 100_000  # of all modules
MAX_NAME = 1_000  # characters of a tensor's whole name


def script_weights(root: Any) -> dict[str, Any]:
    """Dotted name → tensor: the parameters and buffers of the module tree that the pickle describes.

    Raises:
        Refused: no tree of modules, or one that contains itself.
    """
    if not _is_module(root):
        raise Refused(f"is a TorchScript archive of {kind(root)}, not of a module: save model.state_dict().")
    weights: dict[str, Any] = {}
    pending, seen = [("", root)], 0
    while pending:
        prefix, module = pending.pop()
        seen += 1 + len(module.state)
        if seen > MAX_ATTRIBUTES or len(prefix) > MAX_NAME:
            raise Refused("is a TorchScript archive whose modules hold each other: save model.state_dict().")
        for name, value in module.state.items():
            if is_tensor(value):
                weights[f"{prefix}{name}"] = value
            elif _is_module(value):
                pending.append((f"{prefix}{name}.", value))
    return weights


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and value.name.startswith("__torch__.") and isinstance(value.state, dict)
