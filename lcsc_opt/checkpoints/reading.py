"""One checkpoint out of any file or folder that people save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints import hub
from lcsc_opt.checkpoints.content import Content, kind, shown
from lcsc_opt.checkpoints.distributed import METADATA, ShardedRef, read_distributed
from lcsc_opt.checkpoints.pickles import MALFORMED
from lcsc_opt.checkpoints.torch_files import TensorRef, map_tensors, read_content

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_WRAPPERS = ("module.", "_orig_mod.")  # put by DataParallel and by torch.compile
_MOST_TENSORS = 100_000
_LONGEST_NAME = 2_000
_REPEATED = 16  # how much larger than the file its tensors may be, where they share memory


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        tensors: name → tensor on the CPU; they may be mapped from the file, so copy before writing to them.
        key: where in the file they were: ``"a.b"`` for nested dicts, the subfolder of a diffusers folder,
            ``""`` when the file is the bare state dict.
        metadata: the texts of a safetensors header; empty for other formats.
    """

    tensors: dict[str, Tensor]
    key: str
    metadata: Mapping[str, str]


def read_checkpoint(path: str | Path, *, key: str | None = None) -> Checkpoint:
    """Read the state dict that is in ``path``; code in the file is never run.

    Args:
        path: ``.safetensors``, an index of several, ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` or ``.pkl`` of torch,
            Lightning or NVlabs; or a folder of diffusers, PEFT, Accelerate or ``torch.distributed.checkpoint`` such as
            ``checkpoint-500``.
        key: which state dict of the file, as in :class:`Checkpoint`; the start of the tensors' names may follow it
            (``state_dict.model``). ``None`` looks in the usual places, for running averages (``ema`` …) before raw
            weights; where there was a choice, a notice says what was taken.

    Raises:
        TrajectoryError: not there, truncated, not weights, made to harm, or ``key`` is not in it.
    """
    path = hub.fetched(Path(path))
    with _naming(path):
        if not path.is_dir():
            return _read_file(path, key)
        found = find_weights(path, key)
    if found.others:
        notice(f"{path.name}: taking {found.key!r}; there is also {', '.join(found.others)} (choose with --key).")
    rest = (found.rest or None) if found.file.name == METADATA else found.rest
    checkpoint = read_checkpoint(found.file, key=rest)
    return dataclasses.replace(checkpoint, key=".".join(filter(None, (found.key, checkpoint.key))))


