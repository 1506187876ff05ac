"""The folders that trainers leave: every file of weights is used, an average, or left out with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.finding import find_checkpoints, find_run
from lcsc_opt.checkpoints.names import CHECKPOINT_SUFFIXES
from lcsc_opt.checkpoints.reading import read_checkpoint
from tests.checkpoints.checkpoint_examples import saved
from tests.trajectory.trajectory_examples import open_or_pack

STEPS = (100, 200, 300)


def weights(number: float) -> dict[str, torch.Tensor]:
    return {"net.weight": torch.full((3, 2), float(number)), "net.bias": torch.full((3,), float(number))}


class Layout(NamedTuple):
    """A folder of a trainer: what each file of a step holds, what lies beside, and what must come of it.

    Attributes:
        used: how many checkpoints.
        average: whether the report has a row for the trainer's average.
        pattern: what a user names below the folder, once a message has asked which series is meant.
        refused: what a question or a refusal of the folder itself says; empty where it is read at once.
        key: which state dict, where a message asks for it.
    """

    of_step: Mapping[str, Any]
    beside: Mapping[str, Any]
    used: int
    average: bool = False
    pattern: str = ""
    refused: str = ""
    key: str | None = None


def torch_ema(step: int) -> dict[str, Any]:
    return {"decay": 0.999, "num_updates": step, "shadow_params": [*weights(step + 0.5).values()]}


def state(step: int) -> dict[str, Any]:
    return {"state": {0: {"exp_avg": torch.ones(2)}}, "step": step}


def raw(step: int) -> dict[str, torch.Tensor]:
    return weights(step)


def averaged(step: int) -> dict[str, torch.Tensor]:
    return weights(step + 0.5)


def under(key: str, **rest: Any) -> Callable[[int], dict[str, Any]]:
    """Weights under a key, and what else a trainer's file holds."""
    return lambda step: {key: weights(step), **rest}


def with_ema(key: str, ema: str, **rest: Any) -> Callable[[int], dict[str, Any]]:
    """Raw weights and their average, each under a key."""
    return lambda step: {key: weights(step), ema: averaged(step), **rest}


def prefixed(prefix: str, number: float) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in weights(number).items()}


