"""Writing a merged model, with its recipe inside, in the form that its user loads."""

from __future__ import annotations

import dataclasses
import json
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from lcsc_opt.base.errors import StudySpecError, StudyStoreError, text_of
from lcsc_opt.base.files import replacing
from lcsc_opt.base.imports import import_extra
from lcsc_opt.checkpoints.names import torch_suffix
from lcsc_opt.checkpoints.rewriting import Document
from lcsc_opt.checkpoints.weights import write_safetensors
from lcsc_opt.exports.model_config import ModelConfig
from lcsc_opt.exports.recipe import ENTRY, FILE, Dtype, LoraNaming, Recipe
from lcsc_opt.sampling.lora import to_diffusers

Form = Literal["safetensors", "pt", "diffusers", "lora"]
SHARD_BYTES = 5_000_000_000  # of a file in a folder, as transformers wrote them


class Content(NamedTuple):
    """What is written.

    Attributes:
        weights: name → tensor.
        recipe: how they were merged.
        config: the configuration of a model's folder; ``None`` for a file.
        document: the content of a trainer's file, with the weights in it; ``None`` is their state dict.
        header: texts of the checkpoints' headers, for a file of safetensors.
    """

    weights: dict[str, Tensor]
    recipe: Recipe
    config: ModelConfig | None
    document: Document | None
    header: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a model is written, in which form, and in which dtype.

    Attributes:
        path: a file, or the folder that diffusers or transformers loads.
        form: how the model is written.
        dtype: the dtype of floating-point tensors; ``None`` leaves each in its own.
        config: a folder of diffusers or transformers, or its ``config.json``; its configuration and tokenizer are
            copied into the written folder. ``None`` looks for one.
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
        form: Form | None = None,
        dtype: Dtype | None = None,
        config: Path | None = None,
        overwrite: bool = False,
    ) -> Destination:
        """Check what a user asked for; without a form, the suffix decides. Another export is replaced on request only.

        Raises:
            StudySpecError: an unknown suffix; a path that exists already.
        """
        if path.exists() and not overwrite:
            raise StudySpecError(f"{path}: exists already; give another name, or pass --overwrite")
        is_export = (path / FILE).exists()
        if path.is_dir() and not is_export and any(path.iterdir()):
            raise StudySpecError(f"{path}: holds files other than an exported model; give another name")
        return cls(path, form or _form_of(path), dtype, config)

    def write(self, content: Content) -> None:
        """Write a model. No reader ever sees a part of it.

        Raises:
            ObjectiveError: the weights do not fit the configuration.
            TrajectoryError: the form is ``lora``, and the weights are not a LoRA.
            StudyStoreError: the disk refuses.
        """
        if content.config is not None:
            content.config.check_fits(content.weights)
        if self.form == "lora":
            naming = content.recipe.lora or LoraNaming()
            naming.alphas.check_start()
            # no header: it may hold the alphas, which are multiplied into these weights
            content = content._replace(weights=_named_by_diffusers(content.weights, naming), header={})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as path:
                self._write_to(path, content)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's own writer raises the second
            raise StudyStoreError(f"{self.path}: cannot be written: {_reason_of(error)}") from error

    def _write_to(self, path: Path, content: Content) -> None:
        """Write to ``path``, a new one that gets the name of the model when it is complete."""
        recipe = content.recipe.as_text()
        texts = {"format": "pt", ENTRY: recipe}
        if content.config is not None:
            path.mkdir()
            content.config.write(path, self.dtype)
            (path / FILE).write_text(recipe, encoding="utf-8")
            _write_shards(content.weights, path, content.config.library.stem, texts)
        elif self.form == "pt":
            with path.open("w+b") as file:  # given a path, torch would write its name into the file
                (content.document or Document(content.weights)).write(file)
                with zipfile.ZipFile(file, "a") as archive:  # an entry that ``torch.load`` does not read
                    # torch refuses entries beside its folder; ZipInfo without the time: the same model is the same file
                    folder, separator, _ = archive.namelist()[0].rpartition("/")
                    archive.writestr(zipfile.ZipInfo(f"{folder.partition('/')[0]}{separator}{ENTRY}"), recipe)
        else:
            # no hashes, as kohya's sshs_model_hash, which are of other weights than these
            header = {name: text for name, text in content.header.items() if not name.endswith("hash")}
            write_safetensors(content.weights, path, {**header, **texts})


def _reason_of(error: BaseException) -> str:
    """What the system said of the first failure, where the library that wrote only tells what that led to."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        first = first.__context__
    return text_of(error)


def _form_of(path: Path) -> Form:
    """The form that the ending of a name asks for; a name without one is a folder's."""
    if not path.suffix:
        return "diffusers"
    if path.suffix == ".safetensors":
        return "safetensors"
    if torch_suffix(path) not in ("", ".pkl"):  # a .pkl is expected to be a pickled network
        return "pt"
    raise StudySpecError(f"{path}: {path.suffix} is not a known form; use .safetensors or .pt, or pass --as")


def _named_by_diffusers(weights: Mapping[str, Tensor], naming: LoraNaming) -> dict[str, Tensor]:
    """A LoRA under the names of diffusers, with its alphas multiplied in."""
    unet_config = None
    if naming.layers_per_block is not None:  # all that diffusers asks of the U-Net's configuration
        unet_config = types.SimpleNamespace(layers_per_block=naming.layers_per_block)
    return to_diffusers(weights, naming.alphas, component=naming.component, unet_config=unet_config)


def _write_shards(weights: dict[str, Tensor], folder: Path, stem: str, texts: Mapping[str, str]) -> None:
    """Write one file ``STEM.safetensors``; or as ``save_pretrained``, several of :data:`SHARD_BYTES` and an index.

    ``texts`` are in the header of each.
    """
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