def read_metadata(path: str | Path) -> Mapping[str, str]:
    """The texts of a safetensors header, without the weights; empty for other formats.

    Raises:
        TrajectoryError: as :func:`read_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        return {}
    with _naming(path), safe_open(path, framework="pt", device="cpu") as file:
        return dict(file.metadata() or {})


def read_init_arguments(path: str | Path, *, key: str = "ema") -> dict[str, Any]:
    """How the network in a snapshot of EDM or EDM2 was made, as plain data; nothing in the file is run.

    Args:
        path: ``network-snapshot-*.pkl``.
        key: which network of the file.

    Returns:
        ``class_name`` (such as ``"EDMPrecond"``), ``init_args`` (a list) and ``init_kwargs`` (a dict).

    Raises:
        TrajectoryError: as :func:`read_checkpoint`; or an argument is not plain data.
    """
    path = Path(path)
    with _naming(path):
        return Content(read_content(path)).init_arguments(key)


def module_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, without the prefixes of wrappers.

    Of a module that averages a model, such as ``AveragedModel`` of torch and ``EMA`` of ema-pytorch, these are the
    averaged weights under the model's names.
    """
    content = Content(module.state_dict())
    return _unwrapped(content.state_dict(content.guess()))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong while this is open becomes one line that begins with ``path``."""
    try:
        if not path.exists():
            raise TrajectoryError("does not exist: check the path.")
        if path.stat().st_size == 0:
            raise TrajectoryError("is empty: the save was interrupted; leave it out.")
        yield
    except TrajectoryError as error:
        raise TrajectoryError(f"{path} {error}") from error
    except PermissionError as error:
        raise TrajectoryError(f"{path} cannot be read: permission denied.") from error
    except Exception as error:  # a hostile file can raise anything
        raise TrajectoryError(f"{path} {MALFORMED}") from error


def _read_file(path: Path, key: str | None) -> Checkpoint:
    metadata: Mapping[str, str] = {}
    content: Any
    if _is_index(path):
        content = _read_shards(path)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_count(names := file.keys())
            content, metadata = {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    elif path.name == METADATA:
        content = read_distributed(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = read_content(path)
    else:
        raise TrajectoryError(f"is not a checkpoint: expected .safetensors, {', '.join(TORCH_SUFFIXES)}.")
    content = Content(content)
    found = content.guess() if key is None else key
    if key is None and (others := content.others(found)):
        notice(f"{path.name}: taking {found!r}; there is also {', '.join(map(shown, others))} (choose with --key).")
    return Checkpoint(_unwrapped(_tensors(path, content.state_dict(found), found)), found, dict(metadata))


def _tensors(path: Path, state: Mapping[Any, Any], key: str) -> dict[str, Tensor]:
    if not state:
        raise TrajectoryError(f"holds no tensor{f' under {shown(key)!r}' if key else ''}: leave it out.")
    _check_count(state)
    for name, value in state.items():
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not isinstance(value, (Tensor, TensorRef)):
            where = shown(f"{key}.{name}" if key and isinstance(name, str) else name)
            raise TrajectoryError(
                f"has {kind(value)} at {where!r}, not a tensor: pass --key, or save the weights alone."
            )
    state = {name: value.read() if isinstance(value, ShardedRef) else value for name, value in state.items()}
    tensors = map_tensors(path, state)
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    files = path.parent.glob("*") if _is_index(path) or path.name == METADATA else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if claimed > _REPEATED * size + 2**24:
        message = f"has tensors of {claimed / 2**30:,.1f} GiB in a file of {size / 2**30:,.1f} GiB: leave it out."
        raise TrajectoryError(message)
    return tensors


def _check_count(names: Sized) -> None:
    if len(names) > _MOST_TENSORS:
        raise TrajectoryError(f"holds more than {_MOST_TENSORS:,} tensors: leave it out.")


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of ``DataParallel`` and ``torch.compile`` where every name carries them."""
    prefix = ""
    for _ in range(8):
        prefix += next((w for w in _WRAPPERS if tensors and all(n.startswith(prefix + w) for n in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _is_index(path: Path) -> bool:
    """Whether this is an index such as ``model.safetensors.index.json``, which lists the files of split weights."""
    return path.name.endswith(".json") and ".index." in path.name


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = json.loads(index.read_bytes())["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrajectoryError("is no index of weights: save the model again, or name its files.") from error
    files: dict[str, list[str]] = {}
    for name, file in names:
        if not isinstance(file, str) or not _is_plain_name(file) or _is_index(Path(file)):
            raise TrajectoryError(f"names a file outside of its folder ({shown(file)}): leave it out.")
        files.setdefault(file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, wanted in files.items():
        if not (index.parent / file).is_file():
            raise TrajectoryError(f"lists {shown(file)}, which is not there: save or copy the model again.")
        shard = _read_file(index.parent / file, "").tensors
        if missing := [name for name in wanted if name not in shard]:
            raise TrajectoryError(f"lists {shown(missing[0])!r}, which is not in {shown(file)}: save the model again.")
        tensors.update((name, shard[name]) for name in wanted)
    return tensors


# folders that are one checkpoint, of diffusers, Accelerate, PEFT, torch.distributed.checkpoint, and whole pipelines

_AVERAGED = ("unet_ema", "transformer_ema", "prior_ema")
_COMPONENTS = (*_AVERAGED, "unet", "transformer", "prior", "unet_lora", "transformer_lora", "pytorch_model_fsdp_0")
_STEMS = ("diffusion_pytorch_model", "pytorch_lora_weights", "adapter_model")
_SAFETENSORS = [f"{stem}.safetensors" for stem in (*_STEMS, "model")]
_WEIGHTS_FILES = [*_SAFETENSORS, *(f"{stem}.bin" for stem in (*_STEMS, "pytorch_model"))]
_NAMED_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pkl", ".pt", ".pth")


class _Found(NamedTuple):
    """The file of a folder that has the weights."""

    file: Path  # or the index of several
    key: str  # which chooses this file in the folder; "" when it lies in the folder itself
    rest: str | None = ""  # of the key, which finds the state dict in the file; with None it is guessed
    others: tuple[str, ...] = ()  # keys of other components; empty where the user has chosen


def find_weights(folder: Path, key: str | None) -> _Found:
    """The weights of a folder: in it, in the subfolder ``key``, or in its file ``key``.

    Raises:
        TrajectoryError: there are none, or several of which none can be preferred.
    """
    if key in (None, "", folder.name) and (file := _weights_file(folder)):
        return _Found(file, key or "")
    if not key:
        there = [(name, file) for name in _COMPONENTS if (file := _weights_file(folder / name))]
        if not there:
            raise TrajectoryError("holds no weights that are known: name the file itself, or pass --key SUBFOLDER.")
        return _Found(there[0][1], there[0][0], others=tuple(name for name, _ in there[1:]))
    first, _, rest = key.partition(".")
    for name, left in ((key, ""), (first, rest)):
        if not _is_plain_name(name):
            continue
        if not left and (file := _weights_file(folder / name)):
            return _Found(file, name)
        for suffix in _NAMED_FILES:
            if (file := folder / f"{name}{suffix}").is_file():
                return _Found(file, name, rest=left or None)
    if (file := _weights_file(folder)) and file.name == METADATA:
        return _Found(file, "", rest=key)
    raise TrajectoryError(f"holds no weights in {shown(key)!r}: name the file itself, or pass --key SUBFOLDER.")


def _is_plain_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _weights_file(folder: Path) -> Path | None:
    for name in _WEIGHTS_FILES:
        for candidate in (folder / name, folder / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    if any(folder.glob("*.distcp")):
        return folder / METADATA
    for name in _WEIGHTS_FILES:
        stem, _, suffix = name.rpartition(".")
        variants = [*folder.glob(f"{stem}.*.{suffix}"), *folder.glob(f"{stem}.{suffix}.index.*.json")]
        variants = [file for file in variants if "-of-" not in file.name]  # the parts that an index lists
        if len(variants) > 1:
            names = ", ".join(sorted(file.name for file in variants)[:4])
            raise TrajectoryError(f"holds several variants of its weights ({names}): name one of these files.")
        if variants:
            return variants[0]
    return None
