"""A causal language model, scored by transformers' ``Trainer`` itself: its own collator, its own loss.

    objective:
      file: score.py
      settings: {checkpoints: runs/checkpoint-*, model: runs/checkpoint-500, score: "language_model:loss", size: 64}

The files of ``TEXTS`` have one text a line. Put your own data set and its preprocessing in place of ``examples``, and
your own trainer (as trl's ``SFTTrainer``) in place of ``Trainer``: a score that differs from the trainer's own, as in
how texts are cut or how tokens are counted, may fall where the trainer's rises.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

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
    """The trainer's loss of each batch, with its graph; their mean is its ``eval_loss`` of these examples."""
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    device = next(model.parameters()).device
    arguments = TrainingArguments("unused", use_cpu=device.type == "cpu", report_to=[])
    trainer = Trainer(model, arguments, data_collator=collate)
    data = examples(draw.group)
    drawn = np.random.default_rng(draw.seed).permutation(len(data))[: draw.size]
    order = np.sort(drawn)  # all of them make the trainer's own batches
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    for indices in batches:
        batch = collate([data[index] for index in indices]).to(device)
        _, items = trainer.get_batch_samples(iter([batch]), 1, device)  # over which the trainer takes the mean
        share = len(indices) * len(batches) / len(order)  # a smaller last batch counts less
        yield share * trainer.compute_loss(model, batch, num_items_in_batch=items)
