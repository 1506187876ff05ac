"""Files made to harm: each is answered with one line, within 2 s and 500 MB, and nothing in it runs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.keys import GUESSED_KEYS
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


def nested_records(path: Path) -> None:
    record = b"cargparse\nNamespace\n)\x81"
    zipped(path, PROTOCOL + b"}" + text("model") + record * 100_000 + b"b" * 99_999 + b"s.")


def laughing_dicts(path: Path) -> None:
    keys = ("ema", "model", "state_dict", "net", "params", "network", "unet", "model_ema")
    levels = b"}\x94" + b"".join(
        b"}(" + b"".join(text(key) + b"h" + bytes([level]) for key in keys) + b"u\x94" for level in range(60)
    )
    zipped(path, PROTOCOL + levels + b".")


def dict_in_itself(path: Path) -> None:
    """A dict that holds itself under every key that is guessed, on 13^5 paths, beside many numbers."""
    inside = b"".join(text(key) + b"h\0" for key in GUESSED_KEYS)
    path.write_bytes(PROTOCOL + b"}\x94(" + inside + many_numbers(9_000) + b"u.")


def dicts_around_one(path: Path) -> None:
    """Dicts in dicts, all of them different, with one that is large inside them 13^4 times."""

    def around(depth: int) -> bytes:
        return b"}(" + b"".join(text(k) + around(depth - 1) for k in GUESSED_KEYS) + b"u" if depth else b"h\0"

    path.write_bytes(PROTOCOL + b"}\x94(" + many_numbers(9_900) + b"u0" + around(4) + b".")


def many_numbers(count: int) -> bytes:
    return b"".join(number(index) + b"N" for index in range(count))


def many_opcodes(path: Path) -> None:
    zipped(path, PROTOCOL + b"\x8f\x94" * 5_000_000 + b".")


def many_marks(path: Path) -> None:
    zipped(path, PROTOCOL + b"(" * 20_000_000 + b".")


def much_text(path: Path) -> None:
    zipped(path, PROTOCOL + b"](" + text("\N{OCTOPUS}" + "x" * 10_000_000) * 7 + b"e.")


def large_memo_index(path: Path) -> None:
    zipped(path, PROTOCOL + b"N" + b"r" + struct.pack("<I", 2**32 - 1) + b".")


def claimed_bytes(path: Path) -> None:
    path.write_bytes(PROTOCOL + b"\x96" + struct.pack("<Q", 2**40) + b"abc.")


def allocating_call(path: Path) -> None:
    zipped(path, state_dict(call("builtins.bytearray", number(2**40))))


def claimed_storage(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(2**40), numbers(1), count=2**40)))


def outside_of_storage(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(4), numbers(1), offset=13)))


def stride_outside(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(4, 2), numbers(5, 1))))


def negative_stride(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(4), numbers(-1), offset=8)))


def negative_offset(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(4), numbers(1), offset=-8)))


def expanded(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(2**40), numbers(0))))


def expanded_often(path: Path) -> None:
    zipped(path, state_dict(*[tensor(numbers(2**20), numbers(0))] * 2000))


def shape_that_overflows(path: Path) -> None:
    zipped(path, state_dict(tensor(numbers(2**40, 2**40, 2**40), numbers(0, 0, 0))))


def shape_of_lists(path: Path) -> None:
    zipped(path, state_dict(tensor(doubled(b")", b"\x86", 50), numbers(1))))


def long_shapes(path: Path) -> None:
    """One list of 200,000 numbers is the shape of 50,000 tensors."""
    shape = b"](" + b"K\x01" * 200_000 + b"e\x94"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n\x94"
    again = b"h\x01(h\x02K\0h\0h\0\x89NtR"
    zipped(path, PROTOCOL + b"](" + shape + rebuild + storage(16) + b"\x94" + again * 50_000 + b"e.")


def many_arguments(path: Path) -> None:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n\x94"
    arguments = b"(" + storage(16) + b"K\0))\x89N" + b"N" * 300_000 + b"t\x94"
    zipped(path, PROTOCOL + b"](" + rebuild + arguments + b"h\0h\x01R" * 100_000 + b"e.")


def many_pairs(path: Path) -> None:
    """One list of 100,000 pairs is made into 50,000 dicts."""
    pairs = b"](" + b"K\x01K\x02\x86" * 100_000 + b"e\x85\x94"
    zipped(path, PROTOCOL + b"](" + pairs + b"ccollections\nOrderedDict\n\x94" + b"h\x01h\0R" * 100_000 + b"e.")


def long_function_name(path: Path) -> None:
    name = text("a." * 5_000_000) + text("f") + b"\x93\x94"
    zipped(path, PROTOCOL + b"](" + name + b"h\0)R" * 200_000 + b"e.")


def long_names_of_modules(path: Path) -> None:
    leaf = module(b"}(" + text("_parameters") + b"}" + text("_modules") + b"}u") + b"\x94"
    name = text("n" * 20_000_000) + b"\x94"
    middle = module(b"}(" + text("_parameters") + b"}" + text("_modules") + b"}h\x01h\0su") + b"\x94"
    children = b"}(" + b"".join(text(str(index)) + b"h\x02" for index in range(20_000)) + b"u"
    whole = module(b"}(" + text("_parameters") + b"}" + text("_modules") + children + b"u")
    path.write_bytes(PROTOCOL + leaf + b"0" + name + b"0" + middle + b"0}" + text("ema") + whole + b"s.")


def long_key(path: Path) -> None:
    zipped(path, PROTOCOL + b"}" + text("\U0001f419" * 14_000_000) + b"Ns.")


def long_storage_key(path: Path) -> None:
    identity = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0" * 20_000_000) + text("cpu") + b"K\0t\x94"
    zipped(path, PROTOCOL + b"](" + identity + b"h\0Q" * 200_000 + b"e.")


def many_wrappers(path: Path) -> None:
    names = b"".join(text("module." * 280 + str(index)) + b"h\0" for index in range(30_000))
    zipped(path, PROTOCOL + PLAIN + b"\x940}(" + names + b"u.")


def many_times_one_tensor(path: Path) -> None:
    names = b"".join(text(str(index)) + b"h\0" for index in range(99_000))
    zipped(path, PROTOCOL + PLAIN + b"\x940}(" + names + b"u.")


def many_names_left_out(path: Path) -> None:
    """Every network of very many shares the list of buffers that are not saved."""
    left_out = b"](" + b"K\x01" * 300_000 + b"e\x94"
    parts = text("_parameters") + b"}" + text("_non_persistent_buffers_set") + b"h\0" + text("_modules")
    leaf = module(b"}(" + text("_buffers") + b"}(" + text("a") + b"K\1u" + parts + b"}u") + b"\x94"
    children = b"}(" + b"".join(text(str(index)) + b"h\x01" for index in range(50_000)) + b"u"
    whole = module(b"}(" + text("_parameters") + b"}" + text("_modules") + children + b"u")
    path.write_bytes(PROTOCOL + left_out + b"0" + leaf + b"0}" + text("ema") + whole + b"s.")


def compressed(path: Path) -> None:
    zipped(path, state_dict(PLAIN), {"0": bytes(550 * 2**20)}, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def compressed_pickle(path: Path) -> None:
    zipped(path, PROTOCOL + b"}" * 50_000_000, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def large_directory(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", state_dict(PLAIN))
        for index in range(30_000):
            archive.writestr(f"{index:0300d}", b"")


def reduced(name: str, *arguments: bytes) -> Callable[[Path], None]:
    return lambda path: zipped(path, state_dict(PLAIN, call(name, *arguments)))


def system(path: Path) -> None:
    reduced("posix.system", text(f"touch {path.parent / 'ran'}"))(path)


def evaluated(path: Path) -> None:
    reduced("builtins.eval", text(f"open({str(path.parent / 'ran')!r}, 'w')"))(path)


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


def nested_often(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(4).untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    inner = buffer.getvalue()
    loaded = b"ctorch.storage\n_load_from_bytes\n(B" + struct.pack("<I", len(inner)) + inner + b"\x94tR"
    again = b"ctorch.storage\n_load_from_bytes\n(h\0tR"
    path.write_bytes(PROTOCOL + b"](" + loaded + again * 100_000 + b"e.")


def nested_in_nested(path: Path) -> None:
    inner = state_dict(PLAIN)
    for _ in range(200):
        inner = PROTOCOL + call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner) + b"."
    path.write_bytes(inner)


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


def laughing_modules(path: Path) -> None:
    content = module(b"}(" + text("_parameters") + b"}" + text("_modules") + b"}u") + b"\x94"
    for level in range(60):
        children = b"}(" + b"".join(text(n) + b"h" + bytes([level]) for n in "abcdefgh") + b"u"
        content += b"0" + module(b"}(" + text("_parameters") + b"}" + text("_modules") + children + b"u") + b"\x94"
    path.write_bytes(PROTOCOL + b"}(" + text("ema") + content + b"u.")


def script(path: Path, content: bytes) -> None:
    """An archive as torch.jit.save lays it out, around any pickle."""
    zipped(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/constants.pkl", b"\x80\x02).")


SCRIPT_MODULE = b"c__torch__\nM\n)\x81\x94"


def endless_script(path: Path) -> None:
    script(path, PROTOCOL + SCRIPT_MODULE + b"}(" + text("a") + b"h\0" + text("b") + b"h\0ub.")


def laughing_scripts(path: Path) -> None:
    """Modules that hold the one before eight times, the innermost with many tensors; names as long as they may be."""
    tensors = b"".join(text(str(index)) + (PLAIN + b"q\xff" if index == 0 else b"h\xff") for index in range(9_000))
    content = SCRIPT_MODULE + b"}(" + tensors + b"ub"
    for level in range(30):
        children = b"".join(text(f"{n}{'x' * 30}") + b"h" + bytes([level]) for n in "abcdefgh")
        content += b"0" + SCRIPT_MODULE + b"}(" + children + b"ub"
    script(path, PROTOCOL + content + b".")


def script_of_code(path: Path) -> None:
    script(path, PROTOCOL + call("posix.system", text(f"touch {path.parent / 'ran'}")) + b".")


def source_that_runs(path: Path) -> None:
    """This one is to be read: its weights are good, only its source is not."""
    marker = path.parent / "ran"
    nvlabs_examples.write_snapshot(path, nvlabs_examples.network(1, attack=f"open({str(marker)!r}, 'w').close()"))


def averages_without_names(path: Path) -> None:
    one = PLAIN + b"\x94"
    shadow = b"}" + text("shadow_params") + b"](" + one + b"h\0" * 15_000 + b"es"
    model = b"}(" + b"".join(text(str(index)) + b"h\0" for index in range(15_040)) + b"u"
    zipped(path, PROTOCOL + b"}(" + text("ema") + shadow + text("model") + model + b"u.")


def long_wrapper(path: Path) -> None:
    zipped(path, PROTOCOL + b"}" + text("module." * 3_000_000) + PLAIN + b"s.")


def header(path: Path, content: bytes, *, size: int | None = None, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(content) if size is None else size) + content + data)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


EMPTY = json.dumps(entry(0, 0, [0]))
SAFETENSORS = {
    "header_of_a_terabyte": lambda path: header(path, b"{}", size=2**40),
    "header_of_the_whole_range": lambda path: header(path, b"{}", size=2**64 - 1),
    "header_longer_than_the_file": lambda path: header(path, b"{}", size=200),
    "header_of_80_megabytes": lambda path: header(path, b" " * 80 * 2**20),
    "deep_header": lambda path: header(path, b'{"a":' + b"[" * 1_000_000),
    "overlapping": lambda path: header(
        path, json.dumps({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}).encode(), data=bytes(24)
    ),
    "hole": lambda path: header(
        path, json.dumps({"a": entry(0, 16, [4]), "b": entry(32, 48, [4])}).encode(), data=bytes(48)
    ),
    "huge_shape": lambda path: header(path, json.dumps({"a": entry(0, 16, [2**40, 2**40])}).encode(), data=bytes(16)),
    "beyond_the_file": lambda path: header(path, json.dumps({"a": entry(0, 2**40, [2**38])}).encode(), data=bytes(16)),
    "unknown_dtype": lambda path: header(path, json.dumps({"a": entry(0, 16, [4], "F99")}).encode(), data=bytes(16)),
    "many_tensors": lambda path: header(
        path, ("{" + ",".join(f'"{index}":{EMPTY}' for index in range(120_000)) + "}").encode()
    ),
}
PICKLES: dict[str, tuple[str, Callable[[Path], None]]] = {
    function.__name__: (suffix, function)
    for suffix, functions in (
        (
            ".pt",
            (
                hash_without_end, hash_too_deep, colliding_keys, nested_lists, nested_records, laughing_dicts,
                many_opcodes, many_marks, much_text, large_memo_index, claimed_bytes, allocating_call, claimed_storage,
                outside_of_storage, stride_outside, negative_stride, negative_offset, expanded, expanded_often,
                shape_that_overflows, shape_of_lists, compressed, compressed_pickle,
                large_directory, system, evaluated, behind_the_weights, built_in_a_file, legacy_attack,
                legacy_storage_that_is_not_there, long_shapes, many_arguments, many_pairs, long_function_name,
                long_key, long_storage_key, many_wrappers, many_times_one_tensor, averages_without_names, long_wrapper,
                endless_script, laughing_scripts, script_of_code,
            ),
        ),
        (
            ".pkl",
            (
                plain_pickle, nested_attack, nested_often, nested_in_nested, endless_module, laughing_modules,
                dict_in_itself, dicts_around_one, long_names_of_modules, many_names_left_out,
                source_that_runs,
            ),
        ),
    )
    for function in functions
}  # fmt: skip
FILES = {f"{name}{suffix}": write for name, (suffix, write) in PICKLES.items()} | {
    f"{name}.safetensors": write for name, write in SAFETENSORS.items()
}
# the weights of these are good: they are read, and the rest of the file never runs or costs anything
GOOD = {"behind_the_weights.pt", "source_that_runs.pkl", "many_wrappers.pt", "many_times_one_tensor.pt"}


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


def test_source_in_a_snapshot_is_a_real_attack(tmp_path):
    source_that_runs(tmp_path / "network-snapshot-000001.pkl")
    nvlabs_examples.unpickled_the_usual_way(tmp_path / "network-snapshot-000001.pkl")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "..", "", "sub/secret.safetensors"])
def test_index_does_not_leave_its_folder(tmp_path, name):
    save_file({"w": torch.ones(3)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(TrajectoryError, match="outside of its folder"):
        read_checkpoint(folder)


def test_watching_sees_code_that_runs(tmp_path):
    """The test of the test: what the child watches for is reported when it happens."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.checkpoints import read_in_a_child as child;"
        "sys.addaudithook(child.watch);"
        "child.watching = True; exec('x = 1'); open(sys.argv[2], 'w').close(); child.watching = False;"
        "print(child.events)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parents[2]), str(tmp_path / "ran")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "exec" in printed
    assert "open" in printed
