"""sentence-transformers: its trainer on a small BERT with a pooling; each checkpoint is a folder of modules."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import tiny
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizerFast

REMAINDERS = {"train": (0, 1, 2, 3), "search": (7,), "selection": (8,), "held-out": (9,)}
BATCH = 32


def data(part: str) -> Dataset:
    """The two halves of each line: the second is to be found by the first."""
    lines = [line.split() for remainder in REMAINDERS[part] for line in tiny.lines(remainder)]
    halves = [(" ".join(line[: len(line) // 2]), " ".join(line[len(line) // 2 :])) for line in lines]
    return Dataset.from_dict({"anchor": [first for first, _ in halves], "positive": [last for _, last in halves]})


def write_base() -> None:
    """A BERT of two layers with random weights, and its tokenizer."""
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(tiny.lines(0), vocab_size=1000, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=64)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained("base")
    tokenizer.save_pretrained("base")


def build() -> SentenceTransformer:
    """A transformer and a pooling."""
    transformer = Transformer("base", max_seq_length=64)
    pooling = Pooling(transformer.get_word_embedding_dimension())
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def trainer(model: SentenceTransformer, part: str) -> SentenceTransformerTrainer:
    """A checkpoint every 15 steps; its data for evaluations are those of a part."""
    arguments = SentenceTransformerTrainingArguments(
        "runs",
        max_steps=300,
        save_steps=15,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        dataloader_drop_last=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=data("train"),
        eval_dataset=data(part),
        loss=MultipleNegativesRankingLoss(model),
    )


def train() -> None:
    """300 steps."""
    write_base()
    trainer(build(), "held-out").train()


@functools.cache
def evaluated(part: str) -> list[Any]:
    """The sentences of a part, batch by batch, as the trainer gives them to its loss."""
    made = trainer(build(), part)
    return [made.collect_features(batch) for batch in made.get_eval_dataloader()]


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The trainer's loss of each batch; the last one has fewer sentences, which its ``eval_loss`` weighs less."""
    assert isinstance(model, SentenceTransformer)
    of_batch = MultipleNegativesRankingLoss(model)
    for sentences, labels in evaluated(draw.group):
        yield of_batch([dict(part) for part in sentences], labels)


def evaluate(path: str) -> list[float]:
    """``SentenceTransformerTrainer.evaluate`` of the folder that ``SentenceTransformer`` loads."""
    return [trainer(SentenceTransformer(path, device="cpu"), "held-out").evaluate()["eval_loss"]]


if __name__ == "__main__":
    tiny.main(train, evaluate)
