from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.finding import Selection
from lcsc_opt.checkpoints.lora import LoraAlphas, lora_flavour, lora_modules
from lcsc_opt.checkpoints.reading import read_checkpoint, read_metadata
from lcsc_opt.coefficients.layer_groups import LORA_FACTORS, LayerGroups
from lcsc_opt.exports.merging import average
from lcsc_opt.exports.writing import Destination
from lcsc_opt.sampling.lora import to_diffusers
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter, pack
from lcsc_opt.trajectory.sources import PackRequest
from tests import tiny_pipelines
from tests.lora_files import SAVERS, deltas, save_peft

if find_spec("peft") is None:
    pytest.skip("needs peft", allow_module_level=True)

# attention, convolutions of 3×3 and 1×1, and a linear layer outside of attention
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in", "time_emb_proj"]


def adapted_unet(seed: int, **changes: Any) -> Any:
    return tiny_pipelines.adapted_unet(seed, TARGETS, **changes)


Saved = Callable[[str, int, Path], tuple[Path, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Copies into a folder what a network of a seed was saved as once; gives the file, and the network to read."""
    files: dict[tuple[str, int], tuple[Path, Any]] = {}

    def save(flavour: str, seed: int, folder: Path) -> tuple[Path, Any]:
        if (flavour, seed) not in files:
            network = adapted_unet(seed)
            files[flavour, seed] = SAVERS[flavour](network, tmp_path_factory.mktemp("saved")), network
        file, network = files[flavour, seed]
        shutil.copytree(file.parent, folder, dirs_exist_ok=True)
        return folder / file.name, network

    return save


def saved_trajectory(saved: Saved, folder: Path, flavour: str) -> tuple[Trajectory, list[Any]]:
    files: list[Path] = []
    networks: list[Any] = []
    for seed in (1, 2):
        file, network = saved(flavour, seed, folder / f"checkpoint-{100 * seed}")
        files.append(file)
        networks.append(network)
    return pack(files, folder / "lora.trajectory", steps=[100, 200]), networks


def assert_products(weights: dict[str, Tensor], alphas: LoraAlphas | None, network: Any) -> None:
    """ΔW = alpha / rank · up · down of each module, ``[out, in(, h, w)]``, is what PEFT computes for the network."""
    ours = {}
    for module in lora_modules(weights):
        down, up, scale = module.factors(weights, alphas or LoraAlphas())
        product = scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
        ours[module.path.replace(".", "_")] = product
    theirs = {name.replace(".", "_"): value for name, value in deltas(network).items()}
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def load_into_pipeline(source: Any, folder: Path) -> Any:
    pipeline = tiny_pipelines.stable_diffusion(folder)
    pipeline.load_lora_weights(source)
    return pipeline


@pytest.mark.parametrize("flavour", list(SAVERS))
def test_products_are_those_that_peft_computes_and_a_pipeline_loads(saved: Saved, tmp_path: Path, flavour: str) -> None:
    path, network = saved(flavour, 1, tmp_path / "lora")
    weights = read_checkpoint(path).tensors
    alphas = LoraAlphas.read(path)
    assert lora_flavour(weights) == flavour
    assert_products(weights, alphas, network)
    assert {value.dim() for value in deltas(network).values()} == {2, 4}
    loaded = load_into_pipeline(to_diffusers(weights, alphas), tmp_path).unet
    torch.testing.assert_close(deltas(loaded), deltas(network), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ends", [*LORA_FACTORS, (".lora_A.default.weight", ".lora_B.default.weight")])
@pytest.mark.parametrize("stem", ["unet.down.0.processor.to", "base_model.model.mid.to", "lora_unet_mid_to"])
def test_rows_by_layer_hold_whole_modules(stem: str, ends: tuple[str, str]) -> None:
    modules = [[f"{stem}_{name}{end}" for end in (*ends, ".alpha")] for name in "qkv"]
    groups = LayerGroups.by("layers", {name: (2, 2) for names in modules for name in names})
    assert groups.names == (f"{stem}_k", f"{stem}_q", f"{stem}_v")
    assert [{groups.rows_of[name].first for name in names} for names in modules] == [{1}, {0}, {2}]
    if ".default." not in ends[0]:  # of a network's own state dict
        pairs = lora_modules(name for names in modules for name in names)
        assert [[module.down, module.up, module.alpha] for module in pairs] == modules


BLOCK = "attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (
            f"unet.down_blocks.0.{BLOCK}.processor.to_out_lora.[down,up]",
            f"unet.down_blocks.0.{BLOCK}.to_out.0.lora_[A,B]",
        ),
        (f"unet.base_model.model.mid_block.{BLOCK}.to_q.lora_[A,B]", f"unet.mid_block.{BLOCK}.to_q.lora_[A,B]"),
        (
            "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_[down,up]",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.[down,up]",
        ),
    ],
)
def test_names_of_trainers_and_of_kohyas_text_encoders_are_known(factors: str, expected: str) -> None:
    def both(pattern: str) -> list[str]:
        stem, pair = pattern.removesuffix("]").split("[")
        return [f"{stem}{name}.weight" for name in pair.split(",")]

    weights = dict(zip(both(factors), (torch.ones(1, 3), torch.ones(2, 1)), strict=True))
    assert list(to_diffusers(weights)) == both(expected)


PATTERNS = {"alpha_pattern": {"to_q": 1.0, "mid_block.*.to_k": 5.0, "conv1": 3.0}, "rank_pattern": {"to_q": 4}}


@pytest.mark.parametrize("changes", [PATTERNS, {"use_rslora": True}])
def test_alphas_by_pattern_are_those_of_peft(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = adapted_unet(1, **changes)
    for save in (tiny_pipelines.save_lora, save_peft):
        path = save(network, tmp_path / save.__name__)
        assert_products(read_checkpoint(path).tensors, LoraAlphas.read(path), network)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conv.weight"], "not a LoRA"),
        (["unet.x.lora_A.weight"], "no partner"),
        (["unet.x.lora_A.weight", "unet.x.lora_B.weight", "unet.x.lora_magnitude_vector"], "lora_magnitude_vector"),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.lora_mid.weight"], "lora_mid"),
    ],
)
def test_what_is_no_lora_of_two_factors_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        lora_modules(names)


@pytest.mark.parametrize(
    ("down", "up"), [((2, 3), (4, 3)), ((2, 3, 3, 3), (4, 2, 3, 3)), ((0, 3), (4, 0)), ((2, 3), (4,))]
)
def test_factors_that_do_not_fit_are_refused(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    weights = {"unet.x.lora_A.weight": torch.ones(down), "unet.x.lora_B.weight": torch.ones(up)}
    with pytest.raises(TrajectoryError, match="cannot be multiplied"):
        to_diffusers(weights)


@pytest.mark.parametrize(
    "text",
    ["{", '{"lora_alpha": 1' + "0" * 400 + "}", '{"lora_alpha": 1, "alpha_pattern": {"(": 2}}'],
    ids=["cut", "infinite", "no regular expression"],
)
def test_a_configuration_that_is_none_is_one_line(saved: Saved, tmp_path: Path, text: str) -> None:
    path, _ = saved("peft", 1, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(TrajectoryError, match="LoRA") as caught:
        LoraAlphas.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flavour", ["diffusers", "peft"])
def test_a_packed_trajectory_keeps_the_alphas_without_its_sources(saved: Saved, tmp_path: Path, flavour: str) -> None:
    trajectory, networks = saved_trajectory(saved, tmp_path, flavour)
    for folder in tmp_path.glob("checkpoint-*"):
        folder.rename(tmp_path / f"moved-{folder.name}")
    assert_products(trajectory.checkpoint(1), trajectory.lora_alphas(), networks[1])


@pytest.mark.parametrize("flavour", ["diffusers", "peft"])
def test_alphas_that_are_not_known_are_asked_for_or_assumed(
    saved: Saved, tmp_path: Path, flavour: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, _ = saved_trajectory(saved, tmp_path, flavour)
    with TrajectoryWriter(tmp_path / "written.trajectory") as writer:  # as a training loop, which tells no alphas
        writer.append(200, packed.checkpoint(1))
    trajectory = Trajectory.open(writer.path)
    if flavour == "peft":
        with pytest.raises(TrajectoryError, match="put it beside the weights, or give lora_alpha"):
            trajectory.lora_alphas()
    else:
        trajectory.lora_alphas()
        assert "alpha is its rank" in capsys.readouterr().err
    for module in lora_modules(trajectory.names):
        assert trajectory.lora_alphas(6.0).of(module, 2) == 6.0


@pytest.mark.parametrize("flavour", list(SAVERS))
def test_an_alpha_that_is_given_beside_those_of_the_checkpoints_is_refused(
    saved: Saved, tmp_path: Path, flavour: str
) -> None:
    trajectory, _ = saved_trajectory(saved, tmp_path, flavour)
    with pytest.raises(TrajectoryError, match="hold their own alphas; leave it out"):
        trajectory.lora_alphas(8.0)


def _with_alpha(folder: Path, step: int, alpha: float, place: str) -> Path:
    """A LoRA of one layer, whose alpha is in the header, or in PEFT's configuration beside it."""
    factors = {"unet.to_q.lora_A.weight": torch.ones(4, 8) * step, "unet.to_q.lora_B.weight": torch.ones(8, 4)}
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    header = {"ss_base_model_version": "sd_v1", "ss_steps": str(step), "sshs_model_hash": "0123", "format": "pt"}
    if place == "header":
        header["lora_adapter_metadata"] = json.dumps({"unet.r": 4, "unet.lora_alpha": alpha})
    else:
        (checkpoint / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
    save_file(factors, checkpoint / "adapter_model.safetensors", header)
    return checkpoint


@pytest.mark.parametrize("place", ["header", "configuration"])
def test_alphas_that_differ_between_checkpoints_are_refused(tmp_path: Path, place: str) -> None:
    for step, alpha in ((100, 4.0), (200, 16.0), (300, 16.0)):
        _with_alpha(tmp_path / "runs", step, alpha, place)
    with pytest.raises(TrajectoryError, match=r"checkpoint-200: its LoRA has other alphas than .*checkpoint-100"):
        pack(tmp_path / "runs", tmp_path / "t")
    later = pack(tmp_path / "runs", tmp_path / "t", selection=Selection(first_step=200))
    [module] = lora_modules(later.names)
    assert later.lora_alphas().of(module, 4) == 16.0


@pytest.mark.parametrize("pattern", ["hat-*.safetensors", "runs"], ids=["files", "folders"])
def test_an_export_has_what_the_headers_of_all_checkpoints_say(tmp_path: Path, pattern: str) -> None:
    for step in (100, 200):
        folder = _with_alpha(tmp_path / "runs", step, 4.0, "header")
        shutil.copy(folder / "adapter_model.safetensors", tmp_path / f"hat-{step}.safetensors")
    average(PackRequest([tmp_path / pattern], tmp_path), "uniform", Destination.of(tmp_path / "best.safetensors"))
    header = dict(read_metadata(tmp_path / "best.safetensors"))
    assert header.keys() == {"format", "lcsc_recipe", "ss_base_model_version", "lora_adapter_metadata"}
    average(
        PackRequest([tmp_path / pattern], tmp_path),
        "uniform",
        Destination.of(tmp_path / "lora.safetensors", form="lora"),
    )
    assert "lora_adapter_metadata" not in read_metadata(tmp_path / "lora.safetensors")
