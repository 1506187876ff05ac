"""One checkpoint out of any file or folder that people save."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.distributed import METADATA, ShardedRef, read_distributed
from lcsc_opt.checkpoints.folders import find_weights, has_keys, in_file
from lcsc_opt.checkpoints.inventory import CHOOSE, COLLECTED, ONLINE_MODEL, STARTED, Inventory, Role
from lcsc_opt.checkpoints.matching import unwrapped, without_data_parallel
from lcsc_opt.checkpoints.modules import init_arguments_of
from lcsc_opt.checkpoints.names import CHECKPOINT_SUFFIXES, TORCH_SUFFIXES, is_plain_name
from lcsc_opt.checkpoints.pickles import MALFORMED, shown
from lcsc_opt.checkpoints.torch_files import TensorRef, kind, map_tensors, read_content
from lcsc_opt.checkpoints.watched import size_and_time
from lcsc_opt.checkpoints.weights import have_same_bits, sampled

_MOVES_MORE = 1.5  # a ratio: averages of random weights, in tests, move about as much as they do
_COMPARED_FILES = 3  # the last ones of a run, by which an average is told from weights
_MAX_TENSORS = 100_000
_MAX_NAME_LENGTH = 2_000
_MAX_SHARING = 16  # how much larger than the file its tensors may be, where they share memory


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        tensors: name → tensor on the CPU; they may be mapped from the file, so copy before writing to them.
        key: where in the file they were: ``"a.b"`` for nested dicts, the subfolder of a diffusers folder,
            ``""`` when the file is the bare state dict.
        prefix: what was before all names: that of ``DataParallel``, or of a network whose one part is called so.
    """

    tensors: dict[str, Tensor]
    key: str
    prefix: str = ""


def read_checkpoint(path: str | Path, *, key: str | None = None) -> Checkpoint:
    """Read the state dict that is in ``path``; code in the file is never run.

    Args:
        path: ``.safetensors``, an index of several, ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` or ``.pkl`` of torch,
            Lightning or NVlabs; or a folder of diffusers, PEFT, Accelerate or ``torch.distributed.checkpoint`` such as
            ``checkpoint-500``.
        key: which state dict of the file, as in :class:`Checkpoint`; the start of the tensors' names may follow it
            (``state_dict.model``). ``None`` looks in the usual places, for running averages (``ema`` …) before raw
            weights; where there was a choice, a notice says which was used.

    Raises:
        TrajectoryError: not there, truncated, not weights, made to harm, or ``key`` is not in it.
    """
    path = Path(path)
    with naming(path):
        if not path.is_dir():
            return _read_file(path, key)
        weights = find_weights(path, key)
    if weights.alternatives:
        _say_choice(path, weights.key or weights.file.name, weights.alternatives)
    key_in_file = weights.rest
    if has_keys(weights.file) and not key_in_file:
        key_in_file = None  # what was saved may be one content, with the optimizer: which part is meant is guessed
    checkpoint = read_checkpoint(weights.file, key=key_in_file)
    key_parts = [part for part in (weights.key, checkpoint.key) if part]
    return dataclasses.replace(checkpoint, key=".".join(key_parts))


class Searched(NamedTuple):
    """Which weights of a run are searched if nobody chooses.

    Attributes:
        key: what reads them; ``None`` where :func:`read_checkpoint` finds them.
        averages: the keys of their averages in the last checkpoint.
        said: sentences for the user.
    """

    key: str | None
    averages: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


def searched_key(*paths: Path) -> str | None:
    """The key of :func:`searched_weights`; notices say which weights they are."""
    searched = searched_weights(*paths)
    for sentence in searched.said:
        notice(sentence)
    return searched.key


