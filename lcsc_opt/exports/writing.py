"""Writing a merged model, with its recipe inside, in the form that its user loads."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import shutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.files import replacing
from lcsc_opt.base.imports import import_extra
from lcsc_opt.checkpoints.weights import difference, write_safetensors
from lcsc_opt.exports.recipe import ENTRY, FILE, Dtype, LoraNaming, Recipe
from lcsc_opt.sampling.lora import to_diffusers

Form = Literal["safetensors", "pt", "diffusers", "lora", "megatron", "mergekit"]
CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000  # of a file in a folder, as transformers wrote them
_CLASS, _MODEL_TYPE = "_class_name", "model_type"  # in a configuration of diffusers, of transformers
_FORMS: dict[str, Form] = {".safetensors": "safetensors", **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), "pt")}
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as study files say it


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a model is written, in which form, and in which dtype.

    Attributes:
        path: a file, or the folder that diffusers or transformers loads.
        form: what is written there.
        dtype: of floating-point tensors; ``None`` leaves each in its own.
        config: a folder of diffusers or transformers, or its ``config.json``, that the written folder takes its
            configuration from; ``None`` takes it from the objective's network.
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
            StudySpecError: an unknown suffix, form or dtype; a path that is taken.
        """
        form = form or (_FORMS.get(path.suffix) if path.suffix else "diffusers")
        if form is None:
            raise StudySpecError(f"{path}: {path.suffix} is no form of a model; end it in .safetensors or .pt, or --as")
        dtype = _SHORT_DTYPES.get(dtype or "", dtype)
        for option, value, allowed in (("--as", form, get_args(Form)), ("--dtype", dtype, (None, *get_args(Dtype)))):
            if value not in allowed:
                names = ", ".join(filter(None, allowed))
                raise StudySpecError(f"{option}: expected one of {names}, got {value!r}")
        if path.exists() and not overwrite:
            raise StudySpecError(f"{path}: exists already; give another name, or --overwrite")
        if path.is_dir() and not (path / FILE).exists() and any(path.iterdir()):
            raise StudySpecError(f"{path}: holds other things than an exported model; give another name")
        return cls(path, typing.cast("Form", form), dtype, config)

    def config_text(self, default: str | None = None) -> str | None:
        """``config.json`` for the form ``diffusers``: the user's, or the ``default``; ``None`` for other forms.

        Raises:
            ObjectiveError: it is not there, or is another kind of file.
        """
        if self.form != "diffusers":
            return None
        if self.config is None:
            if default is None:
                raise ObjectiveError(f"{self.path}: has no configuration of diffusers; pass --config FOLDER of a model")
            return default
        file = self.config / CONFIG if self.config.is_dir() else self.config
        try:
            text = file.read_text(encoding="utf-8")
            content = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ObjectiveError(f"--config: {file} is no configuration that can be read: {error}") from error
        if not isinstance(content, dict) or not any(isinstance(content.get(k), str) for k in (_CLASS, _MODEL_TYPE)):
            raise ObjectiveError(
                f"--config: {file} is of no model of diffusers or transformers ({_CLASS}, {_MODEL_TYPE}); name a "
                "model's folder"
            )
        return text

    def write(self, weights: dict[str, Tensor], recipe: Recipe, config: str | None) -> None:
        """Write weights, recipe and the ``config`` of :meth:`config_text` as a whole; no reader ever sees half of it.

        Raises:
            ObjectiveError: the weights do not fit the configuration.
            TrajectoryError: the form is ``lora``, and the weights are not a LoRA.
            StudyStoreError: the disk refuses.
        """
        if self.form == "diffusers":
            _check_fits(str(config), weights)
        if self.form == "lora":
            naming = recipe.lora or LoraNaming()
            layers = naming.layers_per_block
            unet = None if layers is None else types.SimpleNamespace(layers_per_block=layers)
            weights = to_diffusers(weights, naming.alphas, component=naming.component, unet_config=unet)
        text = recipe.as_text()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as path:
                if self.form == "diffusers":
                    path.mkdir()
                    (path / CONFIG).write_text(str(config), encoding="utf-8")
                    (path / FILE).write_text(text, encoding="utf-8")
                if self.form == "pt":
                    with path.open("wb") as file:  # of a path, torch would write the name into the file
                        torch.save({"state_dict": weights, ENTRY: text}, file)
                elif self.form == "diffusers":
                    _write_shards(weights, path, str(config), {"format": "pt", ENTRY: text})
                else:
                    write_safetensors(weights, path, {"format": "pt", ENTRY: text})
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's own writer raises the second
            needed = sum(tensor.nbytes for tensor in weights.values())
            reason = " ".join(str(error).split())
            if self.path.parent.is_dir() and needed > (free := shutil.disk_usage(self.path.absolute().parent).free):
                reason = f"{os.strerror(errno.ENOSPC)}: it takes {needed:,} bytes, and {free:,} are free"
            raise StudyStoreError(f"{self.path}: cannot be written: {reason}") from error


def _write_shards(weights: dict[str, Tensor], folder: Path, config: str, texts: Mapping[str, str]) -> None:
    """Write one file, or where it were larger than :data:`SHARD_BYTES` several and an index, as ``save_pretrained``."""
    stem = "diffusion_pytorch_model" if _CLASS in json.loads(config) else "model"
    hub = import_extra("huggingface_hub")
    split = hub.split_torch_state_dict_into_shards(
        weights, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors({name: weights[name] for name in names}, folder / file, texts)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _check_fits(config: str, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not fit the model of a configuration: a library would fill gaps with random numbers."""
    settings = json.loads(config)
    is_diffusers = _CLASS in settings
    name = str(settings[_CLASS] if is_diffusers else next(iter(settings.get("architectures") or ()), None))
    library = import_extra("diffusers" if is_diffusers else "transformers")
    model: Any = getattr(library, name, None) if name.isidentifier() else None
    base = library.ModelMixin if is_diffusers else library.PreTrainedModel
    is_model: bool = inspect.isclass(model) and issubclass(model, base)
    if not is_model:
        raise ObjectiveError(
            f"the configuration names {name!r}, which is no model of this version of {library.__name__}"
        )
    with torch.device("meta"):
        try:
            made: Any = model.from_config(settings) if is_diffusers else model(model.config_class.from_dict(settings))
        except Exception as error:  # whatever a model raises of wrong settings
            raise ObjectiveError(f"the configuration does not make a {name}: {error}") from error
    tied = getattr(made, "all_tied_weights_keys", ())  # save_pretrained leaves them out
    expected = {name: one for name, one in made.state_dict().items() if name in weights or name not in tied}
    if (differs := difference(weights, expected)) is not None:
        raise ObjectiveError(
            f"the merged model does not fit the configuration's: it {differs}; pass --config FOLDER of the right one, "
            "or --as safetensors"
        )
