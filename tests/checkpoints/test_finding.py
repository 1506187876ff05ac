from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.finding import find_checkpoints
from lcsc_opt.checkpoints.order import checkpoint_steps
from tests.checkpoints.checkpoint_examples import saved, write_distributed
from tests.trajectory.trajectory_examples import open_or_pack


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def found(patterns, root, **options):
    return [str(path.relative_to(root)) for path in find_checkpoints(patterns, **options)]


def test_folder_of_files_in_natural_order(tmp_path):
    touch(tmp_path, "model10.pt", "model9.pt", "model100.pt", "log.txt", "progress.csv", ".model7.pt")
    assert found(tmp_path, tmp_path) == ["model9.pt", "model10.pt", "model100.pt"]


def test_states_beside_weights_are_never_checkpoints(tmp_path):
    """The names that openai's code bases, Accelerate, diffusers, transformers, DeepSpeed, NVlabs and ignite write."""
    states = ["opt012345.pt", "opt012346.pt", "optimizer.bin", "optimizer_1.bin", "optimizer.pt", "scheduler.bin"]
    states += ["scheduler.pt", "random_states_0.pkl", "rng_state_1.pth", "training-state-0001000.pt", "scaler.pt"]
    states += ["training_args.bin", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "sampler.bin", "scaler_2.pt"]
    states += ["custom_checkpoint_0.pkl", "lr_scheduler.pt", "optim_100.pt", "dl_state_dict.bin"]
    states += ["opt_checkpoint_epoch=1.pt", "opt_checkpoint_12.pt"]
    weights = ["model012345.pt", "model012346.pt"]
    touch(tmp_path, *states, *weights)
    assert found(tmp_path, tmp_path) == weights
    (tmp_path / "optimizer_7.part").mkdir()  # of a pipeline
    assert found(str(tmp_path / "*.p*"), tmp_path) == weights
    (tmp_path / "optimizer_7.part").rmdir()
    assert found(sorted(tmp_path.iterdir()), tmp_path) == weights  # a shell expanded the glob
    for patterns in (tmp_path / "training-*.pt", [tmp_path / "training-state-0001000.pt"]):
        with pytest.raises(TrajectoryError, match=r"No checkpoint in .* optimizer states are not checkpoints"):
            find_checkpoints(patterns)
        assert found(patterns, tmp_path, key="net") == ["training-state-0001000.pt"]  # the raw weights of EDM
    assert found(str(tmp_path / "*.p*"), tmp_path, key="net") == weights
    for name in ("optimal", "opt-125m", "resampler"):  # which only sound like states
        touch(tmp_path / name, f"{name}_1.pt", f"{name}_2.pt")
        assert found(tmp_path / name, tmp_path / name) == [f"{name}_1.pt", f"{name}_2.pt"]


