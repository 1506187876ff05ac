"""The small files of a model's folder, which decide its results as much as its weights do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lcsc_opt.sampling.diffusers_folder import find_model_config

MODEL_FILES = "model_files"  # in the description of an objective: name of a file → its digest
# of transformers: tokenizers, chat templates, processors of images, how to generate; and of sentence-transformers
_PROCESSING_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "chat_template.*",
    "*processor_config.json",
    "generation_config.json",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
)


def network_files(folder: Path) -> list[Path]:
    """The configuration of a model of transformers or diffusers, and what belongs to its tokenizer.

    Raises:
        ObjectiveError: the folder has no ``config.json``.
    """
    config = find_model_config(folder)
    return [config, *processing_files(config.parent)]


def processing_files(folder: Path) -> list[Path]:
    """The files of a folder that say how text and images are prepared for its model, and how the model generates."""
    return [path for pattern in _PROCESSING_FILES for path in folder.glob(pattern) if path.is_file()]


def digests(files: Iterable[Path]) -> dict[str, str]:
    """File name → SHA-256 of its bytes, in hex."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
