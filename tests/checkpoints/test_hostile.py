"""Files made to harm: each is answered with one line, within 10 s and 500 MB, and nothing in it runs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.inventory import GUESSED_KEYS
from lcsc_opt.checkpoints.reading import read_checkpoint
from tests.checkpoints import nvlabs_examples, read_in_a_child
from tests.checkpoints.read_in_a_child import in_a_child
from tests.processes import forked

SECONDS, MEGABYTES = 10.0, 500.0
PROTOCOL = b"\x80\x04"


def zipped(path: Path, content: bytes) -> None:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", PROTOCOL + content + b".")
        archive.writestr("m/data/0", bytes(64))


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


def weights(*values: bytes) -> bytes:
    """A state dict."""
    return b"}(" + b"".join(text(f"w{index}") + value for index, value in enumerate(values)) + b"u"


PLAIN = tensor(numbers(4), numbers(1))


def module(state: bytes) -> bytes:
    """A network as NVlabs pickles it, with any state."""
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("Net") + text("state") + state + b"u"
    return call("torch_utils.persistence._reconstruct_persistent_obj", meta)


def many_numbers(count: int) -> bytes:
    return b"".join(number(index) + b"N" for index in range(count))


def texts(values: Iterable[str], behind: bytes) -> bytes:
    """Each value as a key, with the same object behind it."""
    return b"".join(text(value) + behind for value in values)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n\x94"
NO_PARTS = text("_parameters") + b"}" + text("_modules")  # and then the modules


def hash_without_end() -> bytes:
    """Some 600 bytes that ``torch.load(weights_only=True)`` does not come back from."""
    pairs = (b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    return b"}" + text("a") + b"(" + b")q\0" + b"".join(pairs) + b"tsh\x3cK\x01s"


def laughing_dicts() -> bytes:
    keys = ("ema", "model", "state_dict", "net", "params", "network", "unet", "model_ema")
    return b"}\x94" + b"".join(b"}(" + texts(keys, b"h" + bytes([level])) + b"u\x94" for level in range(60))


# pickles in a zip as torch.save lays it out; a function gets a path that the attack would write to
ZIPPED: dict[str, Callable[[Path], bytes]] = {
    # time and depth: hashing, recursion, shared parts, sheer numbers
    "hash_without_end": lambda _: hash_without_end(),
    "colliding_keys": lambda _: b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 100_000)) + b"u",
    "nested_lists": lambda _: b"}" + text("model") + b"]" * 100_000 + b"a" * 99_999 + b"s",
    "laughing_dicts": lambda _: laughing_dicts(),
    "many_opcodes": lambda _: b"\x8f\x94" * 1_000_000,
    # one list of 100,000 pairs is made into 50,000 dicts
    "many_pairs": lambda _: (
        b"](" + b"](" + b"K\x01K\x02\x86" * 100_000 + b"e\x85\x94"
        b"ccollections\nOrderedDict\n\x94" + b"h\x01h\0R" * 100_000 + b"e"
    ),
    # texts
    "much_text": lambda _: b"](" + text("\N{OCTOPUS}" + "x" * 10_000_000) * 7 + b"e",
    "long_key": lambda _: b"}" + text("\N{OCTOPUS}" * 14_000_000) + b"Ns",
    "long_wrapper": lambda _: b"}" + text("module." * 3_000_000) + PLAIN + b"s",
    "long_function_name": lambda _: (
        b"](" + text("a." * 5_000_000) + text("f") + b"\x93\x94" + b"h\0)R" * 200_000 + b"e"
    ),
    # memory that is only claimed
    "large_memo_index": lambda _: b"N" + b"r" + struct.pack("<I", 2**32 - 1),
    "allocating_call": lambda _: weights(call("builtins.bytearray", number(2**40))),
    "claimed_storage": lambda _: weights(tensor(numbers(2**40), numbers(1), count=2**40)),
    # tensors
    "outside_of_storage": lambda _: weights(tensor(numbers(4), numbers(1), offset=13)),
    "negative_stride": lambda _: weights(tensor(numbers(4), numbers(-1), offset=8)),
    "expanded_often": lambda _: weights(*[tensor(numbers(2**20), numbers(0))] * 2000),
    "shape_that_overflows": lambda _: weights(tensor(numbers(2**40, 2**40, 2**40), numbers(0, 0, 0))),
    "many_times_one_tensor": lambda _: PLAIN + b"\x940}(" + texts(map(str, range(30_000)), b"h\0") + b"u",
    # one list of 200,000 numbers is the shape of 50,000 tensors
    "long_shapes": lambda _: (
        b"]("
        + b"]("
        + b"K\x01" * 200_000
        + b"e\x94"
        + REBUILD
        + storage(16)
        + b"\x94"
        + b"h\x01(h\x02K\0h\0h\0\x89NtR" * 50_000
        + b"e"
    ),
    "many_arguments": lambda _: (
        b"](" + REBUILD + b"(" + storage(16) + b"K\0))\x89N" + b"N" * 300_000 + b"t\x94" + b"h\0h\x01R" * 100_000 + b"e"
    ),
    # code
    "system": lambda ran: weights(PLAIN, call("posix.system", text(f"touch {ran}"))),
    "behind_the_weights": lambda ran: (
        b"}("
        + text("ema")
        + weights(PLAIN)
        + text("x")
        + call("functools.partial", b"cposix\nsystem\n", text(f"touch {ran}"))
        + b"u"
    ),
    "built_in_a_file": lambda ran: b"cnumpy\nload\n)\x81" + text(str(ran)) + b"b",  # as some __setstate__ would run it
}


def around(depth: int) -> bytes:
    """Dicts in dicts, all of them different, with the first object of the pickle inside them 13^depth times."""
    return b"}(" + b"".join(text(k) + around(depth - 1) for k in GUESSED_KEYS) + b"u" if depth else b"h\0"


def loaded(inner: bytes) -> bytes:
    """A file of torch inside a pickle."""
    return call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner)


def nested_often() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.zeros(4).untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    inner = b"B" + struct.pack("<I", len(buffer.getvalue())) + buffer.getvalue() + b"\x94"
    function = b"ctorch.storage\n_load_from_bytes\n("
    return b"](" + function + inner + b"tR" + (function + b"h\0tR") * 100_000 + b"e"


def long_names_of_modules() -> bytes:
    leaf = module(b"}(" + NO_PARTS + b"}u") + b"\x94"
    middle = module(b"}(" + NO_PARTS + b"}h\x01h\0su") + b"\x94"
    whole = module(b"}(" + NO_PARTS + b"}(" + texts(map(str, range(20_000)), b"h\x02") + b"uu")
    return leaf + b"0" + text("n" * 20_000_000) + b"\x94" + b"0" + middle + b"0}" + text("ema") + whole + b"s"


def many_names_left_out() -> bytes:
    """Every network of very many shares the list of buffers that are not saved."""
    left_out = b"](" + b"K\x01" * 300_000 + b"e\x94"
    parts = text("_non_persistent_buffers_set") + b"h\0" + NO_PARTS
    leaf = module(b"}(" + text("_buffers") + b"}(" + text("a") + b"K\1u" + parts + b"}u") + b"\x94"
    whole = module(b"}(" + NO_PARTS + b"}(" + texts(map(str, range(50_000)), b"h\x01") + b"uu")
    return left_out + b"0" + leaf + b"0}" + text("ema") + whole + b"s"


ENDLESS = b"}\x94(" + NO_PARTS + b"}" + text("a")
# pickles in a file of their own
BARE: dict[str, Callable[[Path], bytes]] = {
    "plain_pickle": lambda ran: call("os.system", text(f"touch {ran}")),
    "nested_attack": lambda ran: weights(loaded(PROTOCOL + call("posix.system", text(f"touch {ran}")) + b".")),
    "nested_often": lambda _: nested_often(),
    "claimed_bytes": lambda _: b"\x96" + struct.pack("<Q", 2**40) + b"abc",
    # itself under every key that is guessed, on 13^5 paths, and many numbers
    "dict_in_itself": lambda _: b"}\x94(" + texts(GUESSED_KEYS, b"h\0") + many_numbers(9_000) + b"u",
    "dicts_around_one": lambda _: b"}\x94(" + many_numbers(9_900) + b"u0" + around(4),
    "endless_module": lambda _: b"}" + text("ema") + module(ENDLESS + module(b"h\0") + b"su") + b"s",
    "long_names_of_modules": lambda _: long_names_of_modules(),
    "many_names_left_out": lambda _: many_names_left_out(),
}

SCRIPT_MODULE = b"c__torch__\nM\n)\x81\x94"


# pickles of torch.jit.save, whose zip is laid out in the same way
SCRIPTS: dict[str, Callable[[Path], bytes]] = {
    "endless_script": lambda _: SCRIPT_MODULE + b"}(" + text("a") + b"h\0" + text("b") + b"h\0ub",
    "script_of_code": lambda ran: call("posix.system", text(f"touch {ran}")),
}


def legacy_attack(path: Path) -> None:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    path.write_bytes(magic + pickle.dumps(1001, 2) + call("posix.system", text(f"touch {path.parent / 'ran'}")) + b".")


def legacy_storage_that_is_not_there(path: Path) -> None:
    torch.save({"w": torch.zeros(8)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[:-40] + struct.pack("<q", 2**60) + content[-32:])


def source_that_runs(path: Path) -> None:
    """This one is to be read: its weights are good, only its source is not."""
    marker = path.parent / "ran"
    nvlabs_examples.write_snapshot(path, nvlabs_examples.network(1, attack=f"open({str(marker)!r}, 'w').close()"))


FILES: dict[str, Callable[[Path], object]] = {
    "legacy_attack.pt": legacy_attack,
    "legacy_storage_that_is_not_there.pt": legacy_storage_that_is_not_there,
    "source_that_runs.pkl": source_that_runs,
}


def header(content: bytes | str | dict[str, Any], *, size: int | None = None, data: int = 0) -> bytes:
    """A safetensors file with this header."""
    content = json.dumps(content) if isinstance(content, dict) else content
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content) if size is None else size) + content + bytes(data)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


EMPTY = json.dumps(entry(0, 0, [0]))
SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "header_of_a_terabyte": lambda: header("{}", size=2**40),
    "deep_header": lambda: header('{"a":' + "[" * 1_000_000),
    "overlapping": lambda: header({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, data=24),
    "huge_shape": lambda: header({"a": entry(0, 16, [2**40, 2**40])}, data=16),
    "beyond_the_file": lambda: header({"a": entry(0, 2**40, [2**38])}, data=16),
    "many_tensors": lambda: header("{" + ",".join(f'"{index}":{EMPTY}' for index in range(100_001)) + "}"),
}
NAMES = [
    *(f"{name}.pt" for name in (*ZIPPED, *SCRIPTS)),
    *(f"{name}.pkl" for name in BARE),
    *FILES,
    *(f"{name}.safetensors" for name in SAFETENSORS),
]
# the weights of these are good: they are read, and the rest of the file never runs or costs anything
GOOD = {"behind_the_weights.pt", "source_that_runs.pkl", "many_times_one_tensor.pt"}


def write(path: Path) -> None:
    name, ran = path.stem, path.parent / "ran"
    if path.name in FILES:
        FILES[path.name](path)
    elif name in ZIPPED | SCRIPTS:
        zipped(path, (ZIPPED | SCRIPTS)[name](ran))
    else:
        path.write_bytes(SAFETENSORS[name]() if name in SAFETENSORS else PROTOCOL + BARE[name](ran) + b".")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    save_file({"w": torch.ones(3)}, folder / "warm.safetensors")
    paths = [folder / name / name for name in NAMES]
    for path in paths:
        path.parent.mkdir()
        write(path)
    zipped(folder / "warm.pt", weights(PLAIN))  # what is written here is read, where nothing is wrong with it
    lines = in_a_child(paths, warm=folder / "warm.pt")
    return {Path(line["path"]).name: line for line in lines}


@pytest.mark.parametrize("name", NAMES)
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


def run_code(path: str) -> None:
    sys.addaudithook(read_in_a_child.watch)
    read_in_a_child.watching = True
    exec("x = 1")
    open(path, "w").close()  # noqa: PTH123 - as an attack does
    read_in_a_child.watching = False
    assert {event.split()[0] for event in read_in_a_child.events} >= {"exec", "open"}, read_in_a_child.events


def test_watching_sees_code_that_runs(tmp_path):
    """The test of the test: what the child watches for is reported when it happens."""
    process = forked(run_code, str(tmp_path / "ran"))
    process.start()
    process.join()
    assert process.exitcode == 0
