"""A causal language model, scored as transformers' ``Trainer`` evaluates it: its own collator, its own loss.

    objective:
      file: score.py
      settings: {checkpoints: runs/checkpoint-*, model: runs/checkpoint-500, score: "language_model:loss", size: 64}

The files of ``TEXTS`` have one text a line. Put your own data set and its preprocessing in place of ``examples``: a
score that differs from the trainer's own, as in how texts are cut, may fall where the trainer's rises.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

TOKENIZER = "runs/checkpoint-500"
TEXTS = {"search": "validation.txt", "selection": "selection.txt", "held-out": "test.txt"}
BATCH = 8  # examples; the trainer's per_device_eval_batch_size
LONGEST = 512  # tokens


@functools.cache
def tokenizer() -> Any:
    """The tokenizer of the training."""
    return AutoTokenizer.from_pretrained(TOKENIZER)


@functools.cache
def examples(group: str) -> list[dict[str, Any]]:
    """The tokens of each text, as a trainer's data set has them."""
    lines = [line for line in Path(TEXTS[group]).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [dict(tokenizer()(line, truncation=True, max_length=LONGEST)) for line in lines]


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The model's own loss of each batch, with its graph; their mean is the trainer's ``eval_loss``."""
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    data = examples(draw.group)
    device = next(model.parameters()).device
    order = np.random.default_rng(draw.seed).permutation(len(data))[: draw.size]
    for first in range(0, len(order), BATCH):
        batch = collate([data[index] for index in order[first : first + BATCH]])
        yield model(**batch.to(device)).loss
