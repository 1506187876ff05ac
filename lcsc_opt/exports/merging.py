"""Models that are merged and written: an experiment's, one made again from its recipe, and one without a search."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_spec import LAYERS
from lcsc_opt.checkpoints.folders import folder_of_weights, place_in_file
from lcsc_opt.checkpoints.lora import (
    LoraAlphas,
    in_one_form,
    loads_in_pipelines,
    lora_flavour,
    warn_of_two_forms,
)
from lcsc_opt.checkpoints.names import torch_suffix
from lcsc_opt.checkpoints.rewriting import Document, with_weights
from lcsc_opt.coefficients.layer_groups import LayerGroups, TensorRows
from lcsc_opt.coefficients.profiles import trainer_ema
from lcsc_opt.exports.chosen import Chosen
from lcsc_opt.exports.coefficients import average_coefficients
from lcsc_opt.exports.model_config import ModelConfig
from lcsc_opt.exports.recipe import LoraNaming, Recipe, packed_trajectory
from lcsc_opt.exports.writing import Content, Destination
from lcsc_opt.objective.checkpoints_alone import stored_context
from lcsc_opt.objective.contract import Objective
from lcsc_opt.sampling.base import Sampler
from lcsc_opt.sampling.diffusers_folder import find_model_config
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.adapters import open_with_base, requests_of_adapters
from lcsc_opt.trajectory.layout import DTYPES, EXACT
from lcsc_opt.trajectory.manifest import HEADER, PREFIX
from lcsc_opt.trajectory.packing import open_request
from lcsc_opt.trajectory.sources import PackRequest

_MOST_NAMED = 8  # of what is left out, in a message


def export(chosen: Chosen, objective: Objective, to: Destination) -> Recipe:
    """Write a model of an experiment. The database is not written: a search may be running meanwhile.

    Returns:
        The recipe inside the model.

    Raises:
        ObjectiveError: the objective has no weights, or they do not fit the configuration.
        StudyStoreError: the checkpoints are not those of the experiment, or the file cannot be written.
        TrajectoryError: the checkpoints are damaged.
    """
    recipe = recipe_of(chosen, objective, dtype=to.dtype)
    trajectory = packed_trajectory(objective)
    config = _found_config(to, trajectory, _named_folders(chosen)) or _network_config(to, objective.sampler)
    if to.form == "lora":
        # those of the study's settings, else what was packed
        alphas = getattr(objective.sampler, "alphas", None) or trajectory.lora_alphas()
        recipe = recipe.model_copy(update={"lora": _lora_naming(objective.sampler, alphas)})
    return _write(trajectory, recipe, to, config)


def recipe_of(chosen: Chosen, objective: Objective, *, dtype: str | None = None) -> Recipe:
    """The recipe of a model of an experiment, with the tensors that no merge gives, which ``lcsc apply`` needs, too.

    Raises:
        ObjectiveError: the objective has no weights.
        StudyStoreError: the checkpoints are not those of the experiment.
    """
    recipe = Recipe.of_chosen(chosen, objective, dtype=dtype)
    statistics = objective.statistics(np.array(recipe.coefficients, dtype=np.float64))
    if not statistics:
        return recipe
    renaming = packed_trajectory(objective).renaming
    named = {renaming.undone(name): tensor for name, tensor in statistics.items()}
    return recipe.model_copy(update={"statistics": save(_cast(named, dtype)).hex()})


def needs_network(chosen: Chosen, objective: Objective, to: Destination) -> bool:
    """Whether an export needs the network or the pipeline of the whole objective, beside what is merged.

    A model's folder needs the network for its configuration, where there is none on the disk; an adapter's folder needs
    PEFT's, which no network has. The names of a LoRA depend on the pipeline.
    """
    if to.form == "diffusers":
        trajectory = packed_trajectory(objective)
        is_adapter = lora_flavour(trajectory.names) is not None
        return not is_adapter and _found_config(to, trajectory, _named_folders(chosen)) is None
    return to.form == "lora"


def _found_config(to: Destination, trajectory: Trajectory, folders: Iterable[Path] = ()) -> ModelConfig | None:
    """For a model's folder, the configuration that the user named, that lies with the last checkpoint, or in a folder.

    ``None`` for other forms, and where none of these has one that fits: an adapter's for an adapter.

    Raises:
        ObjectiveError: the one that the user named is none.
    """
    if to.form != "diffusers":
        return None
    if to.config is not None:
        return ModelConfig.read(to.config)
    is_adapter = lora_flavour(trajectory.names) is not None
    candidates = [_last_folder(trajectory)]
    for folder in folders:
        with contextlib.suppress(ObjectiveError):  # nobody said that it has one
            candidates.append(find_model_config(folder))
    for candidate in candidates:
        if candidate is not None:
            with contextlib.suppress(ObjectiveError):
                config = ModelConfig.read(candidate)
                if config.is_adapter == is_adapter:
                    return config
    return None


def _network_config(to: Destination, sampler: Sampler | None) -> ModelConfig | None:
    """For a model's folder, the configuration of the network of a sampler, if it is one of diffusers; else ``None``."""
    if to.form != "diffusers":
        return None
    for name in ("network", "denoiser"):  # alone, or of a pipeline
        network: Any = getattr(sampler, name, None)
        if hasattr(network, "to_json_string"):
            return ModelConfig.parse(str(network.to_json_string()))
    return None


