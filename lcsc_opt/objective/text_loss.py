"""The loss of a causal language model on a text file: the setting ``text`` of ``score.py``, and a command.

    python -m lcsc_opt.objective.text_loss ADAPTER TEXT GROUP SEED SIZE

prints the losses of an adapter of peft, whose base model must be on this machine, as ``{"losses": [...]}``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import import_extra, quiet_libraries
from lcsc_opt.objective.scorer import Draw

CONTEXT = 128  # tokens of a sequence, fewer if the model or the text has fewer
ITEMS = 64  # sequences of a draw without a size
BATCH = 16  # sequences at once
_FEWEST_TOKENS = 100  # of a whole text
_PARTS = {"search": (0.0, 0.6), "selection": (0.6, 0.8), "held-out": (0.8, 1.0)}  # of the text, from start to end


class TextLoss:
    """The cross-entropy of sequences of a text, in nats a token: ``loss(model, draw)`` yields them batch by batch.

    Searches measure on the first 60 % of the text, the choice among the best trials on the next 20 %, and reports on
    the last 20 %. Sequences begin at random tokens of their part.

    Args:
        text: a file in UTF-8.
        tokenizer: a folder with the files of a tokenizer of transformers.

    Attributes:
        name: the text's name with a hash of its content, for fingerprints.

    Raises:
        ObjectiveError: the text cannot be read or is too short, or there is no tokenizer.
    """

    __name__ = "cross-entropy"

    def __init__(self, text: Path, tokenizer: Path) -> None:
        try:
            content = text.read_bytes()
            decoded = content.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ObjectiveError(f"text: {text}: cannot be read as UTF-8 ({error})") from error
        self.name = f"{text.name}:{hashlib.sha256(content).hexdigest()[:12]}"
        tokens = torch.tensor(_tokenizer(tokenizer)(decoded)["input_ids"])
        if len(tokens) < _FEWEST_TOKENS:
            raise ObjectiveError(f"text: {text}: has {len(tokens)} tokens; expected at least {_FEWEST_TOKENS}")
        self._parts: dict[str, Tensor] = {}
        for group, (start, end) in _PARTS.items():
            self._parts[group] = tokens[int(start * len(tokens)) : int(end * len(tokens))]

    def __call__(self, model: nn.Module, draw: Draw) -> Iterator[Tensor]:
        """Yield the losses ``[BATCH]`` of ``draw.size`` sequences, with their graph."""
        part = self._parts[draw.group]
        config: Any = getattr(model, "config", None)
        longest = getattr(config, "max_position_embeddings", None) or CONTEXT
        context = min(CONTEXT, longest, len(part) - 1)
        starts = np.random.default_rng(draw.seed).integers(len(part) - context, size=draw.size or ITEMS)
        device = next(model.parameters()).device
        for first in range(0, len(starts), BATCH):
            sequences = [part[start : start + context] for start in starts[first : first + BATCH]]
            tokens = torch.stack(sequences).to(device)
            logits = model(input_ids=tokens).logits[:, :-1].float()
            yield F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; no code of the folder runs.

    Raises:
        ObjectiveError: there is none.
    """
    transformers = import_extra("transformers")
    try:
        with quiet_libraries():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ObjectiveError(f"text: {folder}: has no tokenizer that can be loaded ({reason})") from error


def adapter_losses(adapter: Path, text: Path, draw: Draw) -> list[float]:
    """The losses of an adapter of peft on its base model.

    Args:
        adapter: its folder; ``base_model_name_or_path`` of its configuration is a folder or a name at the hub.
        text: as for :class:`TextLoss`.
        draw: on which data.

    Raises:
        ObjectiveError: as :class:`TextLoss`, or the base model cannot be loaded.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path"))
    transformers = import_extra("transformers")
    peft = import_extra("peft")
    try:
        with quiet_libraries():
            network = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
            model = peft.PeftModel.from_pretrained(network, adapter).eval()
    except Exception as error:  # torn weights and wrong configurations have exceptions of their own libraries
        reason = " ".join(str(error).split())[:200]
        raise ObjectiveError(f"{adapter}: the adapter or its base model {base} cannot be loaded: {reason}") from error
    with torch.no_grad():
        return torch.cat(list(TextLoss(text, Path(base))(model, draw))).tolist()


def main(arguments: Sequence[str]) -> None:
    """Print the losses of an adapter."""
    adapter, text, group, seed, size = arguments
    draw = Draw(group, int(seed), int(size))
    sys.stdout.write(json.dumps({"losses": adapter_losses(Path(adapter), Path(text), draw)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
