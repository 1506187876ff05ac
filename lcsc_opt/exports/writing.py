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
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.files import replacing, shown_size
from lcsc_opt.base.imports import import_extra
from lcsc_opt.checkpoints.lora import lora_flavour
from lcsc_opt.checkpoints.names import torch_suffix
from lcsc_opt.checkpoints.weights import difference, write_safetensors
from lcsc_opt.exports.recipe import ENTRY, FILE, TORCH_ENTRY, Dtype, LoraNaming, Recipe
from lcsc_opt.objective.model_files import PROCESSING_FILES
from lcsc_opt.sampling.lora import to_diffusers

Form = Literal["safetensors", "pt", "diffusers", "lora"]
CARD = "README.md"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
_PIPELINE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")  # with 1_Pooling …
SHARD_BYTES = 5_000_000_000  # of a file in a folder, as transformers wrote them
_DIFFUSERS_CLASS = "_class_name"  # in a configuration of diffusers
_TRANSFORMERS_TYPE = "model_type"  # in one of transformers
_PEFT_TYPE = "peft_type"  # in one of PEFT
_DTYPES_IN_CONFIG = ("dtype", "torch_dtype")  # of transformers 5, and of those before it
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as study files name them


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a model is written, in which form, and in which dtype.

    Attributes:
        path: a file, or the folder that diffusers or transformers loads.
        form: how the model is written.
        dtype: the dtype of floating-point tensors; ``None`` leaves each in its own.
        config: a folder of diffusers or transformers, or its ``config.json``; its configuration and tokenizer are
            copied into the written folder. ``None`` uses the configuration of the objective's network.
        overwrite: whether an export that is there may be replaced.
    """

    path: Path
    form: Form
    dtype: str | None = None
    config: Path | None = None
    overwrite: bool = False

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
            StudySpecError: an unknown suffix, form or dtype; a path that exists already.
        """
        if form is None:
            form = _form_of(path)
        _check_choice("--as", form, get_args(Form))
        if dtype is not None:
            dtype = _SHORT_DTYPES.get(dtype, dtype)
            _check_choice("--dtype", dtype, get_args(Dtype))
        if path.exists() and not overwrite:
            raise StudySpecError(f"{path}: exists already; give another name, or pass --overwrite")
        is_export = (path / FILE).exists()
        if path.is_dir() and not is_export and any(path.iterdir()):
            raise StudySpecError(f"{path}: holds files other than an exported model; give another name")
        return cls(path, typing.cast("Form", form), dtype, config, overwrite)

    def config_text(self, default: str | None = None) -> str | None:
        """``config.json`` for the form ``diffusers``: the user's, or the ``default``; ``None`` for other forms.

        Raises:
            ObjectiveError: there is none, or it is another kind of file.
        """
        if self.form != "diffusers":
            return None
        file = self._config_file
        if file is not None:
            return _with_dtype(_read_config(file), self.dtype)
        if default is None:
            raise ObjectiveError(
                f"{self.path}: a model folder needs a configuration of diffusers or transformers; pass --config FOLDER "
                "of a model. An adapter needs none: end the name in .safetensors"
            )
        return default

    def write(
        self,
        weights: dict[str, Tensor],
        recipe: Recipe,
        config: str | None,
        card: str | None = None,
        document: Mapping[Any, Any] | None = None,
        header: Mapping[str, str] | None = None,
    ) -> None:
        """Write weights, recipe and the ``config`` of :meth:`config_text`. No reader ever sees a part of it.

        A folder also gets the model card, where there is one. A file of torch holds the ``document`` that has the
        weights in it, else their state dict; the recipe is an entry of its archive, which ``torch.load`` does not read.
        A file of safetensors has the ``header`` of the checkpoints, without hashes of their weights.

        A folder of transformers also gets the tokenizer and the like of the folder that ``config`` was read from.

        Raises:
            ObjectiveError: the weights do not fit the configuration.
            TrajectoryError: the form is ``lora``, and the weights are not a LoRA.
            StudyStoreError: the disk refuses.
        """
        if self.form == "diffusers":
            _check_fits(str(config), weights)
        if self.form == "lora":
            weights = _named_by_diffusers(weights, recipe.lora or LoraNaming())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = {name: text for name, text in (header or {}).items() if not name.endswith("hash")}
            with replacing(self.path) as path:
                self._write_to(path, weights, recipe.as_text(), config, card, document or weights, kept)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's own writer raises the second
            reason = _reason_of(error)
            needed = sum(tensor.nbytes for tensor in weights.values())
            if self.path.parent.is_dir():
                free = shutil.disk_usage(self.path.absolute().parent).free
                if needed > free:
                    reason = (
                        f"{os.strerror(errno.ENOSPC)}: the model needs {shown_size(needed)}, but "
                        f"only {shown_size(free)} is free; choose another folder"
                    )
            raise StudyStoreError(f"{self.path}: cannot be written: {reason}") from error

    def _write_to(
        self,
        path: Path,
        weights: dict[str, Tensor],
        recipe: str,
        config: str | None,
        card: str | None,
        document: Mapping[Any, Any],
        header: Mapping[str, str],
    ) -> None:
        texts = {"format": "pt", ENTRY: recipe}
        if self.form == "diffusers":
            path.mkdir()
            name = ADAPTER_CONFIG if _PEFT_TYPE in json.loads(str(config)) else CONFIG
            (path / name).write_text(str(config), encoding="utf-8")
            (path / FILE).write_text(recipe, encoding="utf-8")
            _write_shards(weights, path, str(config), texts)
            self._copy_processing_files(path)
            if card is not None:
                (path / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
        elif self.form == "pt":
            with path.open("w+b") as file:  # given a path, torch would write its name into the file
                torch.save(document, file)
                with zipfile.ZipFile(file, "a") as archive:
                    archive.writestr(zipfile.ZipInfo(TORCH_ENTRY), recipe)
        elif self.form == "lora":  # alphas are multiplied in
            write_safetensors(weights, path, texts)
        else:
            write_safetensors(weights, path, {**header, **texts})

    def _copy_processing_files(self, folder: Path) -> None:
        if self.config_folder is None:
            return
        for pattern in (*PROCESSING_FILES, *_PIPELINE_FILES):
            for file in self.config_folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        if (self.config_folder / _PIPELINE_FILES[0]).is_file():
            for part in self.config_folder.glob("[0-9]*_*"):
                if part.is_dir():
                    shutil.copytree(part, folder / part.name)

    @property
    def config_folder(self) -> Path | None:
        """The folder that the configuration was read from."""
        return None if self._config_file is None else self._config_file.parent

    @property
    def is_adapter_folder(self) -> bool:
        """Whether it is a folder with the configuration of an adapter of PEFT."""
        return self.form == "diffusers" and self._config_file is not None and self._config_file.name == ADAPTER_CONFIG

    @property
    def _config_file(self) -> Path | None:
        if self.config is None or not self.config.is_dir():
            return self.config
        adapter_config = self.config / ADAPTER_CONFIG
        return adapter_config if adapter_config.is_file() else self.config / CONFIG


def _reason_of(error: BaseException) -> str:
    """What the system said, where the library that wrote only tells what that led to."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        first = first.__context__
    return " ".join(str(error).split())


def _form_of(path: Path) -> Form:
    if not path.suffix:
        return "diffusers"
    if path.suffix == ".safetensors":
        return "safetensors"
    if torch_suffix(path) not in ("", ".pkl"):
        return "pt"
    raise StudySpecError(f"{path}: {path.suffix} is not a known form; use .safetensors or .pt, or pass --as")


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise StudySpecError(f"{option}: expected one of {', '.join(allowed)}, got {value!r}")


def _read_config(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ObjectiveError(f"--config: {file} cannot be read as a configuration: {error}") from error
    keys = (_DIFFUSERS_CLASS, _TRANSFORMERS_TYPE, _PEFT_TYPE)
    if not isinstance(content, dict) or not any(isinstance(content.get(key), str) for key in keys):
        raise ObjectiveError(
            f"--config: {file} is not for a model of diffusers or transformers, or an adapter of PEFT "
            f"({', '.join(keys)}); name a model's folder"
        )
    return text


def _with_dtype(config: str, dtype: str | None) -> str:
    """The configuration for weights of this dtype, which transformers loads by the dtype that it names."""
    content = json.loads(config)
    named = [key for key in _DTYPES_IN_CONFIG if key in content]
    if dtype is None or not named:
        return config
    content.update(dict.fromkeys(named, dtype))
    return json.dumps(content, indent=2) + "\n"


def _named_by_diffusers(weights: Mapping[str, Tensor], naming: LoraNaming) -> dict[str, Tensor]:
    unet_config = None
    if naming.layers_per_block is not None:
        unet_config = types.SimpleNamespace(layers_per_block=naming.layers_per_block)
    return to_diffusers(weights, naming.alphas, component=naming.component, unet_config=unet_config)


def _write_shards(weights: dict[str, Tensor], folder: Path, config: str, texts: Mapping[str, str]) -> None:
    """Write one file; or as ``save_pretrained``, several of :data:`SHARD_BYTES` at most and an index."""
    stem = "model"
    described = json.loads(config)
    if _DIFFUSERS_CLASS in described:
        stem = "diffusion_pytorch_model"
    elif _PEFT_TYPE in described:
        stem = "adapter_model"
    hub = import_extra("huggingface_hub")
    split = hub.split_torch_state_dict_into_shards(
        weights, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors({name: weights[name] for name in names}, folder / file, texts)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        index_file = folder / f"{stem}.safetensors.index.json"
        index_file.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _check_fits(config: str, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not fit the model of a configuration: a library would fill gaps with random numbers."""
    described = json.loads(config)
    if _PEFT_TYPE in described:
        if lora_flavour(weights) != "peft":
            raise ObjectiveError("the configuration belongs to an adapter, but the merged model is not one of PEFT")
        return
    network = _network_on_meta(described)
    tied_names = getattr(network, "all_tied_weights_keys", ())  # save_pretrained leaves them out
    state_dict = network.state_dict()
    names = [name for name in state_dict if name in weights or name not in tied_names]
    expected = {name: state_dict[name] for name in names}
    differences = difference(weights, expected)
    if differences is not None:
        raise ObjectiveError(
            f"the merged model does not fit the model of the configuration: it {differences}; pass --config FOLDER of "
            "the right one, or --as safetensors"
        )


def _network_on_meta(settings: dict[str, Any]) -> Any:
    """The network of a configuration, without memory for its weights."""
    if _DIFFUSERS_CLASS in settings:
        library = import_extra("diffusers")
        base_class = library.ModelMixin
        name = str(settings[_DIFFUSERS_CLASS])
    else:
        library = import_extra("transformers")
        base_class = library.PreTrainedModel
        name = str(next(iter(settings.get("architectures") or ()), None))
    network_class: Any = getattr(library, name, None) if name.isidentifier() else None
    is_network: bool = inspect.isclass(network_class) and issubclass(network_class, base_class)
    if not is_network:
        raise ObjectiveError(
            f"the configuration names {name!r}, which is not a model in this version of {library.__name__}"
        )
    with torch.device("meta"):
        try:
            if _DIFFUSERS_CLASS in settings:
                return network_class.from_config(settings)
            return network_class(network_class.config_class.from_dict(settings))
        except Exception as error:  # models raise all kinds of errors for wrong settings
            raise ObjectiveError(f"the configuration cannot build a {name}: {error}") from error
