"""Writing a merged model, with its recipe inside, in the form that its user loads."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.files import replacing, why_refused
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.lora import LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.weights import write_safetensors
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports.model_folder import check_fits, config_of, read_config, write_folder
from lcsc_opt.exports.recipe import ENTRY, FILE, LoraNaming, Recipe, packed_trajectory, recipe_of
from lcsc_opt.objective.contract import Objective
from lcsc_opt.sampling.text_to_image.lora import save_lora
from lcsc_opt.trajectory.exact_merge import PackedCheckpoints, cast, merge_exactly
from lcsc_opt.trajectory.lora import trajectory_alphas

Form = Literal["safetensors", "pt", "diffusers", "lora"]

SUFFIXES: dict[str, Form] = {
    ".safetensors": "safetensors",
    ".pt": "pt",
    ".pth": "pt",
    ".ckpt": "pt",
    ".bin": "pt",
    "": "diffusers",
}
DTYPES = ("float32", "float16", "bfloat16")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as study files say it
STATE_DICT = "state_dict"  # where the weights are in a .pt file


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a model is written, in which form, and in which dtype.

    Attributes:
        path: a file, or the folder that diffusers loads.
        form: what is written there.
        dtype: of floating-point tensors; ``None`` leaves each in its own.
        config: a folder of diffusers, or its ``config.json``, that the written folder takes its configuration from;
            ``None`` takes it from the objective's network.
    """

    path: Path
    form: Form
    dtype: str | None = None
    config: Path | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        *,
        form: str | None = None,
        dtype: str | None = None,
        config: Path | None = None,
        overwrite: bool = False,
    ) -> Destination:
        """Check what a user asked for; without a form, the suffix decides.

        Raises:
            StudySpecError: an unknown suffix, form or dtype; a path that is taken, or whose folder does not exist.
        """
        if form is None and path.suffix not in SUFFIXES:
            raise StudySpecError(f"{path}: {path.suffix} is no form of a model; end it in .safetensors or .pt, or --as")
        chosen = (
            SUFFIXES[path.suffix] if form is None else _one_of("--as", form, ("safetensors", "pt", "diffusers", "lora"))
        )
        dtype = SHORT_DTYPES.get(dtype or "", dtype)
        if dtype is not None:
            _one_of("--dtype", dtype, DTYPES)
        if config is not None and chosen != "diffusers":
            raise StudySpecError(
                f"--config: is for the form diffusers, and {path} is written as {chosen}; leave it out"
            )
        if path.exists() and not overwrite:
            raise StudySpecError(f"{path}: exists already; give another name, or --overwrite")
        if path.exists() and path.is_dir() != (chosen == "diffusers"):
            kind = "a folder" if path.is_dir() else "a file"
            raise StudySpecError(f"{path}: is {kind}, which the form {chosen} cannot replace; give another name")
        if path.is_dir() and not (path / FILE).exists() and any(path.iterdir()):
            raise StudySpecError(f"{path}: holds other things than an exported model; give another name")
        if not path.absolute().parent.is_dir():
            raise StudySpecError(f"{path}: the folder {path.absolute().parent} does not exist")
        return cls(path, chosen, dtype, config)  # type: ignore[arg-type]


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise StudySpecError(f"{option}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def export(study: StoredStudy, objective: Objective, to: Destination, *, number: int | None = None) -> Recipe:
    """Write the best model so far, or one trial's. It only reads the database: the study may be running meanwhile.

    Returns:
        The recipe inside the model.

    Raises:
        ObjectiveError: the objective has no weights, or they do not fit the configuration.
        StudyStoreError: the checkpoints are not those of the study, no such trial, or the file cannot be written.
        TrajectoryError: the checkpoints are damaged.
    """
    recipe = recipe_of(study, objective, number=number, dtype=to.dtype)
    config = _config(to, objective)
    if to.form == "lora":
        recipe = recipe.model_copy(update={"lora": _lora_naming(study, objective)})
    weights = merge_exactly(PackedCheckpoints(packed_trajectory(objective)), recipe.combination(), dtype=to.dtype)
    if statistics := objective.statistics(np.array(recipe.coefficients)):
        weights |= (kept := cast(dict(statistics), to.dtype))
        recipe = recipe.model_copy(update={"statistics": save(kept).hex()})
    write(weights, recipe, to, config=config)
    if to.form != "lora" and lora_flavour(weights) not in (None, "kohya"):
        notice(f"{to.path}: holds a LoRA under its own names; --as lora writes what load_lora_weights loads")
    return recipe


def _lora_naming(study: StoredStudy, objective: Objective) -> LoraNaming:
    """The naming of the study's LoRA, with the alphas that it was searched with."""
    pipeline = getattr(objective.sampler, "pipeline", None)
    component = "unet" if getattr(pipeline, "transformer", None) is None else "transformer"
    layers = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "layers_per_block", None)
    known: Any = study.attributes.get("fingerprint")
    for name in ("objective", "sampler", "lora", "alphas"):  # as a text-to-image objective describes itself
        known = known.get(name) if isinstance(known, dict) else None
    return LoraNaming(
        component=component,
        alphas=LoraAlphas(**known) if known else trajectory_alphas(packed_trajectory(objective)),
        layers_per_block=layers if isinstance(layers, int) else None,
    )


def _config(to: Destination, objective: Objective) -> str | None:
    if to.form != "diffusers":
        return None
    config = config_of(objective) if to.config is None else read_config(to.config)
    if config is None:
        raise ObjectiveError(
            f"{to.path}: the objective's network has no configuration of diffusers; pass --config FOLDER of a model "
            "that diffusers saved"
        )
    return config


def write(
    weights: dict[str, Tensor],
    recipe: Recipe,
    to: Destination,
    *,
    config: str | None = None,
) -> None:
    """Write weights and recipe as a whole; no reader ever sees half of it.

    Args:
        weights: name → tensor.
        recipe: how they were merged.
        to: where and in which form.
        config: of diffusers; the form ``diffusers`` needs it.

    Raises:
        ObjectiveError: the weights do not fit the configuration.
        TrajectoryError: the form is ``lora``, and the weights are not a LoRA.
        StudyStoreError: the disk refuses.
    """
    text = recipe.as_text()
    metadata = {"format": "pt", ENTRY: text}
    if to.form == "diffusers":
        check_fits(str(config), weights)
    naming = recipe.lora or LoraNaming()
    layers = naming.layers_per_block
    lora = functools.partial(
        save_lora,
        alphas=naming.alphas,
        component=naming.component,
        unet_config=None if layers is None else types.SimpleNamespace(layers_per_block=layers),
    )
    writers: dict[Form, Callable[[Path], None]] = {
        "safetensors": lambda path: write_safetensors(weights, path, metadata),
        "pt": lambda path: _save(path, {STATE_DICT: weights, ENTRY: text}),
        "diffusers": lambda path: write_folder(path, weights, str(config), metadata, recipe=text),
        "lora": lambda path: lora(weights, path, "diffusers", {ENTRY: text}),
    }
    try:
        with replacing(to.path) as path:
            writers[to.form](path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own writer raises the second
        needed = sum(tensor.nbytes for tensor in weights.values())
        reason = why_refused(error, to.path.absolute().parent, needed)
        raise StudyStoreError(f"{to.path}: cannot be written: {reason}") from error


def _save(path: Path, content: dict[str, Any]) -> None:
    """As a file of torch with the same bytes each time: of a path, torch would write the name into the file."""
    with path.open("wb") as file:
        torch.save(content, file)
