"""What must hold on every accelerator, the pretend one or this machine's; ``test_accelerators.py`` runs this."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lcsc_opt
from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import ObjectiveError, TrajectoryError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate, Yardstick
from lcsc_opt.base.study_spec import ObjectiveSpec, Rule
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics.extractors.base import FeatureExtractor, image_gradient
from lcsc_opt.metrics.extractors.published import ClipExtractor, DinoV2Extractor, InceptionExtractor
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling.batch_norm import BatchNormStatistics
from lcsc_opt.sampling.latents import DecoderSettings, LatentDecoder
from lcsc_opt.training import preparing
from lcsc_opt.training.recipes import RECIPES, Batch
from lcsc_opt.training.trainer import Training
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter, placement
from tests.accelerators import pretend
from tests.accelerators.pretend import COUNTS, Options, slow
from tests.accelerators.small_objective import Network, largest_batches, small
from tests.metrics import network_files
from tests.objectives import test_edm, test_latent_diffusion_objective
from tests.objectives.image_objectives import PIXELS
from tests.training.toy_network import IMAGES, ToyNetwork
from tests.trajectory.trajectory_examples import COMBINED, STEPS, make_trajectory, same_bits, state_dict

ROOT = Path(__file__).parents[2]
DEVICE = torch.device(accelerator.names()[0])
pretended = pytest.mark.skipif(DEVICE.type != "pretend", reason="counts, or changes, what the device does")
K = len(STEPS)
ROW = np.array([0.5, -0.25, 1.0, 0.0, -0.25])


@pytest.fixture(autouse=True)
def new_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in vars(Options).items():
        if not name.startswith("_"):
            monkeypatch.setattr(Options, name, value)
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")
    accelerator.has_float64.cache_clear()
    accelerator.widens_products.cache_clear()
    torch.accelerator.synchronize()
    COUNTS.clear()
    yield
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()


@pytest.fixture
def trajectory(tmp_path: Path) -> Trajectory:
    return make_trajectory(tmp_path / "run.trajectory")


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "READ_BYTES", 2**14)


@pytest.fixture
def large(tmp_path: Path, small_reads: None) -> Trajectory:
    """Six checkpoints that are streamed in many pieces."""
    with TrajectoryWriter(tmp_path / "large.trajectory") as writer:
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            writer.append(step, {name: torch.randn(150, 200, generator=generator) for name in "ab"})
    return Trajectory.open(tmp_path / "large.trajectory")


def close(found: Any, expected: Any) -> None:
    for name, tensor in expected.items():
        assert found[name].device == DEVICE
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-5, atol=1e-5)


# devices


@pretended
def test_every_device_that_torch_sees_can_be_named() -> None:
    assert accelerator.find("auto") == torch.device("pretend")
    assert accelerator.find("pretend:1") == torch.device("pretend:1")
    with pytest.raises(ObjectiveError, match="expected auto or one of cpu, pretend:0, pretend:1"):
        accelerator.find("pretend:2")
    assert accelerator.environments(1, ["pretend:1"]) == [{"PRETEND_VISIBLE_DEVICES": "1"}]
    assert accelerator.environments(2) == [{"PRETEND_VISIBLE_DEVICES": "0"}, {"PRETEND_VISIBLE_DEVICES": "1"}]


@pretended
def test_devices_are_not_mixed() -> None:
    here, there = torch.ones(2), torch.ones(2, device=DEVICE)
    for other in (here, torch.ones(2, device="pretend:1")):
        with pytest.raises(RuntimeError, match="to be on the same device"):
            there + other
    assert (there * torch.tensor(3.0)).tolist() == [3.0, 3.0]  # a number may come from anywhere


# trajectories


@pytest.mark.parametrize("how", ["resident", "streamed"])
def test_merges_are_those_of_the_cpu(trajectory: Trajectory, how: Any) -> None:
    placed = trajectory.on(DEVICE, how=how)
    close(placed.merge(ROW), trajectory.merge(ROW))
    one = placed.merge(np.eye(K)[2])
    assert same_bits({name: tensor.cpu() for name, tensor in one.items()}, trajectory.checkpoint(2))
    gradients = {name: torch.ones(state_dict(1)[name].shape) for name in COMBINED}
    there = {name: tensor.to(DEVICE) for name, tensor in gradients.items()}
    np.testing.assert_allclose(placed.project(there), trajectory.project(gradients), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["resident", "streamed"])
def test_a_merge_is_finished_when_it_returns_and_its_memory_is_the_callers(large: Trajectory, how: Any) -> None:
    """The caller reads on a stream of its own, frees, and merges the next one at once."""
    rows = np.random.default_rng(0).dirichlet(np.ones(6), size=6)
    expected = [large.merge(row) for row in rows]
    network = {name: torch.empty_like(tensor, device=DEVICE) for name, tensor in expected[0].items()}
    with slow(0.01):
        placed = large.on(DEVICE, how=how)
    kept = []
    for row in rows:
        weights = placed.merge(row)
        with slow(0.02):
            for name in network:
                network[name].copy_(weights.pop(name))  # queued: the device has not begun
        kept.append({name: tensor.clone() for name, tensor in network.items()})
    for found, wanted in zip(kept, expected, strict=True):
        close(found, wanted)


def test_several_threads_merge_at_once_and_are_back_on_their_own_streams(large: Trajectory) -> None:
    placed, rows = large.on(DEVICE), np.random.default_rng(0).dirichlet(np.ones(6), size=12)

    def merged(row: Any) -> bool:
        own = torch.Stream(DEVICE)
        torch.accelerator.set_stream(own)
        close(placed.merge(row), large.merge(row))
        return bool(torch.accelerator.current_stream(DEVICE) == own)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(merged, rows))


OWN_OBJECTIVE = """
from lcsc_opt.base import accelerator
from lcsc_opt.objective.contract import CoefficientFunction
from lcsc_opt.trajectory import Trajectory