LAYOUTS = {
    "Accelerate with torch-ema": Layout(
        {
            "checkpoint-{}/pytorch_model.bin": raw,
            "checkpoint-{}/optimizer.bin": state,
            "checkpoint-{}/scheduler.bin": state,
            "checkpoint-{}/custom_checkpoint_0.pkl": torch_ema,
        },
        {},
        used=3,
        average=True,
    ),
    "diffusers' folders with the pipeline beside": Layout(
        {
            "checkpoint-{}/unet/diffusion_pytorch_model.safetensors": raw,
            "checkpoint-{}/unet_ema/diffusion_pytorch_model.safetensors": averaged,
            "checkpoint-{}/optimizer.bin": state,
            "checkpoint-{}/random_states_0.pkl": state,
        },
        {
            "unet/diffusion_pytorch_model.safetensors": weights(300),
            "vae/diffusion_pytorch_model.safetensors": {"decoder": torch.ones(2)},
        },
        used=3,
        average=True,
    ),
    "transformers, whose last model lies in the root": Layout(
        {
            "checkpoint-{}/model.safetensors": raw,
            "checkpoint-{}/optimizer.pt": state,
            "checkpoint-{}/trainer_state.json": lambda step: {"global_step": step, "epoch": step / 100},
            "checkpoint-{}/training_args.bin": state,
        },
        {"model.safetensors": weights(300), "training_args.bin": state(0)},
        used=3,
    ),
    "transformers, with a later last model": Layout(
        {
            "checkpoint-{}/model.safetensors": raw,
            "checkpoint-{}/trainer_state.json": lambda step: {"global_step": step, "epoch": 1.0},
        },
        {"final/model.safetensors": weights(350), "final/trainer_state.json": {"global_step": 350}},
        used=4,
    ),
    "Lightning, with last and best": Layout(
        {"checkpoints/epoch=0-step={}.ckpt": lambda step: {"state_dict": weights(step), "global_step": step}},
        {
            "checkpoints/last.ckpt": {"state_dict": weights(300), "global_step": 300},
            "hparams.bin": {"lr": 0.1},
        },
        used=3,
    ),
    "litgpt": Layout({"step-{:08}/lit_model.pth": raw}, {"final/lit_model.pth": weights(400)}, used=3),
    "openai's code bases, raw weights chosen": Layout(
        {
            "model{:06}.pt": raw,
            "ema_0.999_{:06}.pt": raw,
            "ema_0.9999_{:06}.pt": averaged,
            "ema_0.99_{:06}.pt": raw,
            "opt{:06}.pt": state,
        },
        {},
        used=3,
        average=True,
        pattern="model*.pt",
    ),
    "torchtune": Layout(
        {"epoch_{}/model.safetensors": raw, "epoch_{}/recipe_state.pt": lambda step: {"epochs_run": step}},
        {"recipe_state/recipe_state.pt": {"epochs_run": 3}, "torchtune_config.yaml": None},
        used=3,
    ),
    "pythae": Layout(
        {"checkpoint_epoch_{}/model.pt": lambda step: {"model": weights(step)}, "checkpoint_epoch_{}/optim.pt": state},
        {"sample-1.png": None},
        used=3,
    ),
    "kohya's LoRA with its states": Layout(
        {"hat-{:06}.safetensors": raw, "hat-{:06}-state/optimizer.bin": state},
        {"hat.safetensors": weights(300), "sample/hat_000.png": None},
        used=3,
    ),
    "kohya's LoRA whose states hold it, too": Layout(
        {"hat-{:06}.safetensors": raw, "hat-{:06}-state/model.safetensors": raw},
        {"hat-state/model.safetensors": weights(300)},
        used=3,
    ),
    "ai-toolkit": Layout(
        {"hat_{:09}.safetensors": raw}, {"optimizer.pt": state(0), "hat.safetensors": weights(300)}, used=3
    ),
    "diffusers' LoRA": Layout(
        {"checkpoint-{}/pytorch_lora_weights.safetensors": raw, "checkpoint-{}/optimizer.bin": state},
        {"pytorch_lora_weights.safetensors": weights(300)},
        used=3,
    ),
    "PEFT": Layout(
        {
            "checkpoint-{}/adapter_model.safetensors": raw,
            "checkpoint-{}/rng_state.pth": state,
            "checkpoint-{}/trainer_state.json": lambda step: {"global_step": step},
        },
        {"adapter_model.safetensors": weights(300)},
        used=3,
    ),
    "transformers, split into several files": Layout(
        {
            "checkpoint-{}/model-00001-of-00001.safetensors": raw,
            "checkpoint-{}/model.safetensors.index.json": lambda step: {
                "weight_map": dict.fromkeys(weights(0), "model-00001-of-00001.safetensors")
            },
        },
        {
            "model-00001-of-00002.safetensors": {"net.weight": torch.ones(3, 2)},
            "model-00002-of-00002.safetensors": {"net.bias": torch.ones(3)},
            "model.safetensors.index.json": {
                "weight_map": {
                    "net.weight": "model-00001-of-00002.safetensors",
                    "net.bias": "model-00002-of-00002.safetensors",
                }
            },
        },
        used=3,
    ),
    "Accelerate's automatic names": Layout(
        {"checkpoints/checkpoint_{}/model.safetensors": raw, "checkpoints/checkpoint_{}/optimizer.bin": state},
        {},
        used=3,
    ),
    "scvi-tools": Layout(
        {"epoch=1-step={}-validation_loss=0.25/model.pt": under("model_state_dict", var_names=["a"])}, {}, used=3
    ),
    "stable-baselines3, unpacked": Layout(
        {
            "ppo_{}_steps/policy.pth": raw,
            "ppo_{}_steps/policy.optimizer.pth": state,
            "ppo_{}_steps/pytorch_variables.pth": lambda step: {},
        },
        {},
        used=3,
    ),
    "tianshou": Layout({"checkpoint_{}.pth": under("model", optim=state(0))}, {"policy.pth": weights(200)}, used=3),
    "rsl_rl": Layout(
        {"model_{}.pt": lambda step: {"model_state_dict": weights(step), "iter": step, "infos": None}},
        {"exported/policy.pt": weights(300)},
        used=3,
    ),
    "skrl, whose files hold several networks": Layout(
        {"checkpoints/agent_{}.pt": lambda step: {"policy": weights(step), "value": {"v": torch.ones(2)}}},
        {"checkpoints/best_agent.pt": {"policy": weights(300), "value": {"v": torch.ones(2)}}},
        used=3,
        key="policy",
    ),
    "lucidrains' denoising-diffusion-pytorch": Layout(
        {
            "model-{}.pt": lambda step: {
                "step": step,
                "model": weights(step),
                "opt": state(0),
                "ema": {
                    "initted": torch.tensor(True),
                    **prefixed("online_model", step),
                    **prefixed("ema_model", step + 0.5),
                },
            }
        },
        {"sample-1.png": None},
        used=3,
        average=True,
    ),
    "DiT, from the folder above": Layout(
        {"000-DiT-XL-2/checkpoints/{:07}.pt": with_ema("model", "ema", opt=state(0))},
        {"000-DiT-XL-2/log.txt": None},
        used=3,
        average=True,
    ),
    "U-ViT": Layout(
        {
            "ckpts/{}.ckpt/nnet.pth": raw,
            "ckpts/{}.ckpt/nnet_ema.pth": averaged,
            "ckpts/{}.ckpt/optimizer.pth": state,
            "ckpts/{}.ckpt/lr_scheduler.pth": state,
            "ckpts/{}.ckpt/step.pth": lambda step: {"step": step},
        },
        {},
        used=3,
        average=True,
    ),
    "latent-diffusion of CompVis": Layout(
        {
            "checkpoints/epoch={:06}.ckpt": lambda step: {
                "state_dict": {
                    **prefixed("model", step),
                    "model_ema.decay": torch.tensor(0.99),
                    "model_ema.num_updates": torch.tensor(step),
                    "model_ema.netweight": averaged(step)["net.weight"],
                    "model_ema.netbias": averaged(step)["net.bias"],
                },
                "global_step": step,
            }
        },
        {"checkpoints/last.ckpt": {"state_dict": prefixed("model", 300), "global_step": 300}},
        used=3,
        average=True,
    ),
    "score_sde_pytorch": Layout(
        {
            "checkpoints/checkpoint_{}.pth": lambda step: {
                "model": {f"module.{name}": tensor for name, tensor in weights(step).items()},
                "ema": torch_ema(step),
                "step": step,
            }
        },
        {"checkpoints-meta/checkpoint.pth": {"model": weights(300), "step": 300}},
        used=3,
        average=True,
    ),
    "DDIM, a list": Layout(
        {"ckpt_{}.pth": lambda step: [weights(step), {"state": {}, "param_groups": []}, 1, step, averaged(step)]},
        {"ckpt.pth": [weights(300), {"state": {}, "param_groups": []}, 1, 300, averaged(300)]},
        used=3,
        average=True,
    ),
    "fairseq": Layout(
        {"checkpoint_1_{}.pt": under("model", optimizer_history=[])},
        {"checkpoint_last.pt": {"model": weights(300)}, "checkpoint_best.pt": {"model": weights(200)}},
        used=3,
    ),
    "icefall, whose batches and epochs are two series": Layout(
        {
            "epoch-{}.pt": with_ema("model", "model_avg", sampler=None),
            "checkpoint-{}000.pt": with_ema("model", "model_avg", sampler=None),
        },
        {"best-valid-loss.pt": {"model": weights(300)}},
        used=3,
        average=True,
        pattern="epoch-*.pt",
        refused="several series",
    ),
    "ESPnet": Layout(
        {"{}epoch.pth": raw},
        {"checkpoint.pth": {"model": weights(300), "optimizers": []}, "valid.acc.best.pth": weights(200)},
        used=3,
    ),
    "WeNet": Layout({"epoch_{}.pt": raw}, {"final.pt": weights(300), "init.pt": weights(0)}, used=3),
    "detectron2": Layout(
        {"model_{:07}.pth": lambda step: {"model": weights(step), "iteration": step}},
        {"model_final.pth": {"model": weights(400), "iteration": 400}},
        used=4,
    ),
    "timm": Layout(
        {"checkpoint-{}.pth.tar": with_ema("state_dict", "state_dict_ema", arch="vit")},
        {
            "last.pth.tar": {"state_dict": weights(300), "state_dict_ema": averaged(300)},
            "model_best.pth.tar": {"state_dict": weights(200), "state_dict_ema": averaged(200)},
        },
        used=3,
        average=True,
    ),
    "Composer": Layout(
        {"ep0-ba{}-rank0.pt": lambda step: {"state": {"model": weights(step), "optimizers": {}}, "rng": []}},
        {"latest-rank0.pt": {"state": {"model": weights(300), "optimizers": {}}, "rng": []}},
        used=3,
    ),
    "NeMo, whose averages are files of their own": Layout(
        {
            "checkpoints/net-epoch=1-step={}.ckpt": under("state_dict"),
            "checkpoints/net-epoch=1-step={}-EMA.ckpt": lambda step: {"state_dict": averaged(step)},
        },
        {},
        used=3,
        average=True,
        pattern="checkpoints/net-epoch=*-step=*[0-9].ckpt",
        refused="several series",
    ),
    "Lightning's folders of versions": Layout(
        {"lightning_logs/version_0/checkpoints/epoch=0-step={}.ckpt": under("state_dict")},
        {"lightning_logs/version_0/hparams.yaml": None},
        used=3,
    ),
    "two runs of Lightning": Layout(
        {
            "lightning_logs/version_0/checkpoints/epoch=0-step={}.ckpt": under("state_dict"),
            "lightning_logs/version_1/checkpoints/epoch=0-step={}.ckpt": under("state_dict"),
        },
        {},
        used=3,
        pattern="lightning_logs/version_1",
        refused="several series",
    ),
    "Lightning with an average in a callback": Layout(
        {
            "epoch=0-step={}.ckpt": lambda step: {
                "state_dict": weights(step),
                "callbacks": {"EMA{'decay': 0.999}": {"ema_state_dict": averaged(step)}},
            }
        },
        {},
        used=3,
        average=True,
    ),
    "OpenFold": Layout(
        {
            "checkpoints/1-{}.ckpt": lambda step: {
                "state_dict": weights(step),
                "ema": {"params": averaged(step), "decay": 0.999},
            }
        },
        {},
        used=3,
        average=True,
    ),
    "Megatron": Layout(
        {"iter_{:07}/mp_rank_00/model_optim_rng.pt": under("model", iteration=1)},
        {"latest_checkpointed_iteration.txt": None},
        used=3,
    ),
    "DeepSpeed": Layout(
        {
            "global_step{}/mp_rank_00_model_states.pt": under("module"),
            "global_step{}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": state,
        },
        {"latest": None},
        used=3,
    ),
    "k-diffusion": Layout(
        {"run_{:08}.pth": with_ema("model", "model_ema", opt=state(0), ema_sched=state(0))},
        {"run_state.json": {"latest_checkpoint": "run_00000300.pth"}},
        used=3,
        average=True,
    ),
    "Coqui": Layout(
        {"checkpoint_{}.pth": lambda step: {"model": weights(step), "step": step}},
        {
            "best_model.pth": {"model": weights(200), "step": 200},
            "best_model_200.pth": {"model": weights(200), "step": 200},
        },
        used=3,
    ),
    "a folder of more files than its parent": Layout(
        {"out/model_{}.pt": raw},
        {"old_1.pt": weights(1), "old_2.pt": weights(2)},
        used=3,
        pattern="out",
        refused="several series",
    ),
    "numbered files beside a model of a usual name": Layout(
        {"model_{}.safetensors": raw}, {"pytorch_model.bin": weights(300)}, used=3
    ),
}