def searched_weights(*paths: Path) -> Searched:
    """The weights that are searched if nobody chooses: raw ones, where the files have averages of them, too.

    What is found in raw weights is better (``benchmarks/results/tried.md``).

    Args:
        paths: the checkpoints of a run, in order.

    Raises:
        TrajectoryError: as :func:`read_checkpoint`; or the last file would be read by another key than the first.
    """
    first = paths[0]
    last = paths[-1]
    raw, first_averages = raw_and_averages(first)
    last_key, averages = raw_and_averages(last)
    if None not in (raw, last_key) and last_key != raw:
        raise TrajectoryError(
            f"{last} would be read by the key {last_key!r}, and the first checkpoint by {raw!r}: leave out those "
            f"without the average (first_step), or choose one ({CHOOSE})."
        )
    if first_averages and not averages:
        keys = " and ".join(shown(average) for average in first_averages)
        return Searched(raw, (), (f"{last.name} has no average ({keys}), unlike {first.name}: it has no row",))
    if raw is None or not averages:
        return Searched(None)
    keys = " or ".join(shown(average) for average in averages)
    said = []
    choice = f"for the trainer's average: key: {keys} in a study file, --key {keys} in commands"
    if len(averages) > 1:
        choice = f"for one of the trainer's averages: key (--key in commands) {keys}"
    same = next((average for average in averages if _are_equal(last, raw, average)), None)
    collected = next((key for key in map(_collected_beside, averages) if _has_weights(last, key)), None)
    if same is not None and collected is not None:
        said.append(
            f"{last.name}: {shown(raw)!r} is bit for bit the average {shown(same)!r}: using the raw weights, "
            f"{shown(collected)!r}; for the average: key: {shown(raw)} in a study file, --key {shown(raw)} in commands"
        )
        return Searched(collected, (raw, *averages), tuple(said))
    if same is not None:
        said.append(
            f"{last.name}: {shown(raw)!r} is bit for bit the average {shown(same)!r}, which is combined: the files "
            "hold no other weights"
        )
    else:
        said.append(f"{last.name}: using the raw weights, {shown(raw)!r}; {choice}")
    if not first_averages:
        begins = next(path for path in paths if raw_and_averages(path)[1])
        said.append(
            f"{begins.name} is the first checkpoint with an average ({keys}): to search that, choose first_step, too"
        )
    said += [_at_rest(paths, raw, average) for average in averages if _moves_more(paths, raw, average)]
    return Searched(raw, tuple(averages), tuple(said))


def _collected_beside(average: str) -> str:
    """The key of the list of raw weights that torch-ema keeps beside its averages."""
    return f"{average}.{COLLECTED}"


def _has_weights(path: Path, key: str) -> bool:
    """Whether a checkpoint can be read by a key."""
    with contextlib.suppress(TrajectoryError):
        return bool(read_checkpoint(path, key=key).tensors)
    return False


def _are_equal(path: Path, key: str, other: str) -> bool:
    """Whether a checkpoint has the same weights under two keys, bit for bit."""
    with contextlib.suppress(TrajectoryError):
        return have_same_bits(read_checkpoint(path, key=key).tensors, read_checkpoint(path, key=other).tensors)
    return False


def _moves_more(paths: Sequence[Path], raw: str, average: str) -> bool:
    """Whether an average moves clearly more than the weights from file to file, by the last ones of a run."""
    weights_moved = _moved(paths[-_COMPARED_FILES:], raw)
    average_moved = _moved(paths[-_COMPARED_FILES:], average)
    return bool(weights_moved and average_moved and average_moved > _MOVES_MORE * weights_moved)


def _at_rest(paths: Sequence[Path], raw: str, average: str) -> str:
    """What is said where the average moves more than the weights: distances cannot tell why."""
    return (
        f"{paths[-1].name}: {shown(average)!r} moves more than {shown(raw)!r} from file to file: the weights rest, as "
        "at the end of a learning rate's decay, and their average catches up; or the names are exchanged. The report "
        "has a row for each"
    )


def raw_and_averages(path: Path) -> tuple[str | None, list[str]]:
    """The key of the weights in a checkpoint, and those of the averages of them that it holds.

    The first is ``None`` where it has but one state dict, which needs no key.
    """
    with naming(path):
        if not path.is_dir():
            return _raw_and_averages_in(path)
        weights = find_weights(path, None)
        raw, average = weights.raw_and_average
        if raw is not None and average is not None:
            return raw, [average]
        with naming(weights.file.absolute()):
            raw, averages = _raw_and_averages_in(weights.file)
        if raw is None:
            return None, []
        return f"{weights.outer}{raw}", [f"{weights.outer}{average}" for average in averages]


def _raw_and_averages_in(file: Path) -> tuple[str | None, list[str]]:
    """As :func:`raw_and_averages`, of a file."""
    if not has_keys(file):
        return None, []
    return Inventory(read_value(file)).raw_and_averages()


def keys_of_averages(path: Path, key: str) -> list[tuple[str, str]]:
    """The keys and rates of the averages that a checkpoint holds of its weights under ``key``; last, the usual one.

    Raises:
        TrajectoryError: it cannot be read.
    """
    if path.is_dir():
        raw, average = find_weights(path, None).raw_and_average
        if average is not None and raw == key:
            return [(average, "")]
    file, outer, inner = in_file(path, key)
    if not has_keys(file):
        return []
    return [(outer + average.key, average.rate) for average in Inventory(read_value(file)).averages_of(inner)]


def keys_alike(path: Path, key: str) -> list[str]:
    """The keys of what a checkpoint holds of the names and shapes of its weights under ``key``, called no average.

    Raises:
        TrajectoryError: it cannot be read.
    """
    file, outer, inner = in_file(path, key)
    if not has_keys(file):
        return []
    return [outer + other.key for other in Inventory(read_value(file)).alike(inner)]


