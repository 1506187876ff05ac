from __future__ import annotations

import collections
import importlib
import os
import stat
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.finding import find_checkpoints
from lcsc_opt.checkpoints.inventory import CHOOSE, GUESSED_KEYS
from lcsc_opt.checkpoints.order import checkpoint_steps
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.weights import write_safetensors
from tests.checkpoints.checkpoint_examples import net, saved
from tests.trajectory.trajectory_examples import same_bits, state_dict

WEIGHTS = state_dict(1)
OTHER = state_dict(2)


def assert_read(path, key, expected=WEIGHTS):
    checkpoint = read_checkpoint(path)
    assert checkpoint.key == key
    assert same_bits(checkpoint.tensors, expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt", ".bin"])
def test_bare_state_dict_comes_back_bit_for_bit(tmp_path, suffix):
    assert_read(saved(tmp_path / f"model{suffix}", WEIGHTS), "")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):  # of wrappers
        assert_read(saved(tmp_path / f"wrapped{suffix}", {prefix + name: w for name, w in WEIGHTS.items()}), "")


@pytest.mark.parametrize("key", GUESSED_KEYS)
def test_usual_keys_are_found(tmp_path, key):
    content = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, key: WEIGHTS}
    assert_read(saved(tmp_path / "m.pt", content), key)


