from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH, Candidate
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import EdmDenoiser, HeunSampler, HeunSchedule, ImageNoise, NetworkSettings
from lcsc_opt.trajectory import pack
from tests.checkpoints.nvlabs_examples import write_snapshot
from tests.objectives.edm_networks import tiny
from tests.objectives.image_objectives import build, check, combined, one_line

KIMG = (100, 200, 300)
NETWORKS = "tests.objectives.edm_networks"
MIX = np.array([0.5, -0.2, 0.7])


def train(folder: Path, **options: Any) -> None:
    for kimg in KIMG:
        write_snapshot(folder / f"network-snapshot-{kimg:06d}.pkl", tiny(kimg, **options))


def edm(folder: Path, **changes: Any) -> MergeSampleScore:
    common = {"checkpoints": "network-snapshot-*.pkl", "network": f"{NETWORKS}:TinyPrecond"}
    return build("edm.py", folder, **{**common, **changes})


def test_snapshots_are_searched(folder: Path) -> None:
    train(folder, width=5)
    objective = edm(folder, sampler={"steps": 4, "rho": 5})
    assert objective.steps == KIMG
    assert objective.sampler.nfe == 7
    check(objective)


def test_the_network_gets_the_merged_weights_and_the_snapshots_arguments(folder: Path) -> None:
    train(folder, width=7)
    images = edm(folder, sampler={"steps": 5}).images(MIX, SEARCH, 8)
    merged = tiny(0, width=7)
    merged.load_state_dict(combined(MIX, [tiny(kimg, width=7) for kimg in KIMG]))
    how: Any = {"noise": ImageNoise(0, (1, 8, 8)), "settings": NetworkSettings(device="cpu")}
    alone = HeunSampler(EdmDenoiser(merged), schedule=HeunSchedule(steps=5), **how)
    with torch.inference_mode():
        assert (alone.sample(SEARCH, 0, 8).clamp(-1, 1) - images).abs().max() < 1e-4


def test_classes_and_a_guide(folder: Path) -> None:
    train(folder, label_dim=3)
    write_snapshot(folder / "guide.pkl", tiny(7, label_dim=3, width=2))
    plain = edm(folder, labels="balanced", sampler={"steps": 4})
    check(plain)
    guided = edm(folder, labels="balanced", sampler={"steps": 4}, guide={"checkpoint": "guide.pkl", "scale": 1.7})
    assert guided.sampler.nfe == 14
    check(guided)
    of_one_class = edm(folder, labels=1, sampler={"steps": 4})
    changed = (of_one_class.images(MIX, SEARCH, 6) - plain.images(MIX, SEARCH, 6)).abs().amax((1, 2, 3))
    classes = plain.sampler.noise.classes(SEARCH, 0, 6)
    assert (changed > 1e-3).tolist() == (classes != 1).tolist()
    unguided = edm(folder, labels="balanced", sampler={"steps": 4}, guide={"checkpoint": "guide.pkl", "scale": 1.0})
    assert torch.allclose(unguided.images(MIX, SEARCH, 6), plain.images(MIX, SEARCH, 6), atol=1e-5)


def test_a_guide_has_the_weights_of_its_checkpoint(folder: Path) -> None:
    """So that the network led away from its own copy is the network itself; and they are in the fingerprint."""
    train(folder)
    guide = {"checkpoint": "network-snapshot-000200.pkl", "scale": 3.0}
    images = [
        edm(folder, sampler={"steps": 4}, **more).images(np.eye(3)[1], SEARCH, 6) for more in ({}, {"guide": guide})
    ]
    assert torch.allclose(images[0], images[1], atol=1e-4)
    described = []
    for seed in (7, 8):
        write_snapshot(folder / "guide.pkl", tiny(seed, width=2))
        described.append(edm(folder, guide={"checkpoint": "guide.pkl", "scale": 1.7}).describe())
    assert described[0] != described[1]