def build(settings, context):
    trajectory = Trajectory.open("run.trajectory").on(accelerator.find("auto"))
    objective = CoefficientFunction(lambda coefficients: 1.0, trajectory.steps, name="own")
    objective.trajectory = trajectory
    return objective
"""


def test_a_model_that_was_merged_there_is_given_to_its_user_on_the_cpu(
    trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN_OBJECTIVE)
    study = {"name": "own", "objective": {"file": "own.py"}, "optimizers": ["LCSC"], "budget": {"evaluations": 1}}
    [found] = lcsc_opt.run(study)
    close(found.objective.trajectory.merge(ROW), trajectory.merge(ROW))  # type: ignore[union-attr]
    assert {tensor.device.type for tensor in found.merge(ROW).values()} == {"cpu"}


@pretended
def test_what_does_not_fit_is_streamed_through_little_memory(
    large: Trajectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Options, "memory", large.nbytes)
    placed = large.on(DEVICE)
    assert "are streamed for each merge" in capsys.readouterr().err
    assert COUNTS["out_of_memory"] == 0, "it was tried"
    close(placed.merge(np.full(6, 1 / 6)), large.merge(np.full(6, 1 / 6)))
    assert COUNTS["to_device"] - COUNTS["meanwhile"] == 1  # the coefficients


@pretended
def test_a_device_without_float64_is_served_by_the_cpu(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Options, "float64", False)
    assert all(tensor.device.type == "cpu" for tensor in trajectory.on(DEVICE).merge(ROW).values())
    with TrajectoryWriter(trajectory.path) as writer:
        writer.append(
            600,
            {n: t.to(DEVICE) for n, t in state_dict(600).items() if n != "double"}
            | {"double": state_dict(600)["double"]},
            wait=False,
        )
    assert same_bits(Trajectory.open(trajectory.path).checkpoint(5), state_dict(600))


@pretended
def test_statistics_of_batch_normalization_need_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 5

    def estimated(device: torch.device) -> dict[str, torch.Tensor]:
        network = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).to(device).eval()
        batches = data.to(device).split(16)
        varying = {"0.running_mean"}
        statistics = BatchNormStatistics(network, lambda: [network(batch) for batch in batches], varying)
        statistics.estimate()
        return dict(statistics.values())

    expected = estimated(accelerator.CPU)
    monkeypatch.setattr(Options, "float64", False)
    torch.testing.assert_close(estimated(DEVICE), expected)


def test_the_map_is_not_for_a_device(trajectory: Trajectory) -> None:
    with pytest.raises(TrajectoryError, match=f"cannot be mapped into {DEVICE}: choose 'resident' or 'streamed'"):
        trajectory.on(DEVICE, how="mapped")


# saving while training


def test_weights_may_change_right_after_append(tmp_path: Path) -> None:
    weight, count = torch.zeros(500, 300, device=DEVICE), torch.tensor(0, device=DEVICE)
    wanted = []
    with TrajectoryWriter(tmp_path / "t") as writer:
        for step in range(1, 6):
            weight.copy_(torch.randn(500, 300))
            count.fill_(step)
            wanted.append({"w": weight.cpu().t(), "n": count.cpu()})
            COUNTS.clear()
            writer.append(step, {"w": weight.t(), "n": count}, wait=False)
            assert not COUNTS["waits of the main thread"], "the loop waited"
            weight.fill_(99)
    found = Trajectory.open(tmp_path / "t")
    assert all(same_bits(found.checkpoint(index), tensors) for index, tensors in enumerate(wanted))


# objectives


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for step in (10, 20, 30):
        torch.manual_seed(step)
        torch.save({"model": Network().state_dict()}, tmp_path / f"model{step:06d}.pt")
    return tmp_path


def edm(device: str, folder: Path) -> MergeSampleScore:
    test_edm.train(folder, width=3)
    return test_edm.edm(folder, sampler={"steps": 2}, device=device)


def latents(device: str, folder: Path) -> MergeSampleScore:
    place = folder / "latents"
    if not place.exists():
        place.mkdir()
        test_latent_diffusion_objective.train(place)
    return test_latent_diffusion_objective.objective(
        place, images=4, batch_size=4, sampler={"name": "lcm", "steps": 1}, device=device
    )


def scored(device: str, folder: Path) -> Objective:
    own = {
        name: f"tests.accelerators.small_objective:{word}" for name, word in (("model", "Network"), ("score", "score"))
    }
    settings: dict[str, Any] = {"checkpoints": "model*.pt", **own, "device": device}
    return load_objective(ObjectiveSpec(file="score.py", settings=settings), BuildContext(folder))


@pytest.mark.usefixtures("few_of_average")
@pytest.mark.parametrize("made", [small, edm, latents, scored])
def test_an_objective_has_the_loss_and_the_gradient_of_the_cpu(folder: Path, made: Any) -> None:
    here, there = made("cpu", folder), made(DEVICE.type, folder)
    first, second = (Candidate(ema_coefficients(here.steps, rate)) for rate in (0.9, 0.5))
    expected, found = (one.evaluate(dataclasses.replace(first, gradient=True)) for one in (here, there))
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=2e-3, atol=1e-5)
    assert there.evaluate(second).loss == pytest.approx(here.evaluate(second).loss, rel=1e-4)


def test_a_model_that_was_trained_here_is_searched_on_the_device(folder: Path) -> None:
    out = folder / "run.trajectory"
    preparing.run(Training(preparing.parse_recipe("ddpm", {}), "digits", out, steps=2, checkpoint_every=1))
    loss = {"fdr": ["inception", "pixels"]}  # few features, so that images would be the larger part
    settings: dict[str, Any] = {"checkpoints": str(out), "images": 65, "batch_size": 65, "nfe": 2, "loss": loss}
    objective = load_objective(ObjectiveSpec(file="trained.py", settings=settings), BuildContext())
    first, second = (ema_coefficients(objective.steps, rate) for rate in (0.5, 0.7))
    objective.evaluate(Candidate(first))
    COUNTS.clear()
    evaluation = objective.evaluate(Candidate(second, gradient=True))
    assert evaluation.gradient is not None
    assert np.isfinite([evaluation.loss, *evaluation.gradient]).all()
    assert COUNTS["to_host_bytes"] < 70 * 8 * 8 * 4 + 70 * 64 * 8, "images were taken to the host"


@pytest.mark.parametrize("name", ["inception", "clip", "dinov2"])
def test_a_published_extractor_has_the_features_and_the_gradient_of_the_cpu(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[FeatureExtractor]
    if name == "inception":
        monkeypatch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE", 80
        )
        torch.save(network_files.random_inception().state_dict(), folder / "inception.pth")
        built = [InceptionExtractor(folder / "inception.pth", device=device) for device in ("cpu", DEVICE.type)]
    elif name == "clip":
        network_files.write_clip(folder / "clip.pt")
        built = [ClipExtractor(folder / "clip.pt", device=device) for device in ("cpu", DEVICE.type)]
    else:
        network_files.random_dinov2().save_pretrained(folder / "dinov2")
        built = [DinoV2Extractor(folder / "dinov2", device=device) for device in ("cpu", DEVICE.type)]
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (expected, gradient), (found, there) = (
        (one(images.to(at)).cpu(), image_gradient(one, images.to(at), torch.ones(2, one.dimension)).cpu())
        for one, at in zip(built, ("cpu", DEVICE.type), strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there, gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()))


def test_what_is_kept_and_every_metric_agree_with_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.metrics.distances.SUBSETS", 3)
    images = np.random.default_rng(0).integers(90, 170, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images)
    pixels = PIXELS.partition("@")[2]
    metrics = [f"{name}@{pixels}" for name in ("kid", "precision", "recall", "near")]
    how = {"reference": "images.npz", "metrics": metrics, "keep": "precision"}
    values = {f"{name}@{pixels}": 1.0 for name in ("fid", "precision", "hinge")}
    yardstick = Yardstick(values, kept=f"precision@{pixels}", sign=-1, bound=1.0, deviation=0.5)
    candidate = Candidate(ema_coefficients((10, 20, 30), 0.8), yardstick=yardstick)
    found, expected = (small(device, folder, **how).evaluate(candidate) for device in (DEVICE.type, "cpu"))
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-6)


@pretended
def test_the_automatic_batch_size_follows_the_memory_also_in_the_middle_of_a_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate, sizes = Candidate(ema_coefficients((10, 20, 30), 0.8)), []
    expected = small("cpu", folder).evaluate(candidate).loss
    gc.collect()
    for memory in (20_000, 2**20):
        monkeypatch.setattr(Options, "memory", pretend.used(0) + memory)  # what tests before have left stays
        objective = small("pretend", folder, batch_size="auto")
        assert objective.evaluate(candidate).loss == pytest.approx(expected, rel=1e-4)
        assert COUNTS["out_of_memory"] > 0 or memory == 2**20
        largest_batches()
        objective.evaluate(candidate)
        sizes.append(largest_batches()[0])
        COUNTS.clear()
    assert sizes[0] < sizes[1] == 24
    torch.accelerator.empty_cache()
    monkeypatch.setattr(Options, "memory", pretend.used(0) + 8_000)  # others take the rest
    assert objective.evaluate(candidate).loss == pytest.approx(expected, rel=1e-4)
    assert COUNTS["out_of_memory"] > 0
    largest_batches()
    objective.evaluate(candidate)
    assert largest_batches()[0] < sizes[1]


@pretended
def test_batches_grow_with_the_memory_that_is_free_and_losses_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate, sizes = Candidate(ema_coefficients((10, 20, 30), 0.8), gradient=True), []
    expected: Any = small("cpu", folder, images=200).evaluate(candidate)
    gc.collect()
    for memory in (2**18, 2**19, 2**24):
        monkeypatch.setattr(Options, "memory", pretend.used(0) + memory)
        objective = small("pretend", folder, batch_size=None, images=200)
        for _ in range(2):
            largest_batches()
            found: Any = objective.evaluate(candidate)
            assert found.loss == pytest.approx(expected.loss, rel=1e-4)
            np.testing.assert_allclose(found.gradient, expected.gradient, rtol=2e-3, atol=1e-5)
        sizes.append(max(largest_batches()))
    assert COUNTS["out_of_memory"] == 0
    assert 16 < sizes[0] < sizes[1] <= sizes[2] == 200


@pretended
def test_numbers_that_settings_give_stay_what_they_are(folder: Path) -> None:
    objective = small("pretend", folder, batch_size=5, gradient_batch_size=2)
    largest_batches()
    objective.evaluate(Candidate(ema_coefficients((10, 20, 30), 0.8), gradient=True))
    assert largest_batches() == (5, 2)


@pretended
def test_a_decoder_and_an_extractor_take_as_many_images_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, seen = [], []

    class Autoencoder(torch.nn.Module):
        def decode(self, latents: torch.Tensor) -> Any:
            decoded.append(len(latents))
            return SimpleNamespace(sample=latents.repeat_interleave(16, dim=2))

    class Extractor:
        name, dimension, graph_bytes = "squares", 4, 1000

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return images.flatten(1).square()

    settings: Any = {"raw_mean": [0.0], "raw_std": [1.0], "final_std": 1.0}
    decoder = LatentDecoder(Autoencoder(), DecoderSettings(autoencoder="", **settings)).to(DEVICE)
    gc.collect()
    monkeypatch.setattr(Options, "memory", pretend.used(0) + 2**20)
    latents = torch.ones(100, 1, 4, 4, device=DEVICE)
    images = torch.ones(50, 1, 2, 2, device=DEVICE)
    torch.accelerator.reset_peak_memory_stats(DEVICE)  # as the batch does in which latents are decoded
    with torch.no_grad():
        decoder(latents)
    assert decoded == [8, 92]
    decoder(latents[:20])  # with a graph
    assert decoded[2:] == [8, 8, 4]
    image_gradient(Extractor(), images, torch.ones(50, 4))
    monkeypatch.setattr(Options, "memory", pretend.used(0) + 20_000)
    torch.accelerator.empty_cache()
    image_gradient(Extractor(), images, torch.ones(50, 4))
    assert (seen[0], max(seen[1:])) == (50, 10)


@pretended  # its random numbers are the CPU's
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_a_recipe_is_that_of_the_cpu(name: str) -> None:
    gradients = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        network, recipe = ToyNetwork().to(device), RECIPES[name]()
        generator = torch.Generator(device)
        generator.manual_seed(7)
        parts: dict[str, Any] = {
            "network": network,
            "target": network,
            "generator": generator,
            "noise_scale": recipe.noise_scale,
        }
        teacher = (lambda x, _sigma: x) if name == "cd" else None
        recipe.loss(Batch(images=IMAGES[:8].to(device), step=0, steps=10, **parts, teacher=teacher)).backward()
        torch.optim.Adam(network.parameters()).step()
        gradients.append([weight.grad.cpu() for weight in network.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# budgets: figures of docs/benchmarks.md


def layers(step: int, count: int) -> dict[str, torch.Tensor]:
    """Weights of which some are combined, some are copied from a checkpoint, and some never change."""
    generator = torch.Generator().manual_seed(step)
    state: dict[str, torch.Tensor] = {}
    for number in range(count):
        state[f"{number}.weight"] = torch.randn(5000 // count, generator=generator)
        state[f"{number}.running_var"] = torch.rand(3, generator=generator)
        state[f"{number}.batches"] = torch.tensor(step)
        state[f"constant.{number}"] = torch.ones(2)
    return state


@pretended
@pytest.mark.parametrize(("stored", "launches"), [("exact", 1), ("float16", 2), ("bfloat16", 3)])
def test_a_merge_launches_once_a_segment_whatever_checkpoints_and_tensors_it_has(
    tmp_path: Path, stored: str, launches: int
) -> None:
    of_projections = set()
    for checkpoints, tensors in ((4, 2), (4, 50), (19, 50)):
        place = tmp_path / f"{checkpoints} {tensors}"
        with TrajectoryWriter(place, dtype=stored) as writer:
            for step in range(checkpoints):
                writer.append(step, layers(step, tensors))
        here = Trajectory.open(place)
        there, row = here.on(DEVICE), np.full(checkpoints, 1 / checkpoints)
        there.merge(row)
        COUNTS.clear()
        merged = there.merge(row)
        counted = {name: COUNTS[name] for name in ("launches", "to_device", "to_host")}
        # and a copy of what never changes, the bound of variances; coefficients, what is copied from one checkpoint
        assert counted == {"launches": launches + 2, "to_device": 2, "to_host": 0}
        close(merged, here.merge(row))
        gradients = {f"{number}.weight": torch.ones(5000 // tensors, device=DEVICE) for number in range(tensors)}
        COUNTS.clear()
        there.project(gradients)
        of_projections.add(COUNTS["launches"])
    assert len(of_projections) == 1
    assert max(of_projections) <= 20


@pretended
@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize(("how", "halves"), [("resident", True), ("resident", False), ("streamed", True)])
def test_rows_of_half_types_are_merged_as_exactly_as_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, how: Any, halves: bool
) -> None:
    monkeypatch.setattr(Options, "halves", halves)
    count = 100
    with TrajectoryWriter(tmp_path / "many", dtype=stored, keep_last=count) as writer:
        for step in range(count + 2):  # two slots are free, or hold what was overwritten
            writer.append(step, {"weight": torch.randn(1001, generator=torch.Generator().manual_seed(step)) + 1})
    trajectory = Trajectory.open(tmp_path / "many")
    rows = torch.stack([trajectory.checkpoint(index)["weight"].double() for index in range(count)])
    placed = trajectory.on(DEVICE, how=how)
    drawn = np.random.default_rng(0).standard_normal(count)
    few = np.zeros(count)
    few[[3, 7, 70]] = 0.7, -1.2, 1.5
    for row in (np.full(count, 1 / count), drawn - (drawn.sum() - 1) / count, few):
        weights = torch.from_numpy(row)
        exact = weights @ rows
        error = (placed.merge(row)["weight"].cpu().double() - exact).abs()
        assert bool((error <= 1e-6 * (weights.abs() @ rows.abs())).all())


@pytest.mark.parametrize("stored", ["exact", "float16"])
@pytest.mark.parametrize("how", ["resident", "streamed"])
@pytest.mark.parametrize("rule", ["layers", "channels"])
def test_each_group_is_merged_with_its_own_row(tmp_path: Path, stored: str, how: Any, rule: Rule) -> None:
    grouped = make_trajectory(tmp_path / "run", dtype=stored).in_rows(rule)
    assert grouped.layer_groups is not None
    drawn = np.random.default_rng(0).standard_normal((len(grouped.layer_groups), 5))
    rows = drawn + (1 - drawn.sum(axis=1, keepdims=True)) / 5
    placed = grouped.on(DEVICE, how=how)
    merged, expected = placed.merge(rows), grouped.merge(rows)
    for name, tensor in expected.items():
        unit = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
        torch.testing.assert_close(merged[name].cpu(), tensor, rtol=8 * unit, atol=8 * unit)
    gradients = {name: torch.ones(state_dict(1)[name].shape) for name in COMBINED}
    there = {name: tensor.to(DEVICE) for name, tensor in gradients.items()}
    np.testing.assert_allclose(placed.project(there), grouped.project(gradients), rtol=1e-5, atol=1e-5)


@pretended
def test_a_trial_takes_moments_to_the_host_and_no_images(folder: Path) -> None:
    objective, rates = small("pretend", folder, batch_size=8), (0.5, 0.6)
    objective.evaluate(Candidate(ema_coefficients((10, 20, 30), rates[0])))
    COUNTS.clear()
    objective.evaluate(Candidate(ema_coefficients((10, 20, 30), rates[1])))
    most = {"to_host_bytes": 8 * (4 + 4 * 4) + 10, "to_host": 9, "to_device": 9, "waits": 18, "launches": 84}
    assert {name: COUNTS[name] for name in most if COUNTS[name] > most[name]} == {}
