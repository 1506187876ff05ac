"""Merged models as diffusers loads them: a model's folder, and a LoRA."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError, TrajectoryError
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports import Recipe, writing
from lcsc_opt.exports.chosen import Chosen
from lcsc_opt.exports.merging import export, merge, rebuild
from lcsc_opt.exports.writing import Destination
from lcsc_opt.objective.contract import CoefficientFunction, Objective
from lcsc_opt.sampling import DiffusersSampler, ImageNoise, SchedulerSettings
from lcsc_opt.sampling.diffusers_sampler import public_keys
from lcsc_opt.sampling.edm import EdmDenoiser, HeunSampler, HeunSchedule
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.sources import PackRequest
from tests.history_examples import reported
from tests.study_examples import write_experiment, write_report
from tests.trajectory.trajectory_examples import same_bits
from tests.unet_examples import unet

STEPS = (1, 2, 3)
COEFFICIENTS = np.array([-0.5, 0.25, 1.25])
NAME = "small/LCSC/0"


def pack_random(path: Path, weights: dict[str, Tensor]) -> Trajectory:
    """Checkpoints with the names, shapes and dtypes of ``weights``."""
    generator = torch.Generator().manual_seed(0)
    with TrajectoryWriter(path) as writer:
        for step in STEPS:
            drawn = {n: torch.randn(w.shape, generator=generator).to(w.dtype) for n, w in weights.items()}
            writer.append(step, drawn)
    return Trajectory.open(path)


def objective_over(trajectory: Any, network: Any = None) -> Objective:
    made: Any = CoefficientFunction(lambda c: float((c**2).sum()), trajectory.steps, name="tests")
    made.trajectory, made.sampler = trajectory, SimpleNamespace(network=network)
    return made


@pytest.fixture
def study(url: str) -> StoredStudy:
    storage = open_storage(url, write=True)
    write_experiment(storage, "small", steps=list(STEPS))
    made = StoredStudy.open_or_create(storage, NAME, {"specification": {"space": {"rows": None}}})
    made.finish(made.add_candidate(Candidate(COEFFICIENTS)), Evaluation(2.5, {"fid": 2.5}))
    return made


@pytest.fixture
def chosen(study: StoredStudy) -> Chosen:
    """Its best trial."""
    return Chosen.of(study.storage, NAME)


def assert_same_weights(left: Path, right: Path) -> None:
    torch.testing.assert_close(load_file(left), load_file(right), rtol=0, atol=0)


@pytest.fixture(scope="module")
def network() -> Any:
    return unet()


@pytest.fixture
def objective(network: Any, tmp_path: Path) -> Objective:
    return objective_over(pack_random(tmp_path / "run.trajectory", network.state_dict()), network)


def chosen_of(url: str, sampler: Mapping[str, object]) -> Chosen:
    """The answer of a search whose objective describes its sampler so."""
    storage = open_storage(url, write=True)
    write_experiment(storage, "small", steps=list(STEPS), sampling=sampler)
    study = StoredStudy.open_or_create(storage, NAME, {"specification": {"space": {"rows": None}}, "key": {}})
    study.finish(study.add_candidate(Candidate(COEFFICIENTS)), Evaluation(2.5, {}))
    return Chosen.of(storage, NAME)


def test_a_recipe_makes_the_scheduler_of_its_search(
    url: str, objective: Objective, network: Any, tmp_path: Path
) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading")
    settings = SchedulerSettings(steps=4)
    described = DiffusersSampler(network, scheduler, settings, noise=ImageNoise(0, (1, 8, 8))).describe()
    del described["timestep_scale"]  # as of an objective of a user's own
    export(chosen_of(url, described), objective, Destination.of(tmp_path / "best"))
    text = (tmp_path / "best" / "lcsc_recipe.json").read_text()
    assert "Infinity" not in text, "which is not JSON"
    sampler = json.loads(text)["sampler"]
    made = diffusers.DPMSolverMultistepScheduler.from_config(sampler["scheduler"])
    assert public_keys(made.config) == public_keys(scheduler.config)
    assert made.config.timestep_spacing == "leading"
    assert made.config.lambda_min_clipped == scheduler.config.lambda_min_clipped
    assert sampler["steps"] == {"num_inference_steps": 4}
    assert "architecture" not in sampler


def test_a_recipe_has_the_schedule_of_edm(url: str) -> None:
    denoiser = EdmDenoiser(torch.nn.Conv2d(1, 1, 1))
    edm = HeunSampler(denoiser, schedule=HeunSchedule(steps=3), noise=ImageNoise(0, (1, 8, 8)))
    assert chosen_of(url, edm.describe()).measured["sampler"]["schedule"]["steps"] == "3"


def test_a_recipe_has_no_settings_of_a_users_function(url: str) -> None:
    described = {"sampler": "sample", "options": {"token": "secret"}, "labels": None}
    assert chosen_of(url, described).measured["sampler"] == {"sampler": "sample", "labels": None}


def test_which_trial_of_a_study_is_chosen(study: StoredStudy) -> None:
    study.finish(study.add_candidate(Candidate(COEFFICIENTS[::-1])), Evaluation(1.5))
    study.add_candidate(Candidate(COEFFICIENTS))  # is being evaluated
    assert Chosen.of(study.storage, NAME).model.trial == 1  # the best so far
    write_report(study.storage, reported(2.0, trial=0, study=NAME), "small")
    assert Chosen.of(study.storage, NAME).model.trial == 0  # chosen on other noise
    assert Chosen.of(study.storage, NAME, 1).model.coefficients.tolist() == COEFFICIENTS[::-1].tolist()
    with pytest.raises(StudyStoreError, match="trial 2 is not complete"):
        Chosen.of(study.storage, NAME, 2)
    with pytest.raises(StudyStoreError, match="there is no trial 3; it has 3, from 0"):
        Chosen.of(study.storage, NAME, 3)


def test_other_checkpoints_than_the_experiment_searched_are_refused(chosen: Chosen, objective: Objective) -> None:
    others = dataclasses.replace(chosen, stored={**chosen.stored, "checkpoints": "another"})
    with pytest.raises(StudyStoreError, match="holds other checkpoints than those it was searched on"):
        Recipe.of_chosen(others, objective)


def test_a_folder_is_replaced_whole_and_rebuilt_from_its_recipe(
    chosen: Chosen, objective: Objective, network: Any, tmp_path: Path
) -> None:
    weights, first = "diffusion_pytorch_model.safetensors", tmp_path / "first.safetensors"
    recipe = export(chosen, objective, Destination.of(tmp_path / "best", dtype="bfloat16"))
    first.write_bytes((tmp_path / "best" / weights).read_bytes())
    assert {tensor.dtype for tensor in load_file(first).values()} == {torch.bfloat16}
    assert Recipe.read(tmp_path / "best") == Recipe.read(first) == recipe
    with pytest.raises(StudySpecError, match="exists already"):
        Destination.of(tmp_path / "best")
    (tmp_path / "best" / "stale").write_text("of an earlier export")
    network.save_pretrained(tmp_path / "original")
    to = Destination.of(tmp_path / "best", config=tmp_path / "original", overwrite=True)
    rebuild(Recipe.read(tmp_path / "best"), PackRequest([tmp_path / "run.trajectory"], tmp_path), to)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"config.json", weights, "lcsc_recipe.json"}
    assert_same_weights(tmp_path / "best" / weights, first)
    assert not list(tmp_path.glob(".*"))


def test_a_large_model_is_written_in_shards_that_from_pretrained_loads(
    chosen: Chosen, objective: Objective, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 5_000)
    recipe = export(chosen, objective, Destination.of(tmp_path / "best"))
    assert len(list((tmp_path / "best").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    loaded = type(network).from_pretrained(tmp_path / "best")
    expected = merge(objective.trajectory, recipe)  # type: ignore[arg-type]
    assert same_bits(dict(loaded.state_dict()), expected)
    assert same_bits(read_checkpoint(tmp_path / "best").tensors, expected)
    next((tmp_path / "best").glob("*-00002-of-*")).unlink()
    with pytest.raises(TrajectoryError, match=r"best/.*index.json lists .*-00002-of-.*, which does not exist"):
        read_checkpoint(tmp_path / "best")


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers_is_written_as_its_folder(chosen: Chosen, tmp_path: Path, tied: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=4, tie_word_embeddings=tied)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "original")
    weights = read_checkpoint(tmp_path / "original").tensors
    objective = objective_over(pack_random(tmp_path / "run.trajectory", weights))
    to = Destination.of(tmp_path / "best", config=tmp_path / "original")
    expected = merge(objective.trajectory, export(chosen, objective, to))  # type: ignore[arg-type]
    loader: Any = GPT2LMHeadModel
    loaded, info = loader.from_pretrained(tmp_path / "best", output_loading_info=True)
    assert not any(info.values()), info
    assert same_bits({name: loaded.state_dict()[name] for name in expected}, expected)
    rest = {name: tensor for name, tensor in weights.items() if name != "transformer.wte.weight"}
    other = objective_over(pack_random(tmp_path / "other.trajectory", rest))
    with pytest.raises(ObjectiveError, match=r"lacks 'transformer\.wte\.weight'"):
        export(chosen, other, to)


# transformers 5.0 makes this tokenizer as tokenizers no longer wants it
OLD_TOKENIZER = pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")


def write_language_model(folder: Path) -> None:
    """A small model with its tokenizer, its chat template, and what a trainer leaves beside them."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokens = ["<|endoftext|>", "a", "b", "c", "ab", "\u0120", "d", "e"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer: Any = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    torch.save({}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text("{}")


