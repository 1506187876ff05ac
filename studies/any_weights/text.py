"""A small language model of characters: its training with transformers, and its score for ``text.yaml``.

    python text.py        # about two minutes on two cores; writes runs/text/checkpoint-*/, each in shards

The text is the help that comes with Python. A tenth of the topics is for the search, a tenth for the choice of the
answer, a tenth for the report, and the others are for the training.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcsc_opt.base.imports import allow_mismatched_torchvision

allow_mismatched_torchvision()  # first, since transformers imports a torchvision that may not fit this torch

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

CONTEXT = 64  # characters of a sequence
LAST_DIGITS = {"search": 7, "selection": 8, "held-out": 9}  # of a topic's number; all others are trained on


def build() -> LlamaForCausalLM:
    """Two layers of 96 channels. A study may as well name one of the checkpoints' folders as its ``model``."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss(model: nn.Module, draw: Any) -> dict[str, Tensor]:
    """The cross-entropy of each sequence in nats a character, with its graph; and the perplexity."""
    text = part(draw.group)
    starts = np.random.default_rng(draw.seed).integers(len(text) - CONTEXT, size=draw.size)
    tokens = torch.stack([text[start : start + CONTEXT] for start in starts])
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)
    return {"cross-entropy": losses, "perplexity": losses.detach().mean().exp()}


@functools.cache
def part(group: str) -> Tensor:
    """The characters of a group of topics, without those that are not ASCII."""
    if group in LAST_DIGITS:
        digits = {LAST_DIGITS[group]}
    else:
        digits = set(range(10)) - set(LAST_DIGITS.values())
    texts = []
    for number, (_, text) in enumerate(sorted(topics.items())):
        if number % 10 in digits:
            texts.append(text)
    return torch.tensor(list("\n".join(texts).encode("ascii", "ignore")))


def train(folder: Path, *, steps: int = 1500, every: int = 25, seed: int = 0) -> None:
    """AdamW at a constant rate, as the averages of WSM expect; a checkpoint every ``every`` steps of the later half."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    text = part("train")
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (32,), generator=generator)
        tokens = torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])
        error = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step % every == 0:
            print(f"step {step} of {steps}: cross-entropy {error.item():.3f}")
            if 2 * step > steps:
                model.save_pretrained(folder / f"checkpoint-{step}", max_shard_size="500KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