def write(root: Path, layout: Layout) -> None:
    contents = dict(layout.beside)
    for name, content in layout.of_step.items():
        contents |= {name.format(step): content(step) for step in STEPS}
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.write_text("")
        elif name.endswith(".json"):
            path.write_text(json.dumps(content))
        else:
            saved(path, content)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_of_weights_is_accounted_for(tmp_path, name):
    layout = LAYOUTS[name]
    root = tmp_path / "run"
    write(root, layout)
    place = root / layout.pattern
    if layout.refused:
        with pytest.raises(TrajectoryError, match=layout.refused):
            find_run(root)
    found = find_run(place)
    assert len(found.checkpoints) == layout.used
    if place.is_dir():  # who writes a glob has chosen
        accounted = {*found.checkpoints, *found.left_out}
        for file in place.rglob("*"):
            if file.name.endswith(CHECKPOINT_SUFFIXES):
                assert not accounted.isdisjoint([file, *file.parents]), file
    if layout.key is not None:
        with pytest.raises(TrajectoryError, match=f"several state dicts .*{layout.key}.*: choose one"):
            open_or_pack([place], folder=tmp_path / "files")
    trajectory = open_or_pack([place], folder=tmp_path / "files", key=layout.key)
    average = trajectory.trainer_ema()
    assert (average is not None) == layout.average
    if average is not None:
        assert average["net.weight"].unique().tolist() == [STEPS[-1] + 0.5]
    last = trajectory.steps[-1]
    assert trajectory.checkpoint(-1)["net.weight"].unique().tolist() == [float(last)]