@OLD_TOKENIZER
@pytest.mark.parametrize("config", ["original", None])
def test_a_language_model_is_exported_with_its_tokenizer(chosen: Chosen, tmp_path: Path, config: str | None) -> None:
    from transformers import AutoTokenizer

    write_language_model(tmp_path / "original")
    weights = read_checkpoint(tmp_path / "original").tensors
    objective = objective_over(pack_random(tmp_path / "run.trajectory", weights))
    given = None if config is None else tmp_path / config
    if config is None:  # the setting of a score names it, beside the study file
        objective_spec = {"file": "score.py", "settings": {"model": "original"}}
        stored = {**chosen.stored, "objective": objective_spec, "directory": str(tmp_path)}
        chosen = dataclasses.replace(chosen, stored=stored)
    export(chosen, objective, Destination.of(tmp_path / "best", dtype="bfloat16", config=given))
    described = json.loads((tmp_path / "best" / "config.json").read_text())
    assert {described.get("dtype"), described.get("torch_dtype")} - {None} == {"bfloat16"}
    loader: Any = AutoTokenizer
    tokenizer = loader.from_pretrained(tmp_path / "best", local_files_only=True)
    assert tokenizer("abc")["input_ids"] == loader.from_pretrained(tmp_path / "original")("abc")["input_ids"] == [4, 3]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert names >= {"generation_config.json", "tokenizer_config.json", "model.safetensors", "lcsc_recipe.json"}
    assert not names & {"optimizer.pt", "trainer_state.json"}
    again = Destination.of(tmp_path / "again", config=tmp_path / "best")  # as lcsc apply names an exported folder
    rebuild(Recipe.read(tmp_path / "best"), PackRequest([tmp_path / "run.trajectory"], tmp_path), again)
    assert {path.name for path in again.path.iterdir()} == names


