"""An export with the checkpoints' own ending, or a folder as theirs, is what their trainer loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lcsc_opt.exports import Recipe
from tests.commands import Typed

LIGHTNING: dict[str, Any] = {
    "pytorch-lightning_version": "2.6.6",
    "hyper_parameters": {"lr": 0.01},
    "optimizer_states": [],
}
SCORE = """
import torch
def build(): return torch.nn.Linear(4, 1, bias=False)
def score(model): return float(model.weight.square().sum())
"""


@pytest.fixture(autouse=True)
def place(workplace: Path) -> Path:
    return workplace


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1, 4), float(step))}


def save_checkpoints(name: str, key: str = "state_dict", **rest: Any) -> None:
    """Steps 1 to 4 in ``runs``."""
    Path("runs").mkdir()
    for step in range(1, 5):
        torch.save({"global_step": step, **rest, key: weights(step)}, Path("runs") / name.format(step))


def search(typed: Typed, name: str, module: str, **changes: Any) -> None:
    """Run a study of ``runs`` with the network and the score of a module."""
    settings = {"checkpoints": "runs", "model": f"{module}:build", "score": f"{module}:score"}
    study = {"name": name, "objective": {"file": "score.py", "settings": settings}, "budget": {"evaluations": 3}}
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**study, **changes}))
    typed("run", f"{name}.yaml")


def test_lightning_loads_an_average_of_its_checkpoints(typed: Typed) -> None:
    save_checkpoints("epoch={0}-step={0}.ckpt", **LIGHTNING)
    typed("apply", "uniform", "runs", "-o", "best.ckpt")
    content = torch.load("best.ckpt", weights_only=True)
    assert {name: content[name] for name in LIGHTNING} == LIGHTNING
    assert content["state_dict"]["weight"].tolist() == [[2.5] * 4]
    typed("apply", "best.ckpt", "runs", "-o", "best.safetensors")
    assert load_file("best.safetensors")["weight"].tolist() == [[2.5] * 4]


def test_timm_loads_one_and_what_its_file_has_besides_is_named(typed: Typed) -> None:
    save_checkpoints("checkpoint-{}.pth.tar", arch="resnet18", args=Path("config"))
    typed("apply", "uniform", "runs", "-o", "best.pth.tar")
    content = torch.load("best.pth.tar", weights_only=False)
    assert content.keys() == {"global_step", "arch", "state_dict", "args"}
    assert content["args"] == Path("config")
    assert content["state_dict"]["weight"].tolist() == [[2.5] * 4]
    assert Recipe.read(Path("best.pth.tar")).steps == (1, 2, 3, 4)
    said = typed("apply", "uniform", "runs", "-o", "half.pth.tar", "--dtype", "float16").err
    assert "half.pth.tar: left out, because they are not plain data: args" in said
    assert torch.load("half.pth.tar", weights_only=True).keys() == {"global_step", "arch", "state_dict"}


def test_a_file_of_nothing_but_tensors_keeps_them_all(typed: Typed) -> None:
    """As ``KarrasEMA.load_state_dict`` wants it, which knows no other names."""
    Path("runs").mkdir()
    for step in range(1, 5):
        state = {f"ema_model.{name}": tensor for name, tensor in weights(step).items()}
        torch.save({"initted": torch.tensor(1.0), "step": torch.tensor(step), **state}, f"runs/{step}.pt")
    typed("apply", "uniform", "runs", "-o", "best.pt")
    content = torch.load("best.pt", weights_only=True)
    assert content.keys() == {"initted", "step", "ema_model.weight"}
    assert content["ema_model.weight"].tolist() == [[2.5] * 4]
    assert content["step"] == 4
    assert Recipe.read(Path("best.pt")).steps == (1, 2, 3, 4)


def test_a_pickled_network_is_written_as_it_was(typed: Typed) -> None:
    Path("runs").mkdir()
    for step in range(1, 5):
        torch.save({"epoch": step, "model": torch.nn.Linear(4, 1)}, f"runs/epoch{step}.pt")
    typed("apply", "uniform", "runs", "-o", "best.pt")
    networks = [torch.load(f"runs/epoch{step}.pt", weights_only=False)["model"] for step in range(1, 5)]
    mean = torch.stack([network.weight for network in networks]).mean(dim=0)
    torch.testing.assert_close(torch.load("best.pt", weights_only=False)["model"].weight, mean)
    said = typed("apply", "uniform", "runs", "-o", "half.pt", "--dtype", "float16").err
    assert "which the trainer may be unable to load: " in said
    assert "epoch4.pt has weights of another dtype" in said
    assert torch.load("half.pt", weights_only=True).keys() == {"weight", "bias"}


def test_a_finished_study_is_exported_without_its_functions(typed: Typed) -> None:
    save_checkpoints("model-{}.ckpt", **LIGHTNING)
    Path("scores_here.py").write_text(SCORE)
    search(typed, "small", "scores_here", optimizers=["LCSC"])
    torch.save({"global_step": 5, "state_dict": weights(5)}, "runs/model-5.ckpt")
    typed("run", "small/LCSC/0", "name=NEW", "start=small/LCSC/0")
    assert len(typed.json("show", "NEW/LCSC/0")["coefficients"]) == 5
    Path("scores_here.py").unlink()
    typed("export", "small/LCSC/0", "-o", "best.ckpt")
    assert torch.load("best.ckpt", weights_only=True).keys() >= LIGHTNING.keys()


def test_an_adapters_folder_is_written_as_its_trainer_left_it(typed: Typed) -> None:
    module = "base_model.model.layer"
    for step in range(1, 4):
        folder = Path("runs") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        factors = {f"{module}.lora_A.weight": torch.ones(2, 4) * step, f"{module}.lora_B.weight": torch.ones(4, 2)}
        save_file(factors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        (folder / "tokenizer_config.json").write_text("{}")
        torch.save({}, folder / "optimizer.pt")
    typed("apply", "uniform", "runs", "-o", "best")
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "lcsc_recipe.json"}
    assert {path.name for path in Path("best").iterdir()} == names
    assert load_file("best/adapter_model.safetensors")[f"{module}.lora_A.weight"].unique().tolist() == [2.0]
    typed("apply", "best", "runs", "-o", "again")
    assert {path.name for path in Path("again").iterdir()} == names


def test_a_trainers_folder_needs_no_config_option(typed: Typed) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=4)
    for step in (10, 20):
        GPT2LMHeadModel(config).save_pretrained(f"runs/checkpoint-{step}")
        Path(f"runs/checkpoint-{step}/tokenizer_config.json").write_text("{}")
        Path(f"runs/checkpoint-{step}/trainer_state.json").write_text("{}")
    typed("apply", "uniform", "runs", "-o", "best")
    names = {path.name for path in Path("best").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert "trainer_state.json" not in names
    loaded = GPT2LMHeadModel.from_pretrained("best").state_dict()
    first, last = (GPT2LMHeadModel.from_pretrained(f"runs/checkpoint-{step}").state_dict() for step in (10, 20))
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(loaded[name], (first[name] + last[name]) / 2)


MODULES = """
import torch
from transformers import AutoConfig, BertModel
def build(): return torch.nn.Sequential(BertModel(AutoConfig.from_pretrained("runs/checkpoint-10")))
def score(net): return float(net[0].embeddings.LayerNorm.weight.square().sum())
"""


def test_a_folder_with_the_checkpoints_configuration_has_the_names_of_their_files(typed: Typed) -> None:
    """The network that is scored has the transformer inside."""
    from transformers import BertConfig, BertModel

    Path("modules_here.py").write_text(MODULES)
    config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    for step in (10, 20, 30):
        model = BertModel(config)
        torch.nn.init.constant_(model.embeddings.LayerNorm.weight, step)
        model.save_pretrained(f"runs/checkpoint-{step}")
    search(typed, "modules", "modules_here", optimizers=["EMAGrid"])
    typed("export", "modules/EMAGrid/0", "-o", "best")
    assert load_file("best/model.safetensors").keys() == load_file("runs/checkpoint-30/model.safetensors").keys()
    sys.modules.pop("modules_here")


WRAPPED = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.{name} = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    def forward(self, x): return self.{name}(x)
def build(): return Net()
def score(net): return net(torch.ones(1, 4)).square().mean()
"""


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("module", ""), ("layer", "module."), ("layer", "unets.0."), ("layer", "0.ema_model."), ("module", "app.model.")],
)
def test_the_network_decides_which_prefix_is_its_own(typed: Typed, name: str, prefix: str) -> None:
    """An attribute called ``module``, and what wrappers write before the names."""
    Path("wrapped_here.py").write_text(WRAPPED.format(name=name))
    Path("runs").mkdir()
    for step in range(1, 4):
        layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        state = {f"{prefix}{name}.{part}": tensor for part, tensor in layers.state_dict().items()}
        torch.save({"model": state}, f"runs/{step}.pt")
    search(typed, "wrapped", "wrapped_here", optimizers=["LCSCGradient"], space={"rows": "layers"})
    typed("export", "wrapped/LCSCGradient/0", "-o", "best.safetensors")
    assert {f"{prefix}{part}" for part in load_file("best.safetensors")} == state.keys()
    assert np.shape(Recipe.read(Path("best.safetensors")).coefficients) == (2, 3)  # a row for each layer
    typed("apply", "best.safetensors", "runs", "-o", "again.safetensors")
    again = load_file("again.safetensors")
    for part, tensor in load_file("best.safetensors").items():
        torch.testing.assert_close(again[f"{prefix}{part}"], tensor)
    typed("apply", "uniform", "runs", "-o", "uniform.safetensors")  # no network tells
    assert load_file("uniform.safetensors").keys() == state.keys()
    sys.modules.pop("wrapped_here")


