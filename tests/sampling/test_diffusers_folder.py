from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.sampling import DiffusersFolder
from tests.unet_examples import unet


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(unet(num_class_embeds=7, channels=3), scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["", "unet", "unet/config.json"])
def test_a_pipeline_a_model_and_a_file_say_the_same(pipeline: Path, part: str) -> None:
    folder = DiffusersFolder.read(pipeline / part)
    network = folder.network()
    expected = unet(num_class_embeds=7, channels=3)
    assert {n: p.shape for n, p in network.state_dict().items()} == {
        n: p.shape for n, p in expected.state_dict().items()
    }
    assert (folder.classes, folder.image_shape()) == (7, (3, 8, 8))
    assert folder.scheduler is not None
    assert folder.scheduler["_class_name"] == "DDPMScheduler"
    assert folder.scheduler["prediction_type"] == "v_prediction"


def test_no_weights_are_read(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((pipeline / "unet" / "config.json").read_bytes())
    torch.save({"no": "weights"}, tmp_path / "diffusion_pytorch_model.bin")
    assert DiffusersFolder.read(tmp_path).network() is not None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NoSuchModel",
        "DDPMScheduler",
        "utils",
        "__builtins__",
        "UNet2DModel; x",
        "ModelMixin",  # cannot be made of a configuration, as the next
        "MultiAdapter",
    ],
)
def test_only_models_of_diffusers_are_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ObjectiveError, match=r"expected a model for images that diffusers .* has"):
        DiffusersFolder.read(tmp_path).network()


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm_num_groups": 0},
        {"act_fn": 3},
        {"block_out_channels": []},
    ],
)
def test_wrong_settings_of_a_model_are_one_line(wrong: dict[str, object]) -> None:
    config = {"_class_name": "UNet2DModel", **wrong}
    with pytest.raises(ObjectiveError, match=r"^model: here: UNet2DModel: .+"):
        DiffusersFolder(Path("here"), config, None).network()


def test_classes_that_are_no_number_are_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"num_class_embeds or .*: expected a whole number, got 'ten'"):
        _ = DiffusersFolder(Path("here"), {"num_class_embeds": "ten"}, None).classes


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"holds no config\.json"):
        DiffusersFolder.read(tmp_path / "nowhere")
    for text in ("[1]", "{", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ObjectiveError, match=r"config\.json"):
            DiffusersFolder.read(tmp_path)


@pytest.mark.parametrize(("folder", "is_found"), [("checkpoint-300", True), ("models", False)])
def test_the_scheduler_of_a_run_lies_beside_its_checkpoints(tmp_path: Path, folder: str, is_found: bool) -> None:
    unet = tmp_path / "runs" / folder / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    scheduler = tmp_path / "runs" / "scheduler"
    scheduler.mkdir()
    (scheduler / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    read = DiffusersFolder.read(tmp_path / "runs" / folder)
    assert (read.scheduler is not None) == is_found