def test_nested_keys_are_found_and_followed(tmp_path):
    content = {"ema": {"decay": 0.9, "model": WEIGHTS}, "deep": {"er": {"still": OTHER}}, "ema_0.99": {"a": OTHER}}
    path = saved(tmp_path / "m.pt", content)
    assert read_checkpoint(saved(tmp_path / "one.pt", {"ema": content["ema"]})).key == "ema.model"
    with pytest.raises(TrajectoryError, match=r"several state dicts \(ema.model, ema_0.99.a\): choose one \(key: NAME"):
        read_checkpoint(path)
    assert same_bits(read_checkpoint(path, key="ema_0.99.a").tensors, OTHER)
    assert same_bits(read_checkpoint(path, key="deep.er.still").tensors, OTHER)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_diffusers_folder(tmp_path, name):
    root = tmp_path / "checkpoint-500"
    file = saved(root / "unet" / name, WEIGHTS)
    saved(root / "unet_ema" / name, OTHER)
    for path in (root / "unet", file):
        assert same_bits(read_checkpoint(path).tensors, WEIGHTS)
        assert checkpoint_steps([path])[0] == 500
    raw = read_checkpoint(root, key="unet")
    assert raw.key == "unet"
    assert same_bits(raw.tensors, WEIGHTS)
    assert_read(root, "unet_ema", OTHER)  # averages come before raw weights
    assert checkpoint_steps([root])[0] == 500


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("new", [True, False])
def test_tensors_are_those_of_torch_load(tmp_path, new):
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    content = {
        "view": base[:, 1:, ::2],
        "transposed": base.permute(2, 0, 1),
        "whole": base,
        "expanded": torch.ones(3, 1).expand(3, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
        **WEIGHTS,
    }
    if new:  # torch cannot read these from its old format
        content["float8"] = torch.randn(4).to(torch.float8_e5m2)
        content["uint16"] = torch.tensor([1, 65535], dtype=torch.uint16)
    path = saved(tmp_path / "m.pt", content, _use_new_zipfile_serialization=new)
    expected = torch.load(path, weights_only=True)
    found = read_checkpoint(path).tensors
    assert list(found) == list(expected)
    assert same_bits(found, expected)
    assert all(found[name].stride() == expected[name].stride() for name in expected)


def test_tensors_that_share_memory_are_mapped_once_and_writing_to_them_changes_no_file(tmp_path):
    shared = torch.randn(1000)
    found = read_checkpoint(saved(tmp_path / "m.pt", {"a": shared, "b": shared[10:]})).tensors
    assert found["b"].data_ptr() == found["a"].data_ptr() + 40
    path = saved(tmp_path / "own.pt", WEIGHTS)
    before = path.read_bytes()
    read_checkpoint(path).tensors["weight"].zero_()
    assert path.read_bytes() == before


def truncated(path):
    content = saved(path, WEIGHTS).read_bytes()
    path.write_bytes(content[: len(content) // 2])


BAD_FILES = {
    "truncated.safetensors": truncated,
    "truncated.pt": truncated,
    "empty.pt": lambda path: path.touch(),
    "text.pt": lambda path: path.write_text("These are not weights.\n" * 40),
    "text.safetensors": lambda path: path.write_text("These are not weights.\n" * 40),
    "zip.pt": lambda path: zipfile.ZipFile(path, "w").close(),
    "notes.txt": lambda path: path.write_text("x"),
    "folder": lambda path: path.mkdir(),
    "missing.pt": lambda path: None,
    "tensor.pt": lambda path: saved(path, torch.ones(1)),
    "no_tensor.pt": lambda path: saved(path, {"epoch": 3}),
    "nested_number.pt": lambda path: saved(path, {"model": {"w": torch.ones(1), "epoch": 3}}),
    "class.pt": lambda path: saved(path, {"w": torch.ones(1), "c": collections.Counter(), "d": torch.nn.Linear(1, 1)}),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_typed_line_with_its_name(tmp_path, name):
    BAD_FILES[name](tmp_path / name)
    with pytest.raises(TrajectoryError) as caught:
        read_checkpoint(tmp_path / name)
    assert name in str(caught.value)
    assert ":" in str(caught.value).split(name)[-1]  # what to do
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="of Linux")
def test_a_folder_to_which_its_file_system_gives_no_size_is_looked_into():
    with pytest.raises(TrajectoryError, match="task holds no known file of weights"):
        read_checkpoint("/proc/self/task")


def test_key_continues_as_the_start_of_names(tmp_path):
    names = {f"model.{name}": tensor for name, tensor in WEIGHTS.items()} | {"loss.scale": torch.ones(1)}
    path = saved(tmp_path / "m.pt", {"state_dict": names})
    assert read_checkpoint(path, key="state_dict").tensors.keys() == names.keys()
    assert same_bits(read_checkpoint(path, key="state_dict.model").tensors, WEIGHTS)
    bare = saved(tmp_path / "m.safetensors", {name: tensor.contiguous() for name, tensor in names.items()})
    assert same_bits(read_checkpoint(bare, key="model").tensors, WEIGHTS)


def test_guess_is_said_once_where_there_was_a_choice(tmp_path, capsys):
    both = saved(tmp_path / "both.pt", {"model": OTHER, "ema": WEIGHTS, "optimizer": {"state": {}}})
    read_checkpoint(saved(tmp_path / "one.pt", {"model": OTHER, "epoch": 3}))
    read_checkpoint(saved(tmp_path / "bare.pt", OTHER))
    read_checkpoint(both, key="ema")
    assert capsys.readouterr().err == ""
    read_checkpoint(both)
    said = f"lcsc: both.pt: using 'ema', an average of the weights; there is also model ({CHOOSE}).\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("key", "wrap"), [("", lambda module: module), ("model", lambda module: {"model": module})])
def test_a_whole_pickled_module_gives_its_weights(tmp_path, key, wrap):
    module = net(1)
    module.register_buffer("scratch", torch.zeros(3), persistent=False)
    path = saved(tmp_path / "m.pt", wrap(module))
    assert_read(path, key, module.state_dict())
    assert list(read_checkpoint(path).tensors) == list(module.state_dict())


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"my_weights": WEIGHTS, "epoch": 3, "rng": {"cpu": torch.zeros(3)}}, "my_weights"),
        ({"module": WEIGHTS, "global_steps": 3}, "module"),  # of DeepSpeed
        ({"params": OTHER, "params_ema": WEIGHTS}, "params_ema"),  # of BasicSR
        ({"G": OTHER, "D": OTHER, "G_ema": WEIGHTS}, "G_ema"),  # of StyleGAN
        ({"model": OTHER, "ema": {"decay": 0.9, "shadow": WEIGHTS}}, "ema.shadow"),
        ({"state_dict": WEIGHTS, "ema_state_dict": OTHER, "message_hub": {}, "meta": {}}, "state_dict"),  # of mmengine
    ],
)
def test_the_only_state_dict_or_the_only_average_is_taken(tmp_path, content, key):
    assert_read(saved(tmp_path / "m.pt", content), key)


def test_the_counter_of_mmengines_average_is_no_part_of_the_model(tmp_path):
    raw = {"steps": torch.tensor(580), **{f"module.{name}": tensor for name, tensor in WEIGHTS.items()}}
    path = saved(tmp_path / "m.pth", {"meta": {}, "message_hub": {}, "state_dict": WEIGHTS, "ema_state_dict": raw})
    assert same_bits(read_checkpoint(path, key="ema_state_dict").tensors, WEIGHTS)