def test_the_gradient_is_in_the_network_and_not_in_its_guide(folder: Path) -> None:
    train(folder)
    guide = {"checkpoint": "network-snapshot-000300.pkl", "scale": 3.0}
    guided = edm(folder, sampler={"steps": 4}, guide=guide)
    before = guided.images(MIX, SEARCH, 6)
    gradient = guided.evaluate(Candidate(MIX, gradient=True)).gradient
    assert gradient is not None
    assert gradient.shape == (3,)
    assert np.abs(gradient).min() > 0
    guided.images(np.eye(3)[0], SEARCH, 6)  # merged into the network; the guide stays
    assert torch.equal(guided.images(MIX, SEARCH, 6), before)


def test_a_guide_of_another_architecture_is_one_line(folder: Path) -> None:
    train(folder)
    torch.save(tiny(7, width=2).state_dict(), folder / "guide.pt")
    one_line(
        ObjectiveError,
        r"guide\.checkpoint: .*guide\.pt .*if it is of another architecture, give guide\.network",
        lambda: edm(folder, arguments={"img_resolution": 8, "img_channels": 1}, guide=OTHER_GUIDE),
    )


OTHER_GUIDE = {
    "checkpoint": "guide.pt",
    "scale": 2.0,
    "arguments": {"img_resolution": 8, "img_channels": 1, "width": 3},
}


def test_packed_checkpoints_need_arguments(folder: Path) -> None:
    train(folder, width=7)
    pack(sorted(folder.glob("*.pkl")), folder / "run.trajectory")
    with pytest.raises(ObjectiveError, match=r"arguments: .*img_resolution.*arguments_from names"):
        edm(folder, checkpoints="run.trajectory")
    said = {"img_resolution": 8, "img_channels": 1, "width": 7}
    expected = edm(folder, sampler={"steps": 3}).images(MIX, SEARCH, 4)
    for more in ({"arguments": said}, {"arguments_from": "network-snapshot-000100.pkl"}):
        objective = edm(folder, checkpoints="run.trajectory", sampler={"steps": 3}, **more)
        assert torch.equal(objective.images(MIX, SEARCH, 4), expected)


def test_half_precision_is_the_networks_own(folder: Path) -> None:
    train(folder)
    whole, half = (edm(folder, dtype=dtype, sampler={"steps": 3}).images(MIX, SEARCH, 4) for dtype in ("fp32", "fp16"))
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=0, atol=0.02)
    with pytest.raises(ObjectiveError, match="dtype: EDM's networks have fp32, and fp16"):
        edm(folder, dtype="bf16")


def test_noise_levels_stay_within_what_the_network_knows(folder: Path) -> None:
    train(folder)
    for levels, expected in (({}, (0.01, 50.0)), ({"sigma_min": 0.02, "sigma_max": 40}, (0.02, 40.0))):
        schedule = edm(folder, network=f"{NETWORKS}:BoundedPrecond", sampler=levels).sampler.schedule  # type: ignore[attr-defined]
        assert (schedule.sigma_min, schedule.sigma_max) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": f"{NETWORKS}:Missing"}, f"network: '{NETWORKS}:Missing' cannot be imported"),
        ({"network": "torch.nn:Conv2d"}, "arguments: torch.nn:Conv2d cannot be made with these"),
        ({"decoder": {"autoencoder": "vae"}}, "decoder: raw_mean and raw_std need 1 values each"),
    ],
)
def test_what_does_not_fit_is_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    train(folder)
    one_line(ObjectiveError, message, lambda: edm(folder, **changes))


def test_reports_also_use_a_second_sampler_of_the_same_network(folder: Path) -> None:
    train(folder)
    objective = edm(folder, sampler={"steps": 2, "also": {"steps": 6}})
    titles = [title.text for title in objective.samples.samplers]
    assert titles == [
        "edm-heun, 3 model calls an image",
        "edm-heun, 11 model calls an image",
    ]
    alone = edm(folder, sampler={"steps": 6})
    assert objective.evaluate(Candidate(MIX, sampler=1)).loss == alone(MIX)
