"""Training steps and series: from names, from metadata, and from inside of files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.finding import find_checkpoints
from lcsc_opt.checkpoints.names import read_names
from lcsc_opt.checkpoints.order import checkpoint_steps
from lcsc_opt.trajectory.sources import find_sources
from tests.trajectory.trajectory_examples import state_dict


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("model012345.pt", 12345),
        ("ema_0.9999_010000.pt", 10000),
        ("epoch=3-step=2000.ckpt", 2000),
        ("edm2-img512-xs-2147483-0.135.pkl", 2147483),
        ("ema_0.9999.pt/model7", 7),
        ("checkpoint-70/unet/diffusion_pytorch_model.safetensors.index.json", 70),
        ("ckpts/5000.ckpt/nnet_ema.pth", 5000),
    ],
)
def test_step_in_the_name(name, step):
    assert checkpoint_steps([Path(name)])[0] == step


def test_step_in_the_metadata_comes_first(tmp_path):
    path = tmp_path / "lora-000004.safetensors"
    save_file(state_dict(1), path, metadata={"ss_steps": "800"})
    assert checkpoint_steps([path])[0] == 800
    save_file(state_dict(1), path, metadata={"step": "9", "ss_steps": "800"})
    assert checkpoint_steps([path])[0] == 9
    save_file(state_dict(1), path, metadata={"step": "unknown"})
    assert checkpoint_steps([path])[0] == 4


@pytest.mark.parametrize(
    "name", ["model.pt", "run7/final.pt", "unet/diffusion_pytorch_model.safetensors", "ema_0.9999.pt"]
)
def test_no_step_asks_for_steps(name):
    with pytest.raises(TrajectoryError, match="--steps"):
        checkpoint_steps([Path(name)])[0]


def test_step_inside_the_file_comes_before_a_number_in_the_name(tmp_path):
    """Old versions of Lightning name the file after the step before, and people rename files."""
    path = tmp_path / "step=10.ckpt"
    for name in ("global_step", "step", "iteration"):
        torch.save({name: 4321, "optimizer": {"step": 7}, "state_dict": state_dict(1)}, path)
        assert checkpoint_steps([path])[0] == 4321
    tensors = (torch.ones(3), torch.tensor([70]), torch.tensor(70.5), torch.tensor(True), torch.tensor(-3))
    for value in (True, -1, 2.5, *tensors):  # which is no step
        torch.save({"step": value, "model": state_dict(1)}, path)
        assert checkpoint_steps([path])[0] == 10


def test_step_inside_the_weights_counts_beside_a_state_that_tells_none(tmp_path):
    torch.save({"global_step": 70, "state_dict": state_dict(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "trainer_state.json").write_text("{}")
    assert checkpoint_steps([tmp_path])[0] == 70


@pytest.mark.parametrize(
    "step",
    [torch.tensor(70), torch.tensor(70, dtype=torch.int32), torch.tensor(70.0), 70.0],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_step_inside_may_be_a_whole_number_of_any_type(tmp_path, step, protocol):
    content = {"step": step, "initted": torch.tensor(True), **state_dict(1)}
    torch.save(content, tmp_path / "model5.pt", pickle_protocol=protocol)
    assert checkpoint_steps([tmp_path / "model5.pt"])[0] == 70


@pytest.mark.parametrize(
    ("name", "series", "pattern"),
    [
        ("final.pt", "final", "final.pt"),
        ("model012345.pt", "model", "model*.pt"),
        ("ema_0.9999_012345.pt", "ema_0.9999", "ema_0.9999_*.pt"),
        ("network-snapshot-0002500-0.050.pkl", "network-snapshot-0.050", "network-snapshot-*-0.050.pkl"),
        ("epoch=4-step=3000-val_loss=0.25.ckpt", "step", "epoch=*-step=*-val_loss=*.ckpt"),
        ("model_100_fp16.safetensors", "model_fp16", "model_*_fp16.safetensors"),
        ("checkpoint-500/unet", "checkpoint/unet", "checkpoint-*/unet"),
        ("checkpoint-500/unet_ema/net.bin", "checkpoint/unet_ema/net", "checkpoint-*/unet_ema/net.bin"),
        ("5000.ckpt/nnet_ema.pth", "step/nnet_ema", "*.ckpt/nnet_ema.pth"),
        ("stage1-step-40000", "stage1", "stage1-step-*"),
        ("0.9999/model50.pt", "model", "model*.pt"),
    ],
)
def test_series_is_the_name_without_what_changes_and_its_glob_matches_it(name, series, pattern):
    for path in (Path(name), Path("some/run7") / name):
        named = read_names([path])[0]
        assert named.series == series
        assert named.glob.endswith(pattern)
        assert path.match(named.glob)


def test_a_name_tells_the_same_from_within_its_numbered_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-500" / "unet"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for path in (Path("model.pt"), folder / "model.pt"):
        pattern = str(tmp_path / "checkpoint-*" / "unet" / "model.pt")
        assert read_names([path])[0][:3] == ((500,), "checkpoint/unet/model", pattern)
    monkeypatch.chdir(tmp_path)
    assert read_names([Path("checkpoint-500/unet/model.pt")])[0].glob == "checkpoint-*/unet/model.pt"


@pytest.mark.parametrize(
    ("final", "names"),
    [
        ("hat_v2", ["hat_v2-000001", "hat_v2-000002"]),  # kohya's epochs
        ("hat", ["hat-step00000100", "hat-step00000200"]),
        ("hat", ["hat_000000100", "hat_000000200"]),  # ai-toolkit's
    ],
)
def test_the_last_file_of_a_loras_training_is_its_last_epoch(
    tmp_path: Path, final: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def save(name: str, metadata: dict[str, str] | None) -> None:
        number = names.index(name) if name in names else len(names)
        save_file(state_dict(number), tmp_path / f"{name}.safetensors", metadata=metadata)

    for number, name in enumerate(names, start=1):
        save(name, {"ss_steps": str(100 * number)})
    expected = [tmp_path / f"{name}.safetensors" for name in names]
    for metadata in ({"ss_steps": "300"}, {"training_info": '{"step": 300, "epoch": 3}'}):
        save(final, metadata)
        assert find_checkpoints(tmp_path) == [*expected, tmp_path / f"{final}.safetensors"]
        assert checkpoint_steps([tmp_path / f"{final}.safetensors"])[0] == 300
    for no_later in (None, {"ss_steps": "200"}):
        save(final, no_later)
        assert find_checkpoints(tmp_path) == expected
        assert (
            "(not of the series by its name, and not clearly its end by a step inside: give it a number, as theirs)"
            in capsys.readouterr().err
        )

    for path in tmp_path.iterdir():  # as sd-scripts leave them with --no_metadata
        save(path.stem, None)
    assert find_checkpoints(tmp_path) == [*expected, tmp_path / f"{final}.safetensors"]
    *numbers, last = checkpoint_steps(find_checkpoints(tmp_path))
    assert last == numbers[-1] + (numbers[-1] - numbers[-2])
    assert (
        f"{final}.safetensors has no step inside, and is by its name the end of the others" in capsys.readouterr().err
    )
    save("average", None)
    assert tmp_path / "average.safetensors" not in find_checkpoints(tmp_path)
    shutil.copy(expected[-1], tmp_path / f"{final}.safetensors")
    assert find_checkpoints(tmp_path) == expected, "a copy of the last epoch is none of its own"


def _written(folder: Path, contents: Mapping[str, Mapping[str, object]]) -> list[Path]:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": state_dict(1), **content}, folder / name)
    return [folder / name for name in contents]


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["epoch_1_fid_80.pt", "epoch_2_fid_45.pt", "epoch_3_fid_30.pt"], [1, 2, 3]),
        (["model_5_acc91.pt", "model_10_acc93.pt"], [5, 10]),
        (["epoch_1_500.pt", "epoch_1_1000.pt", "epoch_2_1500.pt"], [500, 1000, 1500]),
        (["checkpoint.25.pt", "checkpoint.100.pt"], [25, 100]),
        (["ema.0.999.25.pt", "ema.0.999.50.pt"], [25, 50]),
        (["checkpoint-1.pth.tar", "checkpoint-10.pth.tar"], [1, 10]),
        (["model_2_20.pt.tar", "model_2_30.pt.tar"], [20, 30]),
        (["model_500k.pt", "model_1.5M.pt", "model_2M.pt"], [500_000, 1_500_000, 2_000_000]),
        (["gpt2-124M-10k.pt", "gpt2-124M-20k.pt"], [10_000, 20_000]),
        (["net-500ksteps.pt", "net-1Msteps.pt"], [500_000, 1_000_000]),
        (["checkpoint_1_500.pt", "checkpoint_1_1000.pt", "checkpoint_2_1500.pt"], [500, 1000, 1500]),  # fairseq
        (["run_2024-01-30_7.pt", "run_2024-02-01_9.pt"], [7, 9]),
        (["20240130-121530-step7.pt", "20240130-131530-step9.pt"], [7, 9]),
        (["global_step100/mp_rank_00_model_states.pt", "global_step200/mp_rank_00_model_states.pt"], [100, 200]),
        (["checkpoint-5/model_0.pt", "checkpoint-6/model_0.pt"], [5, 6]),
        (["model_1e4.pt", "model_2e4.pt", "model_5e4.pt", "model_1e5.pt"], [10_000, 20_000, 50_000, 100_000]),
        (["1e3.pt", "2e3.pt", "10e3.pt"], [1000, 2000, 10_000]),
        (["m_500.pt", "m_1e3.pt", "m_1.25e3.pt", "m_1.5e+04.pt"], [500, 1000, 1250, 15_000]),
        (["m-step1E4.pt", "m-step1.5E4.pt"], [10_000, 15_000]),
        (["ema_0.9999_1e4steps.pt", "ema_0.9999_2e4steps.pt"], [10_000, 20_000]),
        (["checkpoint-1e3/model.pt", "checkpoint-2e3/model.pt"], [1000, 2000]),
        (["model_1,000.pt", "model_2,000.pt", "model_10,000.pt"], [1000, 2000, 10_000]),
        (["model_500.pt", "model_1,000.pt", "model_1,000,000.pt"], [500, 1000, 1_000_000]),
        (["step=1,000.pt", "step=1,500.pt"], [1000, 1500]),
        (["model_7_loss2.5e-3.pt", "model_9_loss1e-2.pt"], [7, 9]),
        # other numbers than a power of ten or thousands
        (["v1e3.pt", "v1e4.pt"], [3, 4]),
        (["lr1e-4_7.pt", "lr1e-4_9.pt"], [7, 9]),
        (["net_1e4f9a_7.pt", "net_1e4f9a_9.pt"], [7, 9]),
        (["m_1,2,3.pt", "m_1,2,4.pt"], [3, 4]),
        (["m_512_768_7.pt", "m_512_768_9.pt"], [7, 9]),
        (["epoch_1_000100.pt", "epoch_1_000200.pt"], [100, 200]),
        (["x_100_200.pt", "x_100_300.pt"], [200, 300]),
        (["0001_000.pt", "0002_000.pt"], [1, 2]),
    ],
)
def test_the_step_is_the_number_that_differs_between_the_names(tmp_path, names, steps):
    paths = _written(tmp_path, {name: {} for name in names})
    assert checkpoint_steps(find_checkpoints(paths)) == steps


@pytest.mark.parametrize("names", [["checkpoint_1_4000.pt", "checkpoint_2_8000.pt"], ["m-3-45.pt", "m-4-30.pt"]])
def test_two_numbers_that_may_be_the_step_are_a_question_unless_the_files_answer_it(tmp_path, names):
    with pytest.raises(TrajectoryError, match=r"not clear which number.*\((2 or 8000|4 or 30)\).*--steps"):
        checkpoint_steps(find_checkpoints(_written(tmp_path, {name: {} for name in names})))
    by_epoch = {name: {"epoch": epoch} for epoch, name in zip((2, 1), names, strict=True)}
    if "m-3-45.pt" in names:  # the other number falls with the epoch
        assert checkpoint_steps(_written(tmp_path, by_epoch)) == [45, 30]
    by_step = {name: {"global_step": step} for step, name in zip((70, 80), names, strict=True)}
    assert checkpoint_steps(_written(tmp_path, by_step)) == [70, 80]


@pytest.mark.parametrize("other", ["target_model", "ema_0.99", "model_ema"])
def test_series_of_a_list_are_told_apart_as_those_of_a_folder_are(tmp_path, other):
    folder = tmp_path / "run[1]"
    paths = _written(folder, {f"{name}_{step}.pt": {} for name in ("model", other) for step in (10, 20)})
    for patterns in (folder, paths):
        with pytest.raises(TrajectoryError, match="several series") as refusal:
            find_checkpoints(patterns)
        choices = re.findall(r"(\S+) \(2\)", str(refusal.value))
        assert [Path(choice).name for choice in choices] == sorted(["model_*.pt", f"{other}_*.pt"])
        for choice in choices:
            assert len(find_checkpoints(choice)) == 2
    assert len(find_checkpoints(paths, has_steps=True)) == 4


@pytest.mark.parametrize(
    "contents",
    [
        {f"epoch{epoch}_step{step}.pt": {} for epoch, step in ((1, 300), (1, 900), (2, 200), (2, 500))},
        {f"save_{place}.pt": {"epoch": 1 + place // 2, "step": (300, 900, 200)[place]} for place in range(3)},
        {f"epoch_{epoch}.pt": {"epoch": epoch, "step": step} for epoch, step in ((1, 100), (2, 98), (3, 101))},
        {f"save_{place}.pt": {"step": torch.tensor(step)} for place, step in enumerate((300, 900, 200))},
        {f"best_{metric}.pt": {"epoch": epoch} for epoch, metric in ((1, 80), (2, 45))},
    ],
    ids=["in the names", "inside", "batches of an epoch", "of a restart", "a metric in the names"],
)
def test_steps_that_another_clue_contradicts_are_a_question(tmp_path, contents):
    """They begin again in each epoch, or in a run that was started again."""
    paths = find_checkpoints(_written(tmp_path, contents))
    with pytest.raises(TrajectoryError, match=r"are in different orders.*give their steps"):
        checkpoint_steps(paths)
    assert [*find_sources(paths, range(1, 1 + len(paths)))] == [*range(1, 1 + len(paths))]
