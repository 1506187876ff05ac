"""sentence-transformers: a small BERT with CLS pooling, its trainer's checkpoints, and its ``TripletEvaluator``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

WIDTH = 32
GROUPS = {"search": 7, "selection": 8, "held-out": 9}
PAIRS = 300


def halves(remainder: int) -> tuple[list[str], list[str]]:
    """The first and the last words of lines."""
    words = [line.lower().split() for line in tiny.lines(remainder) if len(line.split()) >= 6][:PAIRS]
    return [" ".join(each[: len(each) // 2]) for each in words], [" ".join(each[len(each) // 2 :]) for each in words]


def write_base(folder: Path) -> None:
    """Write an untrained BERT, whose tokenizer knows the words of the training lines."""
    words = sorted({word for line in tiny.lines(0) for word in line.lower().split() if word.isalpha()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)


def whole() -> SentenceTransformer:
    """BERT and its pooling."""
    return SentenceTransformer(modules=[Transformer("base"), Pooling(WIDTH, "cls")], device="cpu")


def train() -> None:
    """A checkpoint every ten steps."""
    write_base(Path("base"))
    first, last = halves(0)
    model = whole()
    arguments = SentenceTransformerTrainingArguments(
        output_dir="runs",
        max_steps=160,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        save_steps=10,
        save_total_limit=100,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    data = Dataset.from_dict({"anchor": first, "positive": last})
    SentenceTransformerTrainer(
        model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    ).train()


def triplets(group: str) -> TripletEvaluator:
    """Whether the end of a line is nearer to its beginning than the end of another line."""
    first, last = halves(GROUPS[group])
    return TripletEvaluator(first, last, [*last[1:], last[0]], name="lines", batch_size=100)


@functools.cache
def _holder() -> SentenceTransformer:
    return whole()


def build() -> nn.Module:
    """The BERT in it, whose weights a checkpoint holds."""
    network: nn.Module = whole()[0].model
    return network


def accuracy(network: nn.Module, draw: Any) -> float:
    """What the evaluator says of the merged BERT with the pooling."""
    model = _holder()
    model[0].model = network
    return float(triplets(draw.group)(model)["lines_cosine_accuracy"])


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """What it says of what ``SentenceTransformer`` loads."""
    return [float(triplets("held-out")(SentenceTransformer(path, device="cpu"))["lines_cosine_accuracy"])]


if __name__ == "__main__":
    tiny.main(train, evaluate)