def _last_folder(trajectory: Trajectory) -> Path | None:
    """The folder that the last checkpoint's weights are in; ``None`` if it is not known, or gone."""
    source = trajectory.sources[-1]
    if not source or not Path(source).exists():
        return None
    return folder_of_weights(Path(source), trajectory.metadata.get("key"))


def _named_folders(chosen: Chosen) -> list[Path]:
    """The folders that the settings ``model`` and ``checkpoints`` name, which may hold a configuration."""
    settings = chosen.stored["objective"]["settings"]
    context = stored_context(chosen.stored, chosen.files)
    names = [settings.get(name) for name in ("model", "checkpoints")]
    return [context.path(name) for name in names if isinstance(name, str)]


def rebuild(recipe: Recipe, request: PackRequest, to: Destination) -> Recipe:
    """Combine the checkpoints of a recipe again, and write the model; files are packed meanwhile.

    The recipe's key and dtype hold where no other is given. Gives the recipe that is inside the new model.

    Raises:
        ObjectiveError: the recipe cannot be followed, or the weights do not fit the configuration.
        TrajectoryError: a checkpoint is missing, or is not the one that the recipe names.
        StudyStoreError: the disk refuses.
    """
    with _packed(request, recipe) as trajectory:
        return _write_alone(trajectory, recipe.model_copy(update={"dtype": to.dtype or recipe.dtype}), to)


def average(request: PackRequest, name: str, to: Destination) -> Recipe:
    """Combine checkpoints once, and write the model with its recipe inside.

    ``name`` is the average's, as for :func:`~lcsc_opt.exports.coefficients.average_coefficients`; the rest is as for
    :func:`rebuild`.

    Raises:
        StudySpecError: there is no such step, or there are not so many.
    """
    with _packed(request) as trajectory:
        recipe = Recipe.of(trajectory, average_coefficients(name, trajectory.steps), study=name, dtype=to.dtype)
        return _write_alone(trajectory, recipe, to)


def _write_alone(trajectory: Trajectory, recipe: Recipe, to: Destination) -> Recipe:
    """Write the model of a recipe, without a study: under the names in the files of the checkpoints.

    Packing has removed a wrapper's prefix, which is put back here. With a study, the network's names have none.
    """
    config = _found_config(to, trajectory)
    if to.form == "lora" and recipe.lora is None:
        recipe = recipe.model_copy(update={"lora": LoraNaming(alphas=trajectory.lora_alphas())})
    return _write(trajectory, recipe, to, config, prefix=trajectory.metadata.get(PREFIX, ""))


