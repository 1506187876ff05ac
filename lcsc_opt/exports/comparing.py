"""``lcsc_opt.compare_averages``: each checkpoint and the usual averages, sampled from the same noise, on one sheet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.contact_sheet import labelled_sheet, thumbnails
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.paths import DEFAULT_FILES, BuildContext
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, SEARCH, Coefficients, Noise
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.checkpoints.lora import LoraAlphas, lora_flavour
from lcsc_opt.exports.averaging import check_openable, open_trajectory
from lcsc_opt.exports.coefficients import check_kind, coefficients_of_kind, usual_averages
from lcsc_opt.exports.merging import lora_naming, network_config, write_average
from lcsc_opt.exports.recipe import LoraNaming, Recipe
from lcsc_opt.exports.writing import Destination
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.extractors.rewards import Reward
from lcsc_opt.metrics.from_settings import MetricSuiteBuilder, ReferenceScoreSettings
from lcsc_opt.metrics.names import REWARD
from lcsc_opt.objective.batch_sizes import AUTO, BatchSizes
from lcsc_opt.objective.loading import make_importable
from lcsc_opt.objective.starting import pipeline_near
from lcsc_opt.sampling import Sampler
from lcsc_opt.sampling.base import prompts_of
from lcsc_opt.sampling.from_folder import FolderSampling, sampler_of
from lcsc_opt.sampling.text_to_image import read_prompts
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.in_memory import listed

MOST_CHECKPOINTS = 24  # that have a column, unless the caller asks for more
MOST_ROWS = 16  # of the sheet
ROWS = 8  # without prompts
FEWEST_COMPARED = 500  # images for a distance to real images, unless the caller asks for a number
PROMPTS_AT_ONCE = 8
IMAGES_AT_ONCE = 100
DEFAULT_METRIC = "fid"


@dataclasses.dataclass(frozen=True)
class SampledAverage:
    """A checkpoint, or an average of checkpoints, and its images.

    Attributes:
        kind: as ``lcsc apply`` and :func:`lcsc_opt.average` take it, such as ``step:300`` or ``ema:0.998``.
        coefficients: ``[K]``.
        pixels: ``[rows, H, W, 3]``, the images of the sheet.
        metrics: name → value on all of its images; empty without a reward and a reference.
        loss: of the metric that chooses, lower is better; ``None`` without metrics, or where images are not finite.
    """

    kind: str
    coefficients: Coefficients
    pixels: npt.NDArray[np.uint8]
    metrics: Mapping[str, float]
    loss: float | None


@dataclasses.dataclass(frozen=True)
class ComparedAverages:
    """What :func:`compare_averages` has sampled. A notebook shows the sheet.

    Attributes:
        trajectory: the checkpoints.
        labels: of the sheet's rows: prompts, or the numbers of images.
        averages: the columns: single checkpoints first, then averages.
        images: how many images each of them was measured on.
        best: the kind with the lowest loss; ``None`` without a metric that chooses.
        held_out: kind → metrics on other noise, of the best and of the last checkpoint; empty without metrics.
        naming: what the names of an exported LoRA depend on; ``None`` for whole networks.
        config: ``config.json`` of the network, for a model folder.
    """

    trajectory: Trajectory
    labels: tuple[str, ...]
    averages: tuple[SampledAverage, ...]
    images: int
    best: str | None
    held_out: Mapping[str, Mapping[str, float]]
    naming: LoraNaming | None
    config: str | None

    def sheet(self) -> bytes:
        """The contact sheet as a PNG: a row for each prompt, a column for each checkpoint and average."""
        cells = np.stack([average.pixels for average in self.averages], axis=1)
        columns = []
        highlighted = None
        for index, average in enumerate(self.averages):
            lines = [average.kind]
            lines += [f"{name} {value:.4g}" for name, value in average.metrics.items()]
            if average.kind == self.best:
                highlighted = index
                lines[0] += " (best)"
            columns.append(lines)
        return labelled_sheet(cells, rows=self.labels, columns=columns, highlighted=highlighted)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what was measured; empty without a reward and a reference."""
        names: dict[str, None] = {}
        for average in self.averages:
            names.update(dict.fromkeys(average.metrics))
        return tuple(names)

    def rows_of_table(self) -> list[dict[str, str | float | None]]:
        """Of each column of the sheet: its kind, its metrics, and those on other noise where they were measured."""
        rows = []
        for average in self.averages:
            row: dict[str, str | float | None] = {"kind": average.kind}
            for name in self.metrics:
                row[name] = average.metrics.get(name)
            if self.held_out:
                on_other_noise = self.held_out.get(average.kind, {})
                row.update({f"{name} on other noise": on_other_noise.get(name) for name in self.metrics})
            rows.append(row)
        return rows

    def export(self, to: Destination | str | Path, kind: str | None = None) -> Recipe:
        """Write a checkpoint or an average as a model with its recipe inside.

        Args:
            to: where, and in which form. A LoRA whose tensors do not hold its alphas is written under the names that
                ``load_lora_weights`` loads, with alpha / rank multiplied in, unless a destination says otherwise.
            kind: which; ``None`` is :attr:`best`.

        Raises:
            StudySpecError: no kind, and no metric that chooses; the path exists.
            StudyStoreError: the disk refuses.
        """
        chosen = kind or self.best
        if chosen is None:
            raise StudySpecError(f"{to}: nothing chooses what is exported; name it, as {self.averages[-1].kind}")
        coefficients = coefficients_of_kind(chosen, self.trajectory.steps)
        if not isinstance(to, Destination):
            to = Destination.of(Path(to), form=self.default_form(Path(to)))
        config = to.config_text(self.config)
        return write_average(self.trajectory, coefficients, to, name=chosen, config=config, naming=self.naming)

    def default_form(self, path: Path) -> str | None:
        """``lora`` for a file of a LoRA that would lose its alphas under its own names; else ``None``."""
        if self.naming is None or path.suffix != ".safetensors" or lora_flavour(self.trajectory.names) == "kohya":
            return None
        return "lora"

    def _repr_png_(self) -> bytes:
        return self.sheet()


