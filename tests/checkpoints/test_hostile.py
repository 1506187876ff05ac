"""Files made to harm: each is answered with one line, within 2 s and 500 MB, and nothing in it runs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import read_checkpoint
from tests.checkpoints import nvlabs_examples
from tests.checkpoints.read_in_a_child import in_a_child

SECONDS, MEGABYTES = 4.0, 500.0
PROTOCOL = b"\x80\x04"


def zipped(path: Path, content: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> None:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("m/data.pkl", content)
        for key, data in (storages or {"0": bytes(64)}).items():
            archive.writestr(f"m/data/{key}", data)


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def call(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(shape: bytes, stride: bytes, *, count: int = 16, offset: int = 0) -> bytes:
    ordered = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage(count), number(offset), shape, stride, b"\x89", ordered)


def state_dict(*values: bytes) -> bytes:
    entries = b"".join(text(f"w{index}") + value for index, value in enumerate(values))
    return PROTOCOL + b"}(" + entries + b"u."


PLAIN = tensor(numbers(4), numbers(1))


def doubled(open_: bytes, close: bytes, depth: int) -> bytes:
    """An object that holds the one before it twice, ``depth`` times: 2^depth paths in a few bytes."""
    levels = (b"0h" + bytes([level]) + b"h" + bytes([level]) + close + b"\x94" for level in range(depth))
    return open_ + b"\x94" + b"".join(levels)


def module(state: bytes) -> bytes:
    """A network as NVlabs pickles it, with any state."""
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("Net") + text("state") + state + b"u"
    return call("torch_utils.persistence._reconstruct_persistent_obj", meta)


def hash_without_end(path: Path) -> None:
    """Some 600 bytes that ``torch.load(weights_only=True)`` does not come back from."""
    pairs = (b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    key = b")q\0" + b"".join(pairs)
    zipped(path, b"\x80\x02}" + text("a") + b"(" + key + b"tsh\x3cK\x01s.")


def hash_too_deep(path: Path) -> None:
    zipped(path, PROTOCOL + b"}" + b")" + b"\x85" * 900_000 + b"K\x01s.")


def colliding_keys(path: Path) -> None:
    keys = b"".join(number(index * (2**61 - 1)) + b"N" for index in range(1, 100_000))
    zipped(path, PROTOCOL + b"}(" + keys + b"u.")


def nested_lists(path: Path) -> None:
    zipped(path, PROTOCOL + b"}" + text("model") + b"]" * 800_000 + b"a" * 799_999 + b"s.")


def laughing_dicts(path: Path) -> None:
    keys = ("ema", "model", "state_dict", "net", "params", "network", "unet", "model_ema")
    levels = b"}\x94" + b"".join(
        b"}(" + b"".join(text(key) + b"h" + bytes([level]) for key in keys) + b"u\x94" for level in range(60)
    )
    zipped(path, PROTOCOL + levels + b".")


def many_numbers(count: int) -> bytes:
    return b"".join(number(index) + b"N" for index in range(count))


def many_marks(path: Path) -> None:
    zipped(path, PROTOCOL + b"(" * 20_000_000 + b".")


def much_text(path: Path) -> None:
    zipped(path, PROTOCOL + b"](" + text("\N{OCTOPUS}" + "x" * 10_000_000) * 7 + b"e.")


def claimed_bytes(path: Path) -> None:
    path.write_bytes(PROTOCOL + b"\x96" + struct.pack("<Q", 2**40) + b"abc.")


def allocating_call(path: Path) -> None:
    zipped(path, state_dict(call("builtins.bytearray", number(2**40))))


def claimed_storage(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(2**40), numbers(1), count=2**40)))


def outside_of_storage(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(4), numbers(1), offset=13)))


def negative_stride(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(4), numbers(-1), offset=8)))


def expanded(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(2**40), numbers(0))))


def expanded_often(path: Path) -> None:
    zipped(path, state_dict(*[tensor(numbers(2**20), numbers(0))] * 2000))


def shape_that_overflows(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(2**40, 2**40, 2**40), numbers(0, 0, 0))))


def many_arguments(path: Path) -> None:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n\x94"
    arguments = b"(" + storage(16) + b"K\0))\x89N" + b"N" * 300_000 + b"t\x94"
    zipped(path, PROTOCOL + b"](" + rebuild + arguments + b"h\0h\x01R" * 100_000 + b"e.")


def many_wrappers(path: Path) -> None:
    names = b"".join(text("module." * 280 + str(index)) + b"h\0" for index in range(30_000))
    zipped(path, PROTOCOL + PLAIN + b"\x940}(" + names + b"u.")


def compressed(path: Path) -> None:
    zipped(path, state_dict(PLAIN), {"0": bytes(550 * 2**20)}, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def system(path: Path) -> None:
    zipped(path, state_dict(PLAIN, call("posix.system", text(f"touch {path.parent / 'ran'}"))))


def behind_the_weights(path: Path) -> None:
    hidden = call("functools.partial", b"cposix\nsystem\n", text(f"touch {path.parent / 'ran'}"))
    zipped(path, PROTOCOL + b"}(" + text("ema") + state_dict(PLAIN)[2:-1] + text("x") + hidden + b"u.")


def plain_pickle(path: Path) -> None:
    path.write_bytes(PROTOCOL + call("os.system", text(f"touch {path.parent / 'ran'}")) + b".")


def built_in_a_file(path: Path) -> None:
    """The attack is in the state of an object, as ``__setstate__`` of some class would run it."""
    zipped(path, PROTOCOL + b"cnumpy\nload\n)\x81" + text(str(path.parent / "ran")) + b"b.")


def nested_attack(path: Path) -> None:
    inner = PROTOCOL + call("posix.system", text(f"touch {path.parent / 'ran'}")) + b"."
    loaded = call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner)
    path.write_bytes(state_dict(loaded))


def legacy_attack(path: Path) -> None:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    path.write_bytes(magic + pickle.dumps(1001, 2) + call("posix.system", text(f"touch {path.parent / 'ran'}")) + b".")


def legacy_storage_that_is_not_there(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(8)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    path.write_bytes(content[:-40] + struct.pack("<q", 2**60) + content[-32:])


def endless_module(path: Path) -> None:
    state = b"}\x94(" + text("_parameters") + b"}" + text("_modules") + b"}" + text("a")
    path.write_bytes(PROTOCOL + b"}" + text("ema") + module(state + module(b"h\0") + b"su") + b"s.")


def script(path: Path, content: bytes) -> None:
    """An archive as torch.jit.save lays it out, around any pickle."""
    zipped(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/constants.pkl", b"\x80\x02).")


SCRIPT_MODULE = b"c__torch__\nM\n)\x81\x94"


def endless_script(path: Path) -> None:
    script(path, PROTOCOL + SCRIPT_MODULE + b"}(" + text("a") + b"h\0" + text("b") + b"h\0ub.")


def script_of_code(path: Path) -> None:
    script(path, PROTOCOL + call("posix.system", text(f"touch {path.parent / 'ran'}")) + b".")


def source_that_runs(path: Path) -> None:
    """This one is to be read: its weights are good, only its source is not."""
    marker = path.parent / "ran"
    nvlabs_examples.write_snapshot(path, nvlabs_examples.network(1, attack=f"open({str(marker)!r}, 'w').close()"))


def header(path: Path, content: bytes, *, size: int | None = None, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(content) if size is None else size) + content + data)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


EMPTY = json.dumps(entry(0, 0, [0]))
SAFETENSORS = {
    "header_of_a_terabyte": lambda path: header(path, b"{}", size=2**40),
    "header_of_80_megabytes": lambda path: header(path, b" " * 80 * 2**20),
    "deep_header": lambda path: header(path, b'{"a":' + b"[" * 1_000_000),
    "overlapping": lambda path: header(
        path, json.dumps({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}).encode(), data=bytes(24)
    ),
    "huge_shape": lambda path: header(path, json.dumps({"a": entry(0, 16, [2**40, 2**40])}).encode(), data=bytes(16)),
    "beyond_the_file": lambda path: header(path, json.dumps({"a": entry(0, 2**40, [2**38])}).encode(), data=bytes(16)),
    "unknown_dtype": lambda path: header(path, json.dumps({"a": entry(0, 16, [4], "F99")}).encode(), data=bytes(16)),
    "many_tensors": lambda path: header(
        path, ("{" + ",".join(f'"{index}":{EMPTY}' for index in range(120_000)) + "}").encode()
    ),
}
PICKLES: tuple[Callable[[Path], None], ...] = (
    *(hash_without_end, hash_too_deep, colliding_keys, nested_lists, laughing_dicts, many_marks, much_text),
    *(claimed_bytes, allocating_call, claimed_storage, outside_of_storage, negative_stride, expanded, expanded_often),
    *(shape_that_overflows, many_arguments, many_wrappers, compressed, system, behind_the_weights, built_in_a_file),
    *(legacy_attack, legacy_storage_that_is_not_there, script_of_code, endless_script, plain_pickle, nested_attack),
    *(endless_module, source_that_runs),
)
SNAPSHOTS = (plain_pickle, nested_attack, endless_module, source_that_runs)
FILES = {f"{write.__name__}.{'pkl' if write in SNAPSHOTS else 'pt'}": write for write in PICKLES} | {
    f"{name}.safetensors": write for name, write in SAFETENSORS.items()
}
# the weights of these are good: they are read, and the rest of the file never runs or costs anything
GOOD = {"behind_the_weights.pt", "source_that_runs.pkl", "many_wrappers.pt"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    save_file({"w": torch.ones(3)}, folder / "warm.safetensors")
    paths = []
    for name, write in FILES.items():
        (folder / name).mkdir()
        write(folder / name / name)
        paths.append(folder / name / name)
    zipped(folder / "warm.pt", state_dict(PLAIN))  # what is written here is read, where nothing is wrong with it
    lines = in_a_child(paths, warm=folder / "warm.pt")
    return {Path(line["path"]).name: line for line in lines}


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_is_answered_soon_and_nothing_runs(answers, name):
    answer = answers[name]
    assert answer["outcome"] == ("read" if name in GOOD else "refused"), answer["message"]
    assert answer["seconds"] < SECONDS
    assert answer["megabytes"] < MEGABYTES
    assert answer["events"] == []
    assert not (Path(answer["path"]).parent / "ran").exists()
    if name not in GOOD:
        assert name in answer["message"]
        assert "\n" not in answer["message"]
        assert len(answer["message"]) < 600


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "..", "", "sub/secret.safetensors"])
def test_index_does_not_leave_its_folder(tmp_path, name):
    save_file({"w": torch.ones(3)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(TrajectoryError, match="outside of its folder"):
        read_checkpoint(folder)