@contextlib.contextmanager
def _packed(request: PackRequest, recipe: Recipe | None = None) -> Iterator[Trajectory]:
    """The checkpoints of a request; files are packed in a temporary folder inside that of the request.

    They are packed with the key and the dtype of ``recipe``, if one is given, unless the user gives a key.

    Raises:
        TrajectoryError: as :func:`~lcsc_opt.trajectory.packing.open_request`, also where one packed trajectory is named
            with options that it does not have.
    """
    request.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lcsc-", dir=request.folder) as folder:
        request = dataclasses.replace(request, folder=Path(folder))
        if recipe is not None and request.packed_path is None:
            # an empty text is that of a file of weights alone
            key = (recipe.key if request.key is None else request.key) or None
            request = dataclasses.replace(request, key=key, dtype=recipe.stored)
        if recipe is not None and recipe.adapters is not None:
            yield open_with_base(requests_of_adapters(request))
        else:
            yield open_request(request)


def _write(
    trajectory: Trajectory,
    recipe: Recipe,
    to: Destination,
    config: ModelConfig | None,
    *,
    prefix: str = "",
) -> Recipe:
    """Merge by a recipe and write the model. Gives the recipe back.

    Args:
        trajectory: the checkpoints, under the names of the network where an objective has one.
        recipe: how they are merged.
        to: where the model is written.
        config: the configuration of a model's folder.
        prefix: what is put before the names in a file.
    """
    _check_form(trajectory, to, config)
    weights = merge(trajectory, recipe)
    if trajectory.stored is not None:
        notice(f"{to.path}: merged from checkpoints that were rounded to {trajectory.stored} when they were packed")
    weights.update({trajectory.renaming(name): tensor for name, tensor in _statistics_in(recipe).items()})
    # a configuration beside the checkpoints is for the names in their files, any other for those of the network
    if config is not None and config.folder is not None and config.folder == _last_folder(trajectory):
        weights = {trajectory.renaming.undone(name): tensor for name, tensor in weights.items()}
    document = _document(trajectory, weights, to)
    if document is None:
        warn_of_two_forms(trajectory.sources[-1], weights)
        renamed = in_one_form(weights)
        weights = {renamed.get(name, name): tensor for name, tensor in weights.items()}
    if to.form in ("safetensors", "pt"):
        weights = {prefix + name: tensor for name, tensor in weights.items()}
    header = json.loads(trajectory.metadata.get(HEADER, "{}"))
    to.write(Content(weights, recipe, config, document, header))
    return recipe


def _check_form(trajectory: Trajectory, to: Destination, config: ModelConfig | None) -> None:
    """Refuse a model's folder without the configuration that it needs; say which form the user of a LoRA loads.

    Raises:
        ObjectiveError: there is none.
    """
    flavour = lora_flavour(trajectory.names)
    if to.form == "diffusers" and flavour is not None and (config is None or not config.is_adapter):
        file = to.path / "adapter_model.safetensors"
        raise ObjectiveError(
            f"{to.path}: an adapter's folder needs its own configuration. For PEFT, pass --config FOLDER of a "
            f"checkpoint, or write -o {file} and put an adapter_config.json next to it; for diffusers, pass --as lora"
        )
    if to.form == "diffusers" and config is None:
        raise ObjectiveError(
            f"{to.path}: a model folder needs a configuration of diffusers or transformers; pass --config FOLDER "
            "of a model. An adapter needs none: end the name in .safetensors"
        )
    is_whole = flavour == "kohya" or loads_in_pipelines(trajectory.names)
    if to.form in ("safetensors", "pt") and flavour is not None and not is_whole:
        notice(f"{to.path}: holds a LoRA under its own names; --as lora writes what load_lora_weights loads")