def compare_averages(
    checkpoints: Any,
    *,
    pipeline: str | Path | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    images: int | None = None,
    sampler: str | None = None,
    sampling_steps: int = 20,
    guidance: float | None = None,
    reward: str | Callable[..., Any] | None = None,
    reference: str | Mapping[str, Any] | None = None,
    metric: str = DEFAULT_METRIC,
    weights: Mapping[str, str] | None = None,
    also: Sequence[str] = (),
    most_checkpoints: int = MOST_CHECKPOINTS,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    lora_alpha: float | None = None,
    key: str | None = None,
    steps: Sequence[int] | None = None,
) -> ComparedAverages:
    """Sample each checkpoint and the usual averages of them from the same noise; measure them if there is a metric.

    Averages are the uniform one of all and of the last half, EMAs and power-function EMAs of the window
    (:func:`~lcsc_opt.exports.coefficients.usual_averages`).

    Args:
        checkpoints: of a LoRA (diffusers, PEFT, kohya), a U-Net or a transformer: files, a pattern, a folder, a packed
            trajectory, ``hf://owner/name@step-*``, or state dicts as for :func:`lcsc_opt.average`.
        pipeline: a folder of diffusers: of the text-to-image pipeline, or of the model that makes images from noise. By
            default the checkpoints' own folder, or the only one next to it.
        prompts: a text file with one prompt a line, or the prompts; image i is of prompt i mod n.
        images: of each column; by default one a prompt, 8 without prompts, 500 with a reference.
        sampler: the scheduler, as ``lcm``; by default the pipeline's own, and without prompts DPM-Solver++ in place of
            DDPM.
        sampling_steps: how many steps it makes.
        guidance: the scale of classifier-free guidance with prompts; by default the pipeline's, and 1 with ``lcm``.
        reward: scores images: a function of images ``[N, C, H, W]``, and of ``prompts`` if it takes them, that returns
            scores ``[N]``, or its name as ``module:function``.
        reference: real images or their statistics, as in a study file.
        metric: the distance to them.
        weights: extractor → its weights.
        also: further columns, such as ``last:4`` or ``ema:0.999``.
        most_checkpoints: with more checkpoints than these, so many of them have columns, evenly spaced.
        seed: of all noise.
        device: of the networks.
        dtype: of their arithmetic: ``fp32``, ``bf16`` or ``fp16``.
        lora_alpha: if neither the LoRA nor a configuration next to it contains it.
        key: which state dict of each file.
        steps: the training step of each file, if the names do not contain them.

    Raises:
        TrajectoryError: the checkpoints cannot be read, or are fewer than two.
        ObjectiveError: a folder, prompts or a LoRA that do not fit together.
        MetricError: a reward or a reference that cannot be used.
        StudySpecError: a wrong value.
    """
    for kind in also:
        check_kind(kind)
    listed_prompts = _prompts(prompts)
    if guidance is not None and listed_prompts is None:
        raise StudySpecError("guidance: leads images to prompts; give prompts, too")
    count = _image_count(images, listed_prompts, with_reference=reference is not None)
    make_importable(None)  # for a reward and the like in the working directory
    scores = _Scores(reward, reference, metric, weights or {})
    checkpoints = listed(checkpoints)
    check_openable(checkpoints, key=key, steps=steps)
    if pipeline is None:
        pipeline = pipeline_near(checkpoints, of_texts=listed_prompts is not None)
    options = {
        "pipeline": str(pipeline),
        "sampler": sampler,
        "sampling_steps": sampling_steps,
        "guidance": guidance,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    sampling = parse_settings(FolderSampling, options, source="average")
    sampling.check(with_prompts=listed_prompts is not None)
    trajectory = open_trajectory(checkpoints, DEFAULT_FILES, key=key, steps=steps)
    columns = _columns(trajectory, also, most_checkpoints)
    alphas = _alphas(trajectory, lora_alpha)
    sampler_of_folder = sampler_of(sampling, prompts=listed_prompts, lora_alphas=alphas)
    sampler_of_folder.load(trajectory.checkpoint(-1))  # so that a misfit fails before the reference is read
    comparison = _Comparison(
        trajectory=trajectory,
        sampler=sampler_of_folder,
        suite=scores.suite(sampling.torch_device()),
        device=sampling.torch_device(),
        images=count,
        labels=_row_labels(listed_prompts, count),
        batches=BatchSizes(AUTO, with_graph=None, images=IMAGES_AT_ONCE if listed_prompts is None else PROMPTS_AT_ONCE),
    )
    return comparison.run(columns, decides=scores.decides, alphas=alphas)


def _prompts(prompts: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    if prompts is None:
        return None
    if isinstance(prompts, (str, Path)):
        return read_prompts(Path(prompts))
    listed = tuple(prompts)
    if not listed or not all(isinstance(prompt, str) for prompt in listed):
        raise StudySpecError("prompts: expected a text file, or a list of at least one text")
    return listed


def _image_count(images: int | None, prompts: Sequence[str] | None, *, with_reference: bool) -> int:
    """How many images each column has."""
    if images is None:
        rows = ROWS
        if prompts is not None:
            rows = len(prompts)
        if with_reference:
            return max(rows, FEWEST_COMPARED)
        return rows
    fewest = 1
    if with_reference:
        fewest = 2  # of a covariance
    if not isinstance(images, int) or isinstance(images, bool) or images < fewest:
        raise StudySpecError(f"images: expected a whole number of at least {fewest}, got {images!r}")
    return images


def _row_labels(prompts: Sequence[str] | None, images: int) -> tuple[str, ...]:
    """The labels of the sheet's rows; each row is an image."""
    if prompts is None:
        return tuple(f"image {number}" for number in range(1, min(images, ROWS) + 1))
    shown = min(images, len(prompts), MOST_ROWS)
    if shown < min(images, len(prompts)):
        notice(f"the sheet shows the first {shown} of {len(prompts)} prompts")
    return tuple(prompts[:shown])


def _columns(trajectory: Trajectory, also: Sequence[str], most: int) -> dict[str, Coefficients]:
    """Kind → coefficients ``[K]``: single checkpoints, then averages."""
    steps = trajectory.steps
    if most < 1:
        raise StudySpecError(f"most_checkpoints: expected at least 1, got {most}")
    positions = np.arange(len(steps))
    if len(steps) > most:
        positions = np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))
        positions[-1] = len(steps) - 1
        notice(f"{len(positions)} of {len(steps)} checkpoints have a column; averages are of all")
    columns: dict[str, Coefficients] = {}
    for position in positions:
        columns[f"step:{steps[position]}"] = np.eye(len(steps))[position]
    columns.update(usual_averages(steps))
    for kind in also:
        columns[kind] = coefficients_of_kind(kind, steps)
    return columns


