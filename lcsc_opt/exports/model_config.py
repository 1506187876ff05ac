"""The configuration in a model's folder: which library loads it, what goes with it, and which weights fit it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.lora import ADAPTER_CONFIG, lora_flavour
from lcsc_opt.checkpoints.names import has_weights_suffix, is_plain_name
from lcsc_opt.checkpoints.weights import difference
from lcsc_opt.objective.model_files import processing_files

CONFIG = "config.json"
_MODULES = "modules.json"
_DTYPES = ("dtype", "torch_dtype")  # of transformers 5, and of those before it


class _Library(NamedTuple):
    """A library, and how its folders are known."""

    name: str
    sign: str  # the entry by which its configurations are known
    file: str
    stem: str  # of its files of weights


_LIBRARIES = (
    _Library("peft", "peft_type", ADAPTER_CONFIG, "adapter_model"),
    _Library("diffusers", "_class_name", CONFIG, "diffusion_pytorch_model"),
    _Library("transformers", "model_type", CONFIG, "model"),
)


def _modules_of_sentence_transformers(folder: Path) -> list[Path]:
    """The folders of what sentence-transformers applies to the model's output, as its pooling."""
    try:
        paths = [module["path"] for module in json.loads((folder / _MODULES).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return [
        folder / path for path in paths if isinstance(path, str) and is_plain_name(path) and (folder / path).is_dir()
    ]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model of diffusers or transformers, or of an adapter of PEFT.

    Attributes:
        settings: what it says.
        library: what loads it.
        folder: where it lies, with tokenizers and the like; ``None`` for that of a network in memory.
    """

    settings: Mapping[str, Any]
    library: _Library
    folder: Path | None

    @classmethod
    def parse(cls, text: str, folder: Path | None = None) -> ModelConfig:
        """The configuration in a text.

        Raises:
            ObjectiveError: it is of none of these libraries.
            ValueError, RecursionError: it is no JSON.
        """
        settings = json.loads(text)
        for library in _LIBRARIES:
            if isinstance(settings, dict) and isinstance(settings.get(library.sign), str):
                return cls(settings, library, folder)
        signs = ", ".join(library.sign for library in _LIBRARIES)
        raise ObjectiveError(f"it is not for a model of diffusers or transformers, or an adapter of PEFT ({signs})")

    @classmethod
    def read(cls, place: Path) -> ModelConfig:
        """The configuration in a file, or in a model's folder.

        Raises:
            ObjectiveError: there is none, or one of something else.
        """
        file = place
        if place.is_dir():
            file = place / ADAPTER_CONFIG
            if not file.is_file():
                file = place / CONFIG
        try:
            return cls.parse(file.read_text(encoding="utf-8"), file.parent)
        except (OSError, ValueError, RecursionError, ObjectiveError) as error:
            raise ObjectiveError(
                f"--config: {file} cannot be read as a configuration: {error}; name a model's folder"
            ) from error

    @property
    def is_adapter(self) -> bool:
        """Whether it is that of an adapter of PEFT."""
        return self.library.name == "peft"

    def write(self, new_folder: Path, dtype: str | None) -> None:
        """Write it into a new folder, with what lies beside it, such as tokenizers.

        If the settings name a dtype, as which transformers loads the weights, ``dtype`` replaces it; ``None`` keeps it.
        """
        settings = dict(self.settings)
        for key in _DTYPES:
            if dtype is not None and key in settings:
                settings[key] = dtype
        text = json.dumps(settings, indent=2)
        (new_folder / self.library.file).write_text(f"{text}\n", encoding="utf-8")
        if self.folder is None:
            return
        for file in processing_files(self.folder):
            shutil.copyfile(file, new_folder / file.name)
        for part in _modules_of_sentence_transformers(self.folder):
            shutil.copytree(part, new_folder / part.name)
            if any(has_weights_suffix(file) for file in part.iterdir()):
                notice(f"{part.name}: copied as it is in {self.folder.name}, since its weights are not combined")

    def check_fits(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit the model: a library would fill gaps with random numbers.

        Raises:
            ObjectiveError: they do not fit, or it does not make a model.
        """
        if self.is_adapter:
            if lora_flavour(weights) != "peft":
                raise ObjectiveError("the configuration belongs to an adapter, but the merged model is not one of PEFT")
            return
        network = self._network_on_meta()
        tied_names = getattr(network, "all_tied_weights_keys", ())  # save_pretrained leaves them out
        expected = {
            name: tensor for name, tensor in network.state_dict().items() if name in weights or name not in tied_names
        }
        differences = difference(weights, expected)
        if differences is not None:
            raise ObjectiveError(
                f"the merged model does not fit the model of the configuration: it {differences}; pass --config FOLDER "
                "of the right one, or --as safetensors"
            )

    def _network_on_meta(self) -> Any:
        """The network, without memory for its weights.

        Raises:
            ObjectiveError: the library has no such network, or cannot build it.
        """
        library = import_extra(self.library.name)
        is_diffusers = self.library.name == "diffusers"
        if is_diffusers:
            base_class = library.ModelMixin
            name = str(self.settings["_class_name"])
        else:
            base_class = library.PreTrainedModel
            name = str(next(iter(self.settings.get("architectures") or ()), None))
        network_class: Any = getattr(library, name, None) if name.isidentifier() else None
        is_network: bool = inspect.isclass(network_class) and issubclass(network_class, base_class)
        if not is_network:
            raise ObjectiveError(
                f"the configuration names {name!r}, which is not a model in this version of {library.__name__}"
            )
        with torch.device("meta"):
            try:
                if is_diffusers:
                    return network_class.from_config(self.settings)
                return network_class(network_class.config_class.from_dict(self.settings))
            except Exception as error:  # models raise all kinds of errors for wrong settings
                raise ObjectiveError(f"the configuration cannot build a {name}: {error}") from error