def _document(trajectory: Trajectory, weights: Mapping[str, Tensor], to: Destination) -> Document | None:
    """The last checkpoint's file with these weights, for a file of the same ending: its trainer loads it as its own.

    ``None`` where a plain state dict is written; that is said, unless the user chose it by the file's ending.
    """
    *others, last = trajectory.sources
    if to.form != "pt" or not last:
        return None
    key = trajectory.metadata.get("key", "")
    source, key_in_file = place_in_file(Path(last), key)
    if torch_suffix(to.path) != torch_suffix(source):
        if source != Path(last):  # in a folder, whose file's ending the user did not see
            notice(
                f"{to.path}: written as a plain state dict, since the weights of {Path(last).name} are in {source.name}"
            )
        return None
    try:
        earlier = None  # tells averages of the weights from what is the same in all checkpoints
        if others and others[-1]:
            earlier, _ = place_in_file(Path(others[-1]), key)
        document = with_weights(source, key_in_file, weights, earlier=earlier)
    except TrajectoryError as error:
        notice(f"{to.path}: written as a plain state dict, which the trainer may be unable to load: {error}")
        return None
    if len(document.replaced) > 1:
        notice(
            f"{to.path}: the merged weights replace {' and '.join(document.replaced)}; everything else is the last "
            "checkpoint's"
        )
    if document.left_out:
        names = [*document.left_out[:_MOST_NAMED]]
        if len(document.left_out) > _MOST_NAMED:
            names.append("…")
        notice(f"{to.path}: left out, because they are not plain data: {', '.join(names)}")
    return document


def merge(trajectory: Trajectory, recipe: Recipe) -> dict[str, Tensor]:
    """The weights of a recipe, on the CPU, merged as a search merges them.

    Checkpoints whose coefficient is zero are not needed, and there may be further ones. Sums are of float32 and depend
    on the BLAS, so another machine's differ in the last bits. Floating-point tensors are of the recipe's dtype.

    Raises:
        StudySpecError: the recipe's coefficients do not sum to one.
        TrajectoryError: a checkpoint is missing or has other weights than the recipe's, or a weight is too large for
            its dtype.
    """
    coefficients = recipe.in_rows()
    places = recipe.find_needed(trajectory.steps)  # index in the recipe → index in the trajectory
    _check_checkpoints(trajectory, recipe, places)
    if recipe.trainer_ema:
        if trajectory.steps[-1] != recipe.steps[-1]:
            raise TrajectoryError(
                f"{recipe.study}: the recipe is the average that the trainer kept at step {recipe.steps[-1]}: leave "
                f"out the checkpoints after step {recipe.steps[-1]}."
            )
        if recipe.trainer_ema not in trajectory.averages:
            kept = ", ".join(trajectory.averages) or "none"
            raise TrajectoryError(
                f"{recipe.study}: the recipe is the {recipe.trainer_ema}, and the checkpoints have {kept}: name the "
                "files of the recipe."
            )
        index = trajectory.averages.index(recipe.trainer_ema)
        return _cast(trajectory.merge(trainer_ema(len(trajectory), index)), recipe.dtype)
    placed = np.zeros((len(coefficients), len(trajectory)))  # the recipe's, with 0 for further checkpoints
    placed[:, list(places.values())] = coefficients[:, list(places)]
    groups = None
    if recipe.rows:
        groups = _rows_in(trajectory, recipe)
    # for another dtype, sums are rounded once, and not to that of the checkpoints before
    merged = trajectory.in_groups(groups).merge(placed[0] if groups is None else placed, wide=recipe.dtype is not None)
    return _cast(merged, recipe.dtype)