def _moved(paths: Sequence[Path], key: str) -> float | None:
    """How far the weights under a key move, by a sample of them: the sum of the distances from each file to the next.

    ``None`` where a file has no such key, or another model under it.
    """
    try:
        samples = [sampled(read_checkpoint(path, key=key).tensors) for path in paths]
    except TrajectoryError:
        return None
    if len({len(sample) for sample in samples}) > 1:
        return None
    return sum(float((later - earlier).norm()) for earlier, later in itertools.pairwise(samples))


def is_constant(key: str, path: Path, later: Path) -> bool:
    """Whether two checkpoints have the same weights under a key, by a sample; not if one of them has none."""
    return _moved([path, later], key) == 0


def read_metadata(path: str | Path) -> Mapping[str, str]:
    """The texts of a safetensors header, without the weights; empty for other formats.

    Raises:
        TrajectoryError: as :func:`read_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        return {}
    with naming(path), safe_open(path, framework="pt", device="cpu") as file:
        return dict(file.metadata() or {})


def read_init_arguments(path: str | Path, *, key: str = "ema") -> dict[str, Any]:
    """How the network in a snapshot of EDM or EDM2 was made, as plain data; nothing in the file is run.

    Gives ``class_name`` (such as ``"EDMPrecond"``), ``init_args`` (a list) and ``init_kwargs`` (a dict) of the network
    ``key`` in ``network-snapshot-*.pkl``.

    Raises:
        TrajectoryError: as :func:`read_checkpoint`; or an argument is not plain data.
    """
    path = Path(path)
    with naming(path):
        arguments = init_arguments_of(Inventory(read_content(path)).entries.get(key))
        if arguments is None:
            raise TrajectoryError(
                f"holds no network of NVlabs' code under {shown(key)!r}: expected network-snapshot-*.pkl."
            )
        return arguments


def weights_of_module(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, without the prefixes of wrappers.

    Of a module that does nothing but average a model, as ``AveragedModel`` of torch and ``EMA`` of ema-pytorch, these
    are the averaged weights under the model's names. One that has an average among its parts is saved whole.
    """
    bare = module
    while _is_data_parallel(bare):
        bare = bare.module  # type: ignore[assignment]
    state = bare.state_dict()
    inventory = Inventory(state)
    key = inventory.guess()
    if not _is_all_of_an_average(state, key):
        key = ""
    tensors = unwrapped(inventory.state_dict(key))
    # without such a wrapper, ``module`` is the network's own name of a part
    is_wrapped = any(map(_is_data_parallel, bare.modules()))
    return without_data_parallel(tensors)[0] if is_wrapped else tensors


def _is_all_of_an_average(state: Mapping[str, Any], key: str) -> bool:
    """Whether a module has nothing but the average under a key, the model that it averages, and counters."""
    outer = key.removesuffix(key.rpartition(".")[2])
    parts = (f"{key}.", f"{outer}{ONLINE_MODEL}.")
    others = {name: tensor for name, tensor in state.items() if not name.startswith(parts)}
    return all(name.startswith(outer) and _is_counter(name[len(outer) :], tensor) for name, tensor in others.items())


def _is_counter(name: str, tensor: Any) -> bool:
    """Whether a tensor of a module that averages is a single whole number, or tells whether it has begun."""
    if not isinstance(tensor, Tensor) or tensor.numel() != 1:
        return False
    return name == STARTED or not tensor.dtype.is_floating_point  # which older versions have as a float


