"""The scores in ``studies/any_weights`` that are examples: they run, on tiny networks, and measure what they say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lcsc_opt import load_study
from lcsc_opt.cli import run as lcsc
from lcsc_opt.objective.scorer import Draw
from tests.metrics.network_files import seeded
from tests.tiny_pipelines import randomize

EXAMPLES = Path(__file__).parents[2] / "studies" / "any_weights"
ADAPTED = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

def base():
    return AutoModelForCausalLM.from_pretrained("base")

def build():
    return get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The example that the test's parameter names."""
    from lcsc_opt.base.imports import allow_mismatched_torchvision

    allow_mismatched_torchvision()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module(request.param)
    sys.modules.pop(request.param)


def language_model(folder: Path) -> Any:
    """A Llama of a few thousand parameters over single letters, with a tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, "?"])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", pad_token="?").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def save_models() -> Any:
    """Three checkpoints in ``runs``; returns the last model."""
    for step in (100, 200, 300):
        folder = Path("runs") / f"checkpoint-{step}"
        model = language_model(folder)
        randomize(model, step)
        model.save_pretrained(folder)
    return model


def study(score: str, **settings: Any) -> dict[str, Any]:
    settings = {"checkpoints": "runs", "model": "runs/checkpoint-300", "score": score, "device": "cpu", **settings}
    return {
        "name": "example",
        "objective": {"file": "score.py", "settings": settings},
        "optimizers": ["EMAGrid"],
        "budget": {"evaluations": 2},
        "held_out": {"images": 4, "top": 1},
    }


def write(path: str, lines: int) -> None:
    Path(path).write_text("".join(f"{'fox ' * (1 + line % 5)}and dog, {line}.\n" for line in range(lines)))


def gpt2(folder: Path) -> Any:
    """A GPT-2, whose trainer counts other tokens than a Llama's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    language_model(folder)  # the tokenizer
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(LETTERS) + 1, n_positions=64, n_embd=8, n_layer=1, n_head=2))


def adapter(folder: Path) -> Any:
    """A LoRA on that Llama."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(language_model(folder), config)


@pytest.mark.parametrize("example", ["language_model"], indirect=True)
@pytest.mark.parametrize("made", [language_model, gpt2, adapter])
@pytest.mark.usefixtures("workplace")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, of transformers
def test_a_language_models_score_is_its_trainers(made: Callable[[Path], Any], example: Any) -> None:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    example.TOKENIZER = "model"
    model = made(Path("model"))
    randomize(model, 1)
    write(example.TEXTS["held-out"], 19)  # the last batch is smaller
    model.eval()
    batches = list(example.loss(model, Draw("held-out", 0, 100)))
    assert len(batches) == 3
    assert all(batch.requires_grad for batch in batches)
    trainer = Trainer(
        model,
        TrainingArguments("out", per_device_eval_batch_size=example.BATCH, use_cpu=True, report_to=[]),
        data_collator=DataCollatorForLanguageModeling(example.tokenizer(), mlm=False),
        eval_dataset=example.examples("held-out"),
    )
    assert torch.stack(batches).mean().item() == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("example", ["language_model"], indirect=True)
def test_a_language_model_is_searched(workplace: Path, example: Any) -> None:
    example.TOKENIZER = "runs/checkpoint-300"
    save_models()
    for file in example.TEXTS.values():
        write(file, 16)
    Path("study.yaml").write_text(yaml.safe_dump(study("language_model:loss", size=4)))
    assert lcsc(["run", "study.yaml", "optimizers=[LCSCGradient]"]) == 0


@pytest.mark.parametrize("example", ["language_model"], indirect=True)
@pytest.mark.usefixtures("workplace")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, of transformers
def test_adapters_are_searched_in_their_network_and_exported_for_peft(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    example.TOKENIZER = "base"
    example.BATCH = 16  # all texts, in whatever order
    language_model(Path("base")).save_pretrained("base")
    Path("adapted_here.py").write_text(ADAPTED)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    mine = importlib.import_module("adapted_here")
    for step in (10, 20, 30):
        trained = mine.build()
        lora = {name: tensor for name, tensor in trained.named_parameters() if "lora_" in name}
        with seeded(step), torch.no_grad():
            for tensor in lora.values():
                tensor.normal_()
        trained.save_pretrained(f"runs/checkpoint-{step}")
    for file in example.TEXTS.values():
        write(file, 16)
    Path("study.yaml").write_text(yaml.safe_dump(study("language_model:loss", model="adapted_here:build", size=16)))
    changes = ["optimizers=[LCSCGradient]", "budget.evaluations=4", "held_out.images=16"]
    assert lcsc(["run", "study.yaml", *changes]) == 0
    assert lcsc(["export", "example/LCSCGradient/0", "-o", "best"]) == 0
    loaded = PeftModel.from_pretrained(mine.base(), "best").eval()
    [loss] = example.loss(loaded, Draw("held-out", 0, 16))
    assert load_study("example/LCSCGradient/0").held_out == pytest.approx(loss.item(), rel=1e-5)


PROGRAM = """
import json, sys
folder, group, seed = sys.argv[1:]
print("loading", folder)
print(json.dumps({"accuracy": {"search": 0.25, "selection": 0.5, "held-out": 0.75}[group]}))
"""


@pytest.mark.parametrize("example", ["command"], indirect=True)
def test_a_command_scores_a_model_on_the_disk(workplace: Path, example: Any, typed: Any) -> None:
    save_models()
    Path("evaluate.py").write_text(PROGRAM)
    Path("study.yaml").write_text(yaml.safe_dump(study("command:accuracy", maximize=True)))
    assert "with accuracy 0.75" in typed("run", "study.yaml").err
