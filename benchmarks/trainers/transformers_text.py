"""transformers' ``Trainer`` on a small GPT-2; ``studies/any_weights/language_model.py`` is copied next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

FILES = {"train.txt": 0, "validation.txt": 7, "selection.txt": 8, "test.txt": 9}
LINES = 200  # of each file that is not trained on


def tokenizer() -> Any:
    """A byte-pair encoding of the training's lines."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(tiny.lines(0), vocab_size=500, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>")


def model(tokens: Any) -> GPT2LMHeadModel:
    """Two layers of 48 channels, with random weights."""
    end = tokens.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokens),
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


def trainer(network: Any, tokens: Any) -> Trainer:
    """A checkpoint every 20 steps."""
    arguments = TrainingArguments(
        "runs",
        max_steps=500,
        save_steps=20,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(
        network,
        arguments,
        data_collator=DataCollatorForLanguageModeling(tokens, mlm=False),
        train_dataset=examples("train.txt", tokens),  # type: ignore[arg-type]
        eval_dataset=examples("test.txt", tokens),  # type: ignore[arg-type]
        processing_class=tokens,
    )


def examples(file: str, tokens: Any) -> list[dict[str, Any]]:
    """The tokens of each line of a file."""
    return [dict(tokens(line, truncation=True, max_length=128)) for line in Path(file).read_text().splitlines()]


def train() -> None:
    """Write the texts, and train."""
    for file, remainder in FILES.items():
        lines = tiny.lines(remainder)
        Path(file).write_text("\n".join(lines[: None if file == "train.txt" else LINES]))
    tokens = tokenizer()
    trainer(model(tokens), tokens).train()


def evaluate(path: str) -> list[float]:
    """``Trainer.evaluate`` of what ``from_pretrained`` loads."""
    tokens = PreTrainedTokenizerFast.from_pretrained("runs/checkpoint-500")
    return [trainer(AutoModelForCausalLM.from_pretrained(path), tokens).evaluate()["eval_loss"]]


if __name__ == "__main__":
    tiny.main(train, evaluate)