def test_a_folder_of_deepspeed_is_one_checkpoint_unless_a_model_is_spread_over_ranks(tmp_path):
    folder = tmp_path / "global_step100"
    folder.mkdir()
    saved(folder / "mp_rank_00_model_states.pt", {"module": WEIGHTS, "optimizer": None, "global_steps": 100})
    saved(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"optimizer_state_dict": {}})
    assert find_checkpoints(tmp_path) == [folder]
    assert checkpoint_steps([folder]) == [100]
    assert_read(folder, "module")
    saved(folder / "mp_rank_01_model_states.pt", {"module": WEIGHTS})
    with pytest.raises(TrajectoryError, match="several variants of its weights"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [
        {"generator": WEIGHTS, "discriminator": OTHER},
        {"model": WEIGHTS, "text_encoder": OTHER, "epoch": 1},
        {"model": WEIGHTS, "ema_0.999": OTHER, "ema_0.9999": OTHER},
    ],
)
def test_of_several_state_dicts_one_has_to_be_chosen(tmp_path, content):
    path = saved(tmp_path / "m.pt", content)
    *_, first, second = [name for name in content if name != "epoch"]
    with pytest.raises(TrajectoryError, match=rf"several state dicts \({first}, {second}\): choose one \(key: NAME"):
        read_checkpoint(path)
    assert same_bits(read_checkpoint(path, key=second).tensors, OTHER)


@pytest.mark.parametrize(("count", "listed"), [(12, "key11; pass"), (100, "key15, …; pass")])
def test_a_wrong_key_is_refused_with_those_that_there_are(tmp_path, count, listed):
    path = saved(tmp_path / "m.pt", {f"key{number}": WEIGHTS for number in range(count)})
    with pytest.raises(TrajectoryError, match=f"'key' is not among key0, key1, .*{listed} another --key"):
        read_checkpoint(path, key="key")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "has a sparse tensor at 'w', not a plain tensor"),
        (torch.empty(2, device="meta"), "has a tensor without data at 'w', not a plain tensor"),
    ],
)
def test_tensors_that_cannot_be_read_are_named(tmp_path, tensor, said):
    for content in ({"w": tensor}, {"model": {"w": tensor}}):
        with pytest.raises(TrajectoryError, match=said.replace("'w'", "'(model.)?w'")):
            read_checkpoint(saved(tmp_path / "m.pt", content))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_tensors_are_named(tmp_path):
    quantized = torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8)
    with pytest.raises(TrajectoryError, match=r"holds quantized tensors \(QInt8Storage\)"):
        read_checkpoint(saved(tmp_path / "m.pt", {"w": quantized}))


def test_the_names_of_wrappers_are_left_out_wherever_they_are(tmp_path):
    inside = {
        "blocks.0._orig_mod.w": torch.ones(2),
        "_fsdp_wrapped_module.head._checkpoint_wrapped_module.w": torch.ones(3),
    }
    assert list(read_checkpoint(saved(tmp_path / "inside.pt", inside)).tensors) == ["blocks.0.w", "head.w"]
    beside = {"module.w": torch.ones(2), "module.batches": torch.tensor(3), "num_updates": torch.tensor(3)}
    assert list(read_checkpoint(saved(tmp_path / "beside.pt", beside)).tensors) == ["w", "batches"]


@pytest.mark.parametrize("head", [{}, {"word_embeddings_for_head": {"weight": torch.ones(4)}}])
def test_a_model_in_nested_dicts_is_one_state_dict(tmp_path, head):
    """As Megatron saves it."""
    language_model = {
        "embedding": {"word_embeddings": {"weight": torch.ones(2)}},
        "encoder": {"layers.0.w": torch.ones(3)},
    }
    path = saved(
        tmp_path / "m.pt", {"iteration": 3, "model": {"language_model": language_model, **head}, "rng_state": [1]}
    )
    names = ["language_model.embedding.word_embeddings.weight", "language_model.encoder.layers.0.w"]
    found = read_checkpoint(path, key="model")
    assert sorted(found.tensors) == sorted([*names, *(f"{name}.weight" for name in head)])
    assert read_checkpoint(path).key.startswith("model")
    assert len(read_checkpoint(path).tensors) == len(found.tensors)


@pytest.mark.parametrize("extra", [None, {"recipe": "fp8"}])
def test_extra_states_that_are_no_tensors_are_left_out(tmp_path, extra):
    content = {**WEIGHTS, "layer._extra_state": extra}
    assert_read(saved(tmp_path / "m.pt", content), "")
    assert_read(saved(tmp_path / "n.pt", {"model": content}), "model")


def test_a_file_of_torch_whose_zip_was_compressed_says_so(tmp_path):
    saved(tmp_path / "plain.pt", WEIGHTS)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "m.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(TrajectoryError, match=r"m\.pt is a compressed zip"):
        read_checkpoint(tmp_path / "m.pt")


