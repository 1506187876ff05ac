"""Rewards by name, on tiny random weights in the layout of the published ones."""

from __future__ import annotations

import json
import string
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.extractors.named_rewards import NamedReward, find_reward
from lcsc_opt.metrics.extractors.rewards import Reward
from lcsc_opt.metrics.from_settings import ReferenceScoreSettings

transformers = pytest.importorskip("transformers")
PROMPTS = ["a cat", "two dogs, old"]
FEATURES = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("clip")
    letters = string.ascii_lowercase + ",."
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with warnings.catch_warnings():  # of older transformers, which call tokenizers in a way of before
        warnings.simplefilter("ignore", DeprecationWarning)
        tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    layers = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 16, **layers, **ends}
    vision = {"image_size": 64, "patch_size": 32, **layers}
    configuration = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=FEATURES)
    network = transformers.CLIPModel(configuration)
    for name, parameter in network.named_parameters():  # whose order depends on the version of transformers
        drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        nn.init.normal_(parameter, std=0.2, generator=drawn)
    for part in (network, tokenizer, transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)):
        part.save_pretrained(folder)
    return folder


def levels(height: int = 50, width: int = 90) -> Tensor:
    drawn = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, height, width), generator=drawn, dtype=torch.uint8)
    noise[1] //= 4  # a dark one, which any weights tell from the other
    return noise


def by_transformers(folder: Path, shape: tuple[int, int]) -> tuple[Any, Tensor]:
    """The network's own output of the images, through its own processors; and the cosines of images and prompts."""
    shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in levels(*shape)]
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(shown, return_tensors="pt")
    texts = transformers.AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    network = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        found = network(**pixels, **texts)
    return network, (found.image_embeds * found.text_embeds).sum(1)


def score(reward: Reward, shape: tuple[int, int] = (50, 90)) -> tuple[Tensor, Tensor]:
    """The scores of the images, and the gradient of their sum in these."""
    images = (levels(*shape) / 127.5 - 1).requires_grad_()
    scores = reward.about(PROMPTS)(images)[:, 0]
    [gradient] = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


@pytest.mark.parametrize("shape", [(40, 40), (50, 90)])
def test_clip_and_pickscore_are_what_transformers_own_processor_gives(clip: Path, shape: tuple[int, int]) -> None:
    network, cosines = by_transformers(clip, shape)
    by_name = find_reward(NamedReward(clip=str(clip)))("cpu")
    scores, gradient = score(by_name, shape)
    torch.testing.assert_close(scores, 100 * cosines, rtol=0, atol=1.5)
    assert float(scores.std()) > 2, "they tell images apart"
    assert gradient.abs().sum() > 0
    pick = find_reward(NamedReward(pickscore=str(clip)))("cpu")
    torch.testing.assert_close(score(pick, shape)[0], scores / 100 * network.logit_scale.exp().item())
    assert by_name.name.startswith("clip-")
    assert pick.name == by_name.name.replace("clip", "pickscore"), "the fingerprint follows the weights"


@pytest.mark.parametrize("widths", [(1,), (8, 6, 1)])
def test_an_aesthetic_head_is_linear_layers_on_the_image_alone(
    clip: Path, tmp_path: Path, widths: tuple[int, ...]
) -> None:
    """LAION's first head is one layer, the improved one several with dropout between them."""
    torch.manual_seed(0)
    linear = [nn.Linear(before, after) for before, after in zip((FEATURES, *widths), widths, strict=False)]
    whole = nn.Sequential(*(part for layer in linear for part in (layer, nn.Dropout(0.2)))).eval()
    state = {f"layers.{name}": tensor for name, tensor in whole.state_dict().items()}
    if len(widths) == 1:
        state = dict(linear[0].state_dict())
    torch.save(state, tmp_path / "head.pth")
    reward = find_reward(NamedReward(aesthetic=str(tmp_path / "head.pth"), clip=str(clip)))("cpu")
    scores, gradient = score(reward)
    images = levels() / 127.5 - 1
    shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in levels()]
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip)(shown, return_tensors="pt")
    network = transformers.CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        features = network.visual_projection(network.vision_model(**pixels).pooler_output)
        expected = whole(nn.functional.normalize(features, dim=-1))[:, 0]
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.03)
    assert gradient.abs().sum() > 0
    assert reward(images).shape == (2, 1), "it needs no prompts"


def test_weights_that_are_not_here_or_do_not_fit_are_refused_before_a_search(clip: Path, tmp_path: Path) -> None:
    for given in ({"clip": "a", "pickscore": "b"}, {"aesthetic": "a"}, {"processor": "a"}, {}):
        with pytest.raises(ValueError, match=r"expected \{clip: FOLDER\}, \{pickscore: FOLDER\}"):
            NamedReward(**given)
    with pytest.raises(MetricError, match="neither a folder nor in the hub's cache; 'hf download"):
        find_reward(NamedReward(clip="nobody/nothing"))
    with pytest.raises(MetricError, match="no such file of an aesthetic head"):
        find_reward(NamedReward(aesthetic="nothing.pth", clip=str(clip)))
    for weight, message in ((torch.zeros(1, 5), "does not fit 12 features"), (torch.zeros(3, 12), "gives 3 numbers")):
        torch.save({"weight": weight, "bias": torch.zeros(len(weight))}, tmp_path / "head.pth")
        with pytest.raises(MetricError, match=message):
            find_reward(NamedReward(aesthetic=str(tmp_path / "head.pth"), clip=str(clip)))("cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetricError, match="cannot be read as a CLIP of transformers"):
        find_reward(NamedReward(clip=str(tmp_path / "empty")))("cpu")


def test_settings_take_a_function_or_a_network_by_name() -> None:
    settings = ReferenceScoreSettings.model_validate({"reward": {"clip": "here"}, "held_out_reward": "my:function"})
    assert settings.rewards == {"reward": NamedReward(clip="here"), "held_out_reward": "my:function"}