def test_numbered_folders_with_the_final_model_next_to_them(tmp_path):
    names = ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    touch(tmp_path, *(f"{name}/{file}" for name in names for file in ("model.safetensors", "optimizer.bin")))
    touch(tmp_path, "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "logs/events")
    for patterns in (tmp_path, str(tmp_path / "checkpoint-*"), str(tmp_path / "*")):
        assert found(patterns, tmp_path) == names
    for name in ("checkpoint-10", "unet"):
        assert found(tmp_path / name, tmp_path) == [name]


def test_key_names_the_subfolder(tmp_path):
    touch(tmp_path, *(f"checkpoint-{step}/{name}/model.safetensors" for step in (5, 10) for name in ("unet", "my_ema")))
    for key in (None, "unet", "my_ema"):
        assert found(tmp_path, tmp_path, key=key) == ["checkpoint-5", "checkpoint-10"]
    assert found(str(tmp_path / "*" / "my_ema"), tmp_path) == ["checkpoint-5/my_ema", "checkpoint-10/my_ema"]


def test_nothing_says_what_was_looked_for(tmp_path):
    touch(tmp_path, "notes.txt", "sub/x.pt")
    for patterns, message in (
        (tmp_path, r"No checkpoint in .*checkpoint-N.*notes\.txt"),
        (str(tmp_path / "q*.pt"), r"No checkpoint in .*q\*\.pt"),
        (tmp_path / "nothing.pt", r"nothing\.pt does not exist"),
        ([], "an empty list"),
        ("~nobody-at-all/x.pt", "^~nobody-at-all/x.pt: there is no such home folder; write the whole path$"),
        ("x" * 256, r"xx: cannot be read \(File name too long\); check the path$"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            find_checkpoints(patterns)


def test_torchs_own_recipe_of_distributed_checkpoints(tmp_path):
    """Model and optimizer are one object, ``app``."""
    for step in (10, 20):
        weights = {"w": torch.full((2,), float(step))}
        app = {"model": weights, "optim": {"state": {"w": {"exp_avg": weights["w"]}}}}
        write_distributed(tmp_path / f"checkpoint_{step}", {"app": app})
    trajectory = open_or_pack([tmp_path], folder=tmp_path / "files")
    assert trajectory.metadata["key"] == "app.model"
    assert trajectory.merge([0.5, 0.5])["w"].tolist() == [15.0, 15.0]


@pytest.mark.parametrize("name", ["latest-rank0.pt", "best_epoch=2.pt", "last.pt"])
@pytest.mark.parametrize("is_link", [True, False])
def test_a_copy_of_another_checkpoint_is_left_out(tmp_path, capsys, name, is_link):
    names = [f"ep{epoch}-rank0.pt" for epoch in (1, 2, 3)]
    for epoch, file in enumerate(names):
        saved(tmp_path / file, {"w": torch.full((2,), float(epoch))})
    if is_link:
        (tmp_path / name).symlink_to(tmp_path / names[1])
    else:
        shutil.copyfile(tmp_path / names[1], tmp_path / name)
    assert found(tmp_path, tmp_path) == names
    assert f"{name} (it is {names[1]})" in capsys.readouterr().err


def test_a_folder_of_the_series_without_weights_is_named(tmp_path, capsys):
    """Such as one that was being written, or that a trainer emptied."""
    names = [f"checkpoint-{step}" for step in (5, 10, 20)]
    touch(tmp_path, *(f"{name}/{file}" for name in names for file in ("model.safetensors", "optimizer.bin")))
    touch(tmp_path, "checkpoint-15/optimizer.bin", "samples-15/a.png")
    assert found(tmp_path, tmp_path) == names
    said = capsys.readouterr().err
    assert "checkpoint-15 (without weights)" in said
    assert "3 checkpoint-*/optimizer.bin (states of the training)" in said
    assert "samples" not in said


def test_why_folders_of_a_run_are_no_checkpoints_is_said(tmp_path):
    variants = [f"diffusion_pytorch_model.{variant}.safetensors" for variant in ("ema", "non_ema")]
    touch(tmp_path, *(f"checkpoint-{step}/unet/{name}" for step in (100, 200) for name in variants))
    with pytest.raises(TrajectoryError, match=r"checkpoint-\d00 holds several variants .*in unet"):
        find_checkpoints(tmp_path)
    assert len(found(str(tmp_path / "checkpoint-*/unet/*.ema.safetensors"), tmp_path)) == 2


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["checkpoint1.pt", "checkpoint2.pt", "checkpoint_1_100.pt", "checkpoint_1_200.pt"], ["checkpoint*.pt"]),
        (
            ["hat-000001.pt", "hat-000002.pt", "hat-step00000500.pt", "hat-step00001000.pt"],
            ["hat-*.pt", "hat-step*.pt"],
        ),
        (["ckpt_100.pt", "ckpt_200.pt", "ckpt-1.pt"], ["ckpt_*.pt", "ckpt-*.pt"]),
    ],
    ids=["epochs beside updates", "epochs beside steps", "another separator"],
)
def test_two_patterns_of_names_are_not_one_run(tmp_path, names, patterns):
    for name in names:
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(TrajectoryError, match=r"holds (files of several patterns|several series)") as refused:
        find_checkpoints(tmp_path)
    assert all(str(tmp_path / pattern) in str(refused.value) for pattern in patterns)
    for choice in (tmp_path / patterns[0], f"{tmp_path}/./{patterns[0]}"):
        assert len(find_checkpoints(choice)) == 2  # although it matches others, too