def _rows_in(trajectory: Trajectory, recipe: Recipe) -> LayerGroups:
    """The rows of a recipe for the tensors of a trajectory.

    Raises:
        TrajectoryError: a tensor has another number of channels.
    """
    of_recipe = recipe.rows_of
    rows_of: dict[str, TensorRows] = {}
    for spec in trajectory.tensors:
        # tensors that are the same in all checkpoints may have no rows; any will do
        rows = of_recipe.get(trajectory.renaming.undone(spec.name), TensorRows(0))
        if rows.channels > 1 and spec.shape[rows.axis : rows.axis + 1] != (rows.channels,):
            raise TrajectoryError(
                f"{recipe.study}: the recipe has {rows.channels} channels for {spec.name!r} of shape "
                f"{list(spec.shape)}: it is broken, export the model again."
            )
        rows_of[spec.name] = rows
    return LayerGroups(("all",), (len(recipe.coefficients),), rows_of, LAYERS)


def _check_checkpoints(trajectory: Trajectory, recipe: Recipe, places: Mapping[int, int]) -> None:
    """Refuse other checkpoints than the recipe's, and the same bytes in another layout.

    ``places``: the index of each in the recipe → its index in the trajectory.
    """
    for index, place in places.items():
        sha256 = trajectory.checkpoint_sha256[place]
        expected = recipe.checkpoint_sha256[index]
        if sha256 != expected:
            advice = "Name the same file, or pass the right --key."
            if trajectory.stored != recipe.stored:
                advice = f"The recipe combines weights stored as {recipe.stored or EXACT}: name the files themselves."
            raise TrajectoryError(
                f"Step {recipe.steps[index]} {trajectory.sources[place]}: this is not the checkpoint of the recipe: "
                f"SHA-256 {sha256[:12]}…, expected {expected[:12]}…. {advice}"
            )
    # of all checkpoints of the recipe, also those that are not there, in the layout of these
    trajectory_sha256 = trajectory.packed_layout.sha256(zip(recipe.steps, recipe.checkpoint_sha256, strict=True))
    if trajectory_sha256 != recipe.trajectory_sha256:
        raise TrajectoryError(
            "The checkpoints hold the bytes that the recipe names, under other tensor names, shapes or dtypes: "
            "use the files as they were saved."
        )


def _cast(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Copies on the CPU: floating-point tensors in ``dtype``, if one is given.

    Each has a memory of its own, since safetensors refuses tensors that share some.

    Raises:
        TrajectoryError: a weight is too large for ``dtype``.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        written_dtype = tensor.dtype
        if dtype is not None and tensor.is_floating_point():
            written_dtype = DTYPES[dtype]
        copied = tensor.detach().to("cpu", written_dtype, copy=True).contiguous()
        if written_dtype != tensor.dtype and not bool(torch.isfinite(copied).all()):  # what is too large became inf
            raise TrajectoryError(
                f"Tensor {name!r} has values too large for {dtype}: pass --dtype float32, or bfloat16."
            )
        result[name] = copied
    return result


def _statistics_in(recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of a recipe that no merge gives, such as the statistics of batch normalization."""
    if recipe.statistics is None:
        return {}
    try:
        return load(bytes.fromhex(recipe.statistics))
    except (ValueError, SafetensorError) as error:
        raise ObjectiveError(f"{recipe.study}: the recipe's statistics cannot be read: export it again") from error


def _lora_naming(sampler: Sampler | None, alphas: LoraAlphas) -> LoraNaming:
    """What the names of a LoRA for the pipeline of a sampler depend on; without one, those of a U-Net."""
    pipeline = getattr(sampler, "pipeline", None)
    unet_config = getattr(getattr(pipeline, "unet", None), "config", None)
    layers_per_block = getattr(unet_config, "layers_per_block", None)
    if not isinstance(layers_per_block, int):  # diffusers' conversion of names adds one to it, and takes no list
        layers_per_block = None
    component = "unet"
    if getattr(pipeline, "transformer", None) is not None:
        component = "transformer"
    return LoraNaming(component=component, alphas=alphas, layers_per_block=layers_per_block)