@pytest.mark.parametrize("folder", ["step_{}", "epoch=1-step={}"])
@pytest.mark.parametrize("name", ["model.pt", "part/model.pt"])
def test_a_file_of_a_folder_is_written_as_its_trainer_wrote_it(typed: Typed, folder: str, name: str) -> None:
    for step in range(1, 5):
        path = Path("runs") / folder.format(step) / name
        path.parent.mkdir(parents=True)
        torch.save({"model_state_dict": weights(step), "var_names": ["a"]}, path)
    typed("apply", "uniform", "runs", "-o", "best.pt")
    content = torch.load("best.pt", weights_only=True)
    assert content["var_names"] == ["a"]
    assert content["model_state_dict"]["weight"].tolist() == [[2.5] * 4]


def test_why_a_file_of_a_folder_is_written_in_another_form_is_said(typed: Typed) -> None:
    for step in range(1, 5):
        path = Path("runs") / f"step_{step}"
        path.mkdir(parents=True)
        save_file(weights(step), path / "model.safetensors")
    said = typed("apply", "uniform", "runs", "-o", "best.pt").err
    assert "best.pt: written as a plain state dict, since the weights of step_4 are in model.safetensors" in said


def test_a_folder_of_sentence_transformers_keeps_its_modules(typed: Typed) -> None:
    """Without ``modules.json``, its loader would take the mean of the tokens, whatever the pooling was."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    for step in (10, 20):
        folder = Path(f"runs/checkpoint-{step}")
        BertModel(config).save_pretrained(folder)
        modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "config_sentence_transformers.json").write_text("{}")
        for part in ("1_Pooling", "2_Dense"):
            (folder / part).mkdir()
            (folder / part / "config.json").write_text("{}")
        save_file({"w": torch.ones(2)}, folder / "2_Dense" / "model.safetensors")
    said = typed("apply", "uniform", "runs", "-o", "best").err
    assert "2_Dense: copied as it is in checkpoint-20, since its weights are not combined" in said
    written = {str(path.relative_to("best")) for path in Path("best").rglob("*") if path.is_file()}
    assert written >= {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"}
    assert "2_Dense/model.safetensors" in written