def _is_data_parallel(module: nn.Module) -> bool:
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong while this is open becomes a TrajectoryError of one line that begins with ``path``.

    A path that does not exist is refused at once, and so is an empty file.
    """
    try:
        if not path.exists():
            raise TrajectoryError("does not exist: check the path.")
        if not path.is_dir() and path.stat().st_size == 0:  # some file systems give folders no size
            raise TrajectoryError("is empty: the save was interrupted; leave it out.")
        yield
    except TrajectoryError as error:
        if str(error).startswith(f"{path.absolute().parent}{os.sep}"):  # it names a part that this file lists
            raise
        raise TrajectoryError(f"{path} {error}") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TrajectoryError(f"{path} cannot be read: {reason}.") from error
    except Exception as error:  # safetensors has its own; and a hostile file can raise anything
        raise TrajectoryError(f"{path} {MALFORMED}") from error


def _say_choice(path: Path, used: str, alternatives: Iterable[str], role: Role = Role.OTHER) -> None:
    """Say which key is used where nobody chose, whether it is an average, and which others there are."""
    names = ", ".join(shown(name) for name in alternatives)
    what = f", {role.value}" if role is Role.AVERAGE else ""
    notice(f"{path.name}: using {used!r}{what}; there is also {names} ({CHOOSE}).")


def _read_file(path: Path, key: str | None) -> Checkpoint:
    """The state dict under a key of a file; without a key, that which the inventory guesses, and says."""
    inventory = Inventory(read_value(path))
    if key is None:
        key = inventory.guess()
        other_keys = inventory.others(key)
        if other_keys:
            _say_choice(path, key, other_keys, next(part.role for part in inventory.containers if part.key == key))
    tensors = unwrapped(_tensors(path, inventory.state_dict(key), key))
    bare, prefix = without_data_parallel(tensors)
    return Checkpoint(bare, key, prefix)


def read_value(path: Path) -> Any:
    """The content of a file: tensors, references to them, and what else a file of torch holds."""
    if _is_index(path):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            _check_count(names)
            return {name: file.get_tensor(name) for name in names}
    if path.name == METADATA:
        return read_distributed(path)
    if path.name.endswith(TORCH_SUFFIXES):
        return read_content(path)
    raise TrajectoryError(f"is not a checkpoint: expected {', '.join(CHECKPOINT_SUFFIXES)}.")


def _check_count(names: Collection[Any]) -> None:
    if len(names) > _MAX_TENSORS:
        raise TrajectoryError(f"holds more than {_MAX_TENSORS:,} tensors: leave it out.")


def _tensors(path: Path, state: Mapping[Any, Any], key: str) -> dict[str, Tensor]:
    """The tensors of the state dict under ``key`` of a file, mapped from it.

    Raises:
        TrajectoryError: it has other entries than tensors, none, too many, or too large ones.
    """
    if not state:
        place = f" under {shown(key)!r}" if key else ""
        raise TrajectoryError(f"holds no tensor{place}: leave it out.")
    _check_count(state)
    refs: dict[str, Any] = {}
    for name, value in state.items():
        _check_entry(name, value, key)
        refs[name] = value.read() if isinstance(value, ShardedRef) else value
    tensors = map_tensors(path, refs)
    if sum(tensor.numel() == 0 for tensor in tensors.values()) > len(tensors) / 2:
        raise TrajectoryError("holds names without weights, as DeepSpeed's ZeRO-3: name what zero_to_fp32.py writes.")
    tensor_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    is_in_folder = _is_index(path) or path.name == METADATA
    file_bytes, _ = size_and_time(path.parent if is_in_folder else path)
    # tensors that share memory count each; 16 MiB more cost nothing, and let small files have large views
    if tensor_bytes > _MAX_SHARING * file_bytes + 2**24:
        raise TrajectoryError(
            f"has tensors of {tensor_bytes / 2**30:,.1f} GiB in a file of {file_bytes / 2**30:,.1f} GiB: leave it out."
        )
    return tensors


def _check_entry(name: Any, value: Any, key: str) -> None:
    """Refuse an entry of the state dict under ``key`` that is no named tensor."""
    is_name = isinstance(name, str) and len(name) <= _MAX_NAME_LENGTH
    if is_name and isinstance(value, (Tensor, TensorRef)):
        return
    place = f"{key}.{name}" if key and isinstance(name, str) else name
    raise TrajectoryError(
        f"has {kind(value)} at {shown(place)!r}, not a plain tensor: save the weights alone, or choose ({CHOOSE})."
    )


def _is_index(path: Path) -> bool:
    """Whether this is an index such as ``model.safetensors.index.json``, which lists the files of split weights."""
    return path.name.endswith(".json") and ".index." in path.name


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index lists, under the names there, which may still have those of wrappers."""
    try:
        file_of_name = json.loads(index.read_bytes())["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrajectoryError("is not an index of weights: save the model again, or name its files.") from error
    names_in_file: dict[str, list[str]] = {}
    for name, file in file_of_name:
        # an index that names itself would be read without end
        if not isinstance(file, str) or not is_plain_name(file) or _is_index(Path(file)):
            raise TrajectoryError(f"names a file outside of its folder ({shown(file)}): leave it out.")
        names_in_file.setdefault(file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, names in names_in_file.items():
        path = index.parent / file
        if not path.is_file():
            raise TrajectoryError(f"lists {shown(file)}, which does not exist: save or copy the model again.")
        with naming(path.absolute()):
            shard = _tensors(path, Inventory(read_value(path)).state_dict(""), "")
        for name in names:
            if name not in shard:
                raise TrajectoryError(f"lists {shown(name)!r}, which is not in {shown(file)}: save the model again.")
            tensors[name] = shard[name]
    return tensors