@OLD_TOKENIZER
@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_of_an_adapter_is_refused_and_the_file_that_it_needs_is_named(
    chosen: Chosen, tmp_path: Path, with_config: bool
) -> None:
    write_language_model(tmp_path / "original")
    module = "base_model.model.transformer.h.0.attn.c_attn"
    weights = {f"{module}.lora_A.weight": torch.zeros(2, 4), f"{module}.lora_B.weight": torch.zeros(12, 2)}
    adapter = objective_over(pack_random(tmp_path / "adapter.trajectory", weights))
    to = Destination.of(tmp_path / "best", config=tmp_path / "original" if with_config else None)
    with pytest.raises(
        ObjectiveError, match=r"adapter.*best/adapter_model\.safetensors.*adapter_config\.json"
    ) as refusal:
        export(chosen, adapter, to)
    assert "diffusers or transformers" not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    export(chosen, adapter, Destination.of(tmp_path / "best" / "adapter_model.safetensors"))
    merged = load_file(tmp_path / "best" / "adapter_model.safetensors")
    assert merged.keys() == weights.keys()


@pytest.fixture
def lora(tmp_path: Path) -> Trajectory:
    modules = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")
    weights = {f"unet.{m}.lora_A.weight": torch.zeros(2, 8) for m in modules}
    weights |= {f"unet.{m}.lora_B.weight": torch.zeros(8, 2) for m in modules}
    return pack_random(tmp_path / "lora.trajectory", weights)


def test_a_lora_keeps_the_alphas_that_it_was_searched_with(chosen: Chosen, lora: Trajectory, tmp_path: Path) -> None:
    """alpha / rank is multiplied into the up factors, which the names of diffusers have no other place for."""
    searched: Any = objective_over(lora)
    searched.sampler = SimpleNamespace(alphas=LoraAlphas.model_validate({"configs": {"unet": {"lora_alpha": 6.0}}}))
    best, again = tmp_path / "best.safetensors", tmp_path / "again.safetensors"
    export(chosen, searched, Destination.of(best, form="lora"))
    merged = {name: w * (3 if "lora_B" in name else 1) for name, w in lora.merge(COEFFICIENTS).items()}
    torch.testing.assert_close(load_file(best), merged)
    assert lcsc(["apply", str(best), str(lora.path), "-o", str(again)]) == 0  # in the form that was exported
    assert_same_weights(again, best)


def test_kohyas_lora_for_sdxl_is_rebuilt_as_it_was_exported(chosen: Chosen, tmp_path: Path) -> None:
    """The fourth block of input is the first layer of the second block where each has two layers."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    weights = {f"{stem}.lora_down.weight": torch.zeros(2, 8), f"{stem}.lora_up.weight": torch.zeros(8, 2)}
    trajectory = pack_random(tmp_path / "lora.trajectory", {**weights, f"{stem}.alpha": torch.zeros(())})
    objective: Any = objective_over(trajectory)
    pipeline = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(layers_per_block=2)), transformer=None)
    objective.sampler = SimpleNamespace(network=None, pipeline=pipeline)
    best, again, other = (
        Destination.of(tmp_path / f"{n}.safetensors", form="lora") for n in ("best", "again", "other")
    )
    recipe = export(chosen, objective, best)
    expected = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert set(load_file(best.path)) == {f"{expected}.lora_A.weight", f"{expected}.lora_B.weight"}
    rebuild(Recipe.read(best.path), PackRequest([trajectory.path], tmp_path), again)
    assert_same_weights(again.path, best.path)
    with pytest.raises(TrajectoryError, match="export the LoRA from its study"):
        rebuild(recipe.model_copy(update={"lora": None}), PackRequest([trajectory.path], tmp_path), other)
    assert not other.path.exists()
