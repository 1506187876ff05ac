"""Snapshots as EDM's and EDM2's training writes them, by a persistence module of our own that pickles as theirs does.

Unpickling one with :mod:`pickle` runs the source code in it, as theirs does; that is what the reader must never do.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

SOURCE = """
import torch
from torch import nn
{attack}
class Layer(nn.Module):
    pass
class Precond(nn.Module):
    pass
"""


class EasyDict(dict):
    """A dict whose entries are attributes."""

    __module__ = "dnnlib.util"

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    module: dict[str, Any] = {}
    exec(meta["module_src"], module)
    made = module[meta["class_name"]]
    made = made.__new__(made)
    made.__dict__.update(meta["state"])
    return made


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextlib.contextmanager
def nvlabs_modules() -> Iterator[None]:
    """``torch_utils.persistence`` and ``dnnlib.util`` can be imported, as in a clone of their repositories."""
    modules = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    modules["dnnlib.util"].EasyDict = EasyDict  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Persistent(nn.Module):
    """A network that is pickled with source code; ``attack`` is put into it."""

    attack = ""
    version = 6

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = args, kwargs

    def __reduce__(self) -> Any:
        meta = {
            "type": "class",
            "version": self.version,
            "module_src": SOURCE.format(attack=self.attack),
            "class_name": type(self).__name__,
            "state": super().__reduce__()[2],
        }
        return _reconstruct_persistent_obj, (meta,), None


class Layer(Persistent):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight = nn.Parameter(torch.randn(width, width))
        self.bias = None
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2) / 4)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


class Precond(Persistent):
    """A buffer, a list and a dict of parts (of torch's own classes), a part twice, and a part that is not there."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(width, **kwargs)
        self.register_buffer("freqs", torch.arange(4, dtype=torch.float64))
        self.enc = nn.ModuleDict({"8x8_conv": Layer(width), "8x8_norm": nn.GroupNorm(1, width)})
        self.dec = nn.ModuleList([Layer(width)])
        self.tied = self.dec[0]
        self.skip = None
        self.count = nn.Parameter(torch.tensor(3), requires_grad=False)


def network(seed: int, *, attack: str = "") -> Precond:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Precond(4, label_dim=10, channel_mult=[1, 2], nested=EasyDict(rate=0.5, on=None))
    made.attack = attack
    return made


def write_snapshot(path: Path, net: Persistent, /, *, half: bool = False, **others: Any) -> dict[str, torch.Tensor]:
    """A ``network-snapshot-*.pkl``; returns the weights in it."""
    ema = net.eval().requires_grad_(False)
    ema = ema.to(torch.float16) if half else ema
    data = EasyDict(ema=ema, dataset_kwargs=EasyDict(path="data.zip"), loss_fn=Layer(2), augment_pipe=None, **others)
    with nvlabs_modules(), path.open("wb") as file:
        pickle.dump(data if half else dict(data), file)
    return dict(ema.state_dict())


def write_training_state(path: Path, net: Precond) -> dict[str, torch.Tensor]:
    """A ``training-state-*.pt`` of EDM, which has the whole network in it."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
    with nvlabs_modules():
        torch.save({"net": net, "optimizer_state": optimizer.state_dict()}, path)
    return dict(net.state_dict())


def unpickled_the_usual_way(path: Path) -> Any:
    with nvlabs_modules(), path.open("rb") as file:
        return pickle.load(file)
