"""Which tensors of two models are the same ones: by their names, but for prefixes and wrappers, and by their shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.torch_files import is_tensor
from lcsc_opt.checkpoints.weights import possible_renamings

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile, FSDP
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_DATA_PARALLEL = "module."


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without the names of the wrappers of ``torch.compile`` and FSDP, which no network has of its own."""
    bare = dict(tensors)
    for wrapper in _WRAPPERS:
        bare = {name.replace(wrapper, ""): tensor for name, tensor in bare.items()}
    if len(bare) < len(tensors):  # two tensors would have one name
        return dict(tensors)
    return bare


def without_data_parallel(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Without ``module.`` of ``DataParallel``, if all but counters begin with it; and what was removed.

    The counters, of wrappers that average such as mmengine's, are left out: the network has none.
    """
    weights = [name for name, tensor in tensors.items() if tensor.shape]
    prefix = ""
    while weights and all(name.startswith(prefix + _DATA_PARALLEL) for name in weights):  # wrappers may be nested
        prefix += _DATA_PARALLEL
    of_network = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) or not _counts(tensor)}
    bare = {name.removeprefix(prefix): tensor for name, tensor in of_network.items()}
    if len(bare) < len(of_network):  # two tensors would have one name
        return dict(tensors), ""
    return bare, prefix


def _counts(tensor: Any) -> bool:
    """Whether a tensor, or a reference to one, is a single whole number, as a counter is."""
    return not tensor.shape and not tensor.dtype.is_floating_point


def counterparts(tensors: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, str] | None:
    """The name of each tensor → that of the tensor of the same shape among ``others``; ``None`` if one has none.

    The names are the same, or all of either have one more prefix, or those of ``tensors`` lack their dots, as in
    CompVis' LitEma.
    """
    for names in _renamed(list(tensors), list(others)):
        if all(_have_one_shape(tensors[name], others.get(other)) for name, other in names.items()):
            return names
    return None


def _renamed(names: Sequence[str], others: Sequence[str]) -> Iterator[dict[str, str]]:
    """Ways to rename: each name → what it may be called in another model whose names are ``others``."""
    if not names:
        return
    for renaming in possible_renamings(names[0], others):  # the first name tells which prefixes are possible
        yield {name: renaming(name) for name in names}
    with_dots = {name.replace(".", ""): name for name in others}
    yield {name: with_dots.get(name, name) for name in names}


def _have_one_shape(tensor: Any, other: Any) -> bool:
    """Whether both are tensors, or references to some, of the same shape; ``None`` is none."""
    if not is_tensor(tensor) or not is_tensor(other):
        return False
    return tuple(tensor.shape) == tuple(other.shape)


def named_averages(averages: Sequence[Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Name → average, of a list without names, as score_sde, torch-ema and diffusers' ``EMAModel`` save it.

    It is matched with the model's state dict, in order and by shape: the list has one tensor for each of
    ``model.parameters()``, the state dict has buffers in between.

    Raises:
        TrajectoryError: there is no way to match them, or more than one.
    """
    floating = [name for name, tensor in model.items() if is_tensor(tensor) and tensor.dtype.is_floating_point]
    names = [name for name in floating if name.rpartition(".")[2] not in _STATISTICS]
    shapes = [tuple(model[name].shape) for name in names]
    # ``None`` has no place among the model's
    averaged_shapes = [tuple(average.shape) if is_tensor(average) else None for average in averages]
    earliest = _earliest_places(averaged_shapes, shapes)
    # the latest places are the earliest ones from behind: where both agree, there is no other way
    from_behind = _earliest_places(averaged_shapes[::-1], shapes[::-1])
    latest = [len(names) - 1 - place for place in reversed(from_behind)]
    if len(earliest) < len(averages) or earliest != latest:
        raise TrajectoryError(
            f"holds {len(averages)} averages without names, which do not fit the model's {len(model)} in exactly one "
            "way: save a state dict of them, or use the raw weights with --key model."
        )
    return {names[place]: average for place, average in zip(earliest, averages, strict=True)}


def _earliest_places(short: Sequence[Any], long: Sequence[Any]) -> list[int]:
    """Where the elements of ``short`` are in ``long``, in order and each as early as can be.

    Shorter than ``short`` where one has no place: it ends before that.
    """
    places: list[int] = []
    start = 0
    with contextlib.suppress(ValueError):  # which tells that there is none
        for element in short:
            places.append(long.index(element, start))
            start = places[-1] + 1
    return places