@pytest.mark.parametrize(
    ("inside", "later", "used"), [(40, None, "end"), (40, 50, "later"), (30, None, None), (None, None, None)]
)
def test_of_final_models_the_latest_is_used_if_its_step_is_inside(tmp_path, caplog, inside, later, used):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in (10, 20, 30):
        torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": step}, tmp_path / f"epoch=0-step={step}.ckpt")
    content = {"state_dict": {"w": torch.zeros(2)}}
    torch.save(content if inside is None else {**content, "global_step": inside}, tmp_path / "end.ckpt")
    if later is not None:
        torch.save({**content, "global_step": later}, tmp_path / "later.ckpt")
    found = find_checkpoints(tmp_path)
    assert len(found) == 3 + (used is not None)
    if used is not None:
        assert found[-1].name == f"{used}.ckpt"
    assert ("end.ckpt (not of the series by its name, and not clearly its end by a step inside" in caplog.text) == (
        used != "end"
    )


@pytest.mark.parametrize("average", ["ema_4000.pt", "swa_model_2500.pt"])
def test_an_average_is_not_the_end_of_a_run_although_its_step_is_later(tmp_path, average):
    for name in ("model_1000.pt", "model_2000.pt", average):
        step = int("".join(filter(str.isdigit, name)))
        torch.save({"model": {"w": torch.ones(2) * step}, "step": step}, tmp_path / name)
    assert found(tmp_path, tmp_path) == ["model_1000.pt", "model_2000.pt"]


def test_a_file_whose_series_has_no_other_is_no_series(tmp_path, capsys):
    """As MONAI's CheckpointSaver leaves: epochs, the last iteration, and the best ones by a metric."""
    epochs = [f"checkpoint_epoch={epoch}.pt" for epoch in range(1, 21)]
    others = ["checkpoint_final_iteration=8000.pt", "checkpoint_key_metric=-0.0312.pt"]
    for name in [*epochs, *others]:
        torch.save({"net": {"w": torch.ones(2)}}, tmp_path / name)
    assert found(tmp_path, tmp_path) == epochs
    said = capsys.readouterr().err
    why = "not of the series by its name, and not clearly its end by a step inside: give it a number, as theirs"
    assert f"{', '.join(others)} ({why})" in said
    for name in ("ema_epoch=1.pt", "ema_epoch=2.pt"):  # but two files are
        torch.save({"net": {"w": torch.ones(2)}}, tmp_path / name)
    with pytest.raises(TrajectoryError, match="several series"):
        find_checkpoints(tmp_path)


@pytest.mark.parametrize("strays", ["epoch={0}-step={1}.ckpt", "model_{1}.pt"])
def test_files_beside_more_folders_are_asked_about(tmp_path, strays):
    """As a crash or a callback leaves them."""
    for epoch in range(1, 9):
        saved(
            tmp_path / f"epoch={epoch}-step={12 * epoch}" / "model.pt", {"model": {"w": torch.full((2,), epoch * 1.0)}}
        )
    for epoch in (3, 7):
        saved(tmp_path / strays.format(epoch, 12 * epoch), {"model": {"w": torch.full((2,), epoch * 1.0)}})
    with pytest.raises(TrajectoryError, match=r"several series of checkpoints: .*epoch=\*-step=\* \(8\)"):
        find_checkpoints(tmp_path)
    chosen = find_checkpoints(f"{tmp_path}/epoch=*-step=*[0-9]")
    assert checkpoint_steps(chosen) == [12 * epoch for epoch in range(1, 9)]


def test_a_smaller_series_above_a_larger_one_is_asked_about(tmp_path):
    for step in range(1, 6):
        saved(tmp_path / "checkpoints" / f"model_{step}.pt", {"w": torch.full((2,), step * 1.0)})
    for step in (1, 2):
        saved(tmp_path / f"old_{step}.pt", {"w": torch.full((2,), step * 1.0)})
    with pytest.raises(
        TrajectoryError, match=r"several series of checkpoints: .*checkpoints \(5\), .*old_\*\.pt \(2\)"
    ):
        find_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["epoch={0}-step={1}/model.pt", "ppo_{1}_steps/policy.pt", "out_{1}/part/net.pt"])
@pytest.mark.parametrize("pattern", ["", "*", "files"])
def test_a_step_is_read_wherever_the_number_of_a_folder_changes(tmp_path, name, pattern):
    for epoch in range(1, 9):
        saved(tmp_path / name.format(epoch, 12 * epoch), {"model": {"w": torch.full((2,), epoch * 1.0)}})
    if pattern == "files":
        pattern = "*/" + name.partition("/")[2]
    steps = checkpoint_steps(find_checkpoints(f"{tmp_path}/{pattern}"))
    assert steps == [12 * epoch for epoch in range(1, 9)]