def _alphas(trajectory: Trajectory, lora_alpha: float | None) -> LoraAlphas | None:
    """The alphas of LoRA checkpoints; ``None`` for whole networks."""
    if lora_flavour(trajectory.names) is None:
        if lora_alpha is not None:
            raise StudySpecError("lora_alpha: the checkpoints are no LoRA; leave it out")
        return None
    if lora_alpha is None:
        return trajectory.lora_alphas()
    if not lora_alpha > 0:
        raise StudySpecError(f"lora_alpha: expected above 0, got {lora_alpha}")
    return LoraAlphas.constant(lora_alpha)


class _Scores:
    """The reward and the distance that are asked for, checked before anything large is loaded."""

    def __init__(
        self,
        reward: str | Callable[..., Any] | None,
        reference: str | Mapping[str, Any] | None,
        metric: str,
        weights: Mapping[str, str],
    ) -> None:
        if reward is not None and not isinstance(reward, str) and not callable(reward):
            raise StudySpecError(f"reward: expected a name or a function, got {type(reward).__name__}")
        if reference is None and metric != DEFAULT_METRIC:
            raise StudySpecError(f"metric: {metric} is measured against real images; give reference")
        if weights and reference is None:
            raise StudySpecError("weights: are of a feature network; give reference")
        self._function = None if isinstance(reward, str) else reward
        self._builder: MetricSuiteBuilder | None = None
        self.decides = (reward is None) != (reference is None)
        """Whether one metric alone says which column is best."""
        settings: dict[str, Any] = {"unguarded": True, "held_out_metrics": [], "weights": dict(weights)}
        if isinstance(reward, str):
            settings["reward"] = reward
            settings["loss"] = REWARD
        if reference is not None:
            settings["reference"] = reference
            settings["loss"] = metric
        if "loss" in settings:
            checked = parse_settings(ReferenceScoreSettings, settings, source="average")
            self._builder = MetricSuiteBuilder(checked, BuildContext())
            self._builder.check()

    def suite(self, device: torch.device) -> MetricSuite | None:
        """Reads the reference, and loads networks; ``None`` if nothing is measured."""
        suite = None
        if self._builder is not None:
            suite = self._builder.build(device=device, folder=DEFAULT_FILES)
        if self._function is None:
            return suite
        name = getattr(self._function, "__name__", type(self._function).__name__)
        reward = Reference(Reward(name, self._function))
        if suite is None:
            return MetricSuite({REWARD: reward}, loss=REWARD, device=device)
        loss = {str(metric): weight for metric, weight in suite.weights.items()}
        return MetricSuite({**suite.references, REWARD: reward}, loss=loss, device=device)


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """What samples and measures one column after the other."""

    trajectory: Trajectory
    sampler: Sampler
    suite: MetricSuite | None
    device: torch.device
    images: int
    labels: tuple[str, ...]
    batches: BatchSizes

    def run(self, columns: Mapping[str, Coefficients], *, decides: bool, alphas: LoraAlphas | None) -> ComparedAverages:
        source = self.trajectory.on(self.device)
        total = len(columns) * self.images
        if decides:
            total += 2 * self.images
        averages: list[SampledAverage] = []
        held_out: dict[str, Mapping[str, float]] = {}
        best = None
        with progress("images", total) as advance:
            for kind, coefficients in columns.items():
                self.sampler.load(source.merge(coefficients))
                averages.append(self._sampled(kind, coefficients, SEARCH, advance))
            if decides:
                best = _best(averages)
                last = f"step:{self.trajectory.steps[-1]}"
                for kind in dict.fromkeys((best, last)):
                    self.sampler.load(source.merge(columns[kind]))
                    held_out[kind] = self._sampled(kind, columns[kind], HELD_OUT, advance).metrics
        return ComparedAverages(
            trajectory=self.trajectory,
            labels=self.labels,
            averages=tuple(averages),
            images=self.images,
            best=best,
            held_out=held_out,
            naming=None if alphas is None else lora_naming(self.sampler, alphas),
            config=network_config(self.sampler),
        )

    @torch.no_grad()
    def _sampled(
        self, kind: str, coefficients: Coefficients, noise: Noise, advance: Callable[..., None]
    ) -> SampledAverage:
        """The images of the weights in the model, measured."""
        metrics = None
        if self.suite is not None:
            metrics = self.suite.image_metrics(self.images)
        pixels: list[npt.NDArray[np.uint8]] = []
        start = 0
        while start < self.images:
            images = self._batch(noise, start)
            stop = start + len(images)
            if not bool(torch.isfinite(images).all()):
                if metrics is not None:
                    notice(f"{kind}: gives images that are not finite, so it is not measured")
                    metrics = None
                images = images.nan_to_num()
            if start < len(self.labels):
                pixels.append(thumbnails(images[: len(self.labels) - start].cpu().float().numpy()))
            if metrics is not None:
                metrics.update(images, prompts=prompts_of(self.sampler, noise, start, stop))
            advance(stop - start, note=kind)
            start = stop
        loss = None
        values: Mapping[str, float] = {}
        if metrics is not None:
            loss, values = metrics.compute()
        return SampledAverage(kind, coefficients, np.concatenate(pixels), values, loss)

    def _batch(self, noise: Noise, start: int) -> Tensor:
        """The images from ``start`` on, as many as fit."""

        def sampled() -> Tensor:
            return self.sampler.sample(noise, start, min(start + self.batches.without_graph, self.images))

        return self.batches.retry_smaller(sampled)


def _best(averages: Sequence[SampledAverage]) -> str:
    """The kind with the lowest loss.

    Raises:
        StudySpecError: none was measured.
    """
    measured = [average for average in averages if average.loss is not None]
    if not measured:
        raise StudySpecError("no checkpoint gives finite images, so none is best; check the checkpoints, or dtype fp32")
    return min(measured, key=lambda average: average.loss).kind  # type: ignore[arg-type, return-value]