@pytest.mark.parametrize("name", ["run{}", "seed_{}", "version_{}", "2026-11-{}"])
def test_folders_of_several_runs_are_no_series(tmp_path, name):
    for number in (11, 12, 13):
        saved(tmp_path / name.format(number) / "model.pt", weights(number))
    with pytest.raises(TrajectoryError, match="No checkpoint in"):
        find_run(tmp_path)


@pytest.mark.parametrize("is_told_apart", [True, False])
def test_averages_in_a_list_are_named_though_safetensors_sorts_names(tmp_path, caplog, is_told_apart):
    """As Accelerate saves diffusers' ``EMAModel``: its list is in the order of ``parameters()``."""
    caplog.set_level("INFO", logger="lcsc_opt")
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (4, 4), "down": (4, 4), "scale": (4,), "bias": (4,)}  # in the network's order
    last = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if not is_told_apart:
        last["up"] = last["down"] + 0.02  # between which the average of the latter lies
    for step in STEPS:
        moved = {name: tensor + (300 - step) / 1000 for name, tensor in last.items()}
        saved(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors", moved)
        averages = [tensor + 0.01 for tensor in moved.values()]
        saved(tmp_path / "run" / f"checkpoint-{step}" / "custom_checkpoint_0.pkl", {"shadow_params": averages})
    average = open_or_pack([tmp_path / "run"], folder=tmp_path / "files").trainer_ema()
    if is_told_apart:
        assert average is not None
        for name, tensor in last.items():
            torch.testing.assert_close(average[name], tensor + 0.01)
    else:
        assert average is None
    assert ("cannot be told apart: give" in caplog.text) == (not is_told_apart)


def test_one_line_names_what_is_left_out_and_why(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    write(tmp_path, LAYOUTS["Lightning, with last and best"])
    write(tmp_path, LAYOUTS["Accelerate with torch-ema"])
    find_checkpoints(tmp_path)
    (line,) = caplog.messages
    assert "3 checkpoints" in line
    assert "3 checkpoint-*/optimizer.bin" in line
    assert "checkpoints/last.ckpt" in line


@pytest.mark.parametrize("key", [None, "model", "model.net"])
def test_an_average_is_found_by_an_outer_key_of_the_weights_too(tmp_path, key):
    for step in STEPS:
        average = {name: tensor + 1 for name, tensor in weights(step).items()}
        saved(tmp_path / f"run/{step}.pt", {"model": {"net": weights(step)}, "ema": {"shadow": average}})
    trajectory = open_or_pack([tmp_path / "run"], folder=tmp_path / "files", key=key)
    last = trajectory.checkpoint(-1)
    kept = trajectory.trainer_ema()
    assert kept is not None
    assert kept.keys() == last.keys()
    for name, tensor in last.items():
        torch.testing.assert_close(kept[name], tensor + 1)


def test_of_raw_weights_and_an_average_the_average_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    write(tmp_path, LAYOUTS["diffusers' folders with the pipeline beside"])
    find_checkpoints(tmp_path)
    (line,) = caplog.messages
    assert "3 checkpoint-*/unet_ema/diffusion_pytorch_model.safetensors" in line
    assert "checkpoint-*/unet/" not in line


def test_an_average_of_another_model_is_none(tmp_path):
    layout = LAYOUTS["Accelerate with torch-ema"]
    write(tmp_path / "run", layout)
    for step in STEPS:
        other = {"shadow_params": [torch.ones(7), torch.ones(2)]}
        saved(tmp_path / "run" / f"checkpoint-{step}/custom_checkpoint_0.pkl", other)
    assert open_or_pack([tmp_path / "run"], folder=tmp_path / "files").trainer_ema() is None


def test_an_average_beside_the_file_that_a_key_names_is_found(tmp_path):
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        saved(folder / "net.pt", raw(step))
        saved(folder / "net_ema.pt", averaged(step))
    average = open_or_pack([tmp_path / "run"], folder=tmp_path / "files", key="net").trainer_ema()
    assert average is not None
    assert average["net.weight"].unique().tolist() == [STEPS[-1] + 0.5]


def test_a_broken_average_is_named_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in STEPS:
        saved(tmp_path / "run" / f"net-{step}.pt", raw(step))
        (tmp_path / "run" / f"net_ema-{step}.safetensors").write_bytes(b"no header of safetensors")
    open_or_pack([str(tmp_path / "run" / "net-*.pt")], folder=tmp_path / "files")
    (line,) = [message for message in caplog.messages if "EMA is left out" in message]
    assert line.count(f"net_ema-{STEPS[-1]}.safetensors") == 1


def test_of_averages_of_several_rates_the_slowest_is_the_trainers(tmp_path):
    rates = {"0.999": 0.1, "0.9999": 0.5}
    for step in STEPS:
        saved(tmp_path / "run" / f"net-0.5b-{step}.pt", raw(step))
        for rate, lag in rates.items():
            saved(tmp_path / "run" / f"net-0.5b_ema_{rate}_{step}.pt", weights(step - lag))
    average = open_or_pack([str(tmp_path / "run" / "net-0.5b-*.pt")], folder=tmp_path / "files").trainer_ema()
    assert average is not None
    assert average["net.weight"].unique().tolist() == [STEPS[-1] - 0.5]


def test_an_average_beside_weights_in_several_files_is_accounted_for(tmp_path):
    folder = tmp_path / "run" / "checkpoint-7"
    file = "model-00001-of-00001.safetensors"
    saved(folder / file, raw(7))
    saved(folder / "model_ema.safetensors", averaged(7))
    index = {"weight_map": dict.fromkeys(raw(7), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_run(tmp_path / "run").left_out == {folder / "model_ema.safetensors": "averages of the weights"}


@pytest.mark.parametrize("content", [b"", b"a part of a file"], ids=["empty", "truncated"])
def test_the_message_names_the_damaged_one_of_several_files(tmp_path, content):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    part, index = folder / "model-00001-of-00001.safetensors", folder / "model.safetensors.index.json"
    part.write_bytes(content)
    index.write_text(json.dumps({"weight_map": {"weight": part.name}}))
    with pytest.raises(TrajectoryError, match=f"^{re.escape(str(part))} is (empty|truncated)"):
        read_checkpoint(folder)