def test_weights_that_lie_elsewhere_are_refused(tmp_path):
    """DeepSpeed's ZeRO-3 leaves them in the states of its optimizer, all but small ones."""
    parts = {"module": {"w": torch.empty(0), "b": torch.empty(0), "scale": torch.ones(2)}, "global_steps": 7}
    with pytest.raises(TrajectoryError, match=r"m\.pt holds names without weights.*zero_to_fp32\.py"):
        read_checkpoint(saved(tmp_path / "m.pt", parts))
    one_is_empty = {"w": torch.empty(0), "b": torch.ones(1)}
    assert read_checkpoint(saved(tmp_path / "n.pt", one_is_empty)).tensors.keys() == one_is_empty.keys()


@pytest.mark.parametrize("order", [b"little", b"big"])
def test_a_file_with_the_other_byte_order_is_refused(tmp_path, order):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "saved.pt")
    with zipfile.ZipFile(tmp_path / "saved.pt") as saved, zipfile.ZipFile(tmp_path / "m.pt", "w") as other:
        for name in saved.namelist():
            other.writestr(name, order if name.endswith("byteorder") else saved.read(name))
    if order.decode() == sys.byteorder:
        assert read_checkpoint(tmp_path / "m.pt").tensors["w"].tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(TrajectoryError, match=r"m\.pt was saved with the other byte order: load it with torch"):
            read_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_an_export_may_be_read_by_whom_the_umask_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_safetensors({"w": torch.ones(2)}, tmp_path / "m.safetensors", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("program", ["gzip", "bz2", "lzma"])
def test_a_file_that_a_program_compressed_says_so(tmp_path, program):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(importlib.import_module(program).compress(content))
    with pytest.raises(TrajectoryError, match=r"m\.pt was compressed by (gzip|bzip2|xz), so its weights"):
        read_checkpoint(tmp_path / "m.pt")


def test_states_and_containers_without_tensors_among_the_weights_are_none_of_them(tmp_path):
    """As tianshou's ``_optimizers`` and scvi-tools' ``pyro_param_store``."""
    adam = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    for content in ({**WEIGHTS, "_optimizers": [adam]}, {**WEIGHTS, "store": {"params": {}}}, {**WEIGHTS, "log": [1]}):
        read = read_checkpoint(saved(tmp_path / "m.pt", {"algorithm": content})).tensors
        assert read.keys() == WEIGHTS.keys()
    with pytest.raises(TrajectoryError, match=r"has a list at 'algorithm.rest', not a plain tensor"):
        read_checkpoint(saved(tmp_path / "m.pt", {"algorithm": {**WEIGHTS, "rest": [torch.ones(2)]}}))


def test_a_zip_of_files_of_torch_is_read_by_their_names(tmp_path):
    """As stable-baselines3 saves a policy; a zip of images is no checkpoint, and two networks are asked about."""
    for step in (1000, 2000):
        with zipfile.ZipFile(tmp_path / f"ppo_{step}_steps.zip", "w") as archive:
            archive.writestr("data", "{}")
            for name in ("policy.pth", "policy.optimizer.pth"):
                with archive.open(name, "w") as file:
                    torch.save(WEIGHTS, file)
    with zipfile.ZipFile(tmp_path / "samples_2000.zip", "w") as archive:
        archive.writestr("0.png", b"")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["ppo_1000_steps.zip", "ppo_2000_steps.zip"]
    checkpoint = read_checkpoint(tmp_path / "ppo_1000_steps.zip")
    assert checkpoint.key == "policy"
    torch.testing.assert_close(checkpoint.tensors, WEIGHTS)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in ("actor.pth", "critic.pth"):
            with archive.open(name, "w") as file:
                torch.save(WEIGHTS, file)
    with pytest.raises(TrajectoryError, match=r"actor.*critic"):
        read_checkpoint(tmp_path / "two.zip")
    assert read_checkpoint(tmp_path / "two.zip", key="critic").tensors.keys() == WEIGHTS.keys()
    with pytest.raises(TrajectoryError, match="a zip with 0 files of weights"):
        read_checkpoint(tmp_path / "samples_2000.zip")


def test_a_zip_with_compressed_weights_says_so(tmp_path):
    """As of pytorch-tabnet."""
    with (
        zipfile.ZipFile(tmp_path / "tabnet.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("network.pt", "w") as file,
    ):
        torch.save(WEIGHTS, file)
    with pytest.raises(TrajectoryError, match=r"tabnet\.zip is a compressed zip"):
        read_checkpoint(tmp_path / "tabnet.zip")
