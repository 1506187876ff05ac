"""trl's ``SFTTrainer`` with an adapter of peft."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_text import model, tokenizer
from trl import SFTConfig, SFTTrainer

REMAINDERS = {"train": 0, "search": 7, "selection": 8, "held-out": 9}
LORA = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)


def data(part: str) -> Dataset:
    """The lines of a part."""
    lines = tiny.lines(REMAINDERS[part])
    return Dataset.from_dict({"text": lines[: 1500 if part == "train" else 200]})


def trainer(network: Any, part: str, **options: Any) -> SFTTrainer:
    """The trainer; its data for evaluations are those of a part."""
    arguments = SFTConfig(
        "runs",
        max_steps=240,
        save_steps=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_length=128,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    tokens = AutoTokenizer.from_pretrained("base")
    return SFTTrainer(
        network,
        arguments,
        train_dataset=data("train"),
        eval_dataset=data(part),
        processing_class=tokens,
        **options,
    )


def train() -> None:
    """A base model that has seen other lines, and the adapter's checkpoints."""
    tokens = tokenizer()
    tokens.save_pretrained("base")
    base = model(tokens)
    optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3)
    lines = tiny.lines(1)
    for number in range(150):
        first = 16 * number % (len(lines) - 15)
        batch = tokens(lines[first : first + 16], return_tensors="pt", padding=True, truncation=True, max_length=128)
        optimizer.zero_grad()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        base(**batch, labels=labels).loss.backward()
        optimizer.step()
    base.save_pretrained("base")
    trainer(AutoModelForCausalLM.from_pretrained("base"), "held-out", peft_config=LORA).train()


def build() -> Any:
    """The base model with an adapter."""
    return get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LORA)


@functools.cache
def evaluated(part: str) -> list[dict[str, Any]]:
    """The batches of a part, as the trainer makes them."""
    return list(trainer(build(), part).get_eval_dataloader())


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The model's own loss of each batch; their mean is the trainer's ``eval_loss``."""
    for batch in evaluated(draw.group):
        yield model(**batch).loss


def evaluate(path: str) -> list[float]:
    """``SFTTrainer.evaluate`` of what ``PeftModel.from_pretrained`` loads."""
    base = AutoModelForCausalLM.from_pretrained("base")
    return [trainer(PeftModel.from_pretrained(base, path), "held-out").evaluate()["eval_loss"]]


if __name__ == "__main__":
    tiny.main(train, evaluate)
