"""Rewards: a user's function and what it may not return; CLIPs in transformers' and open_clip's formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.extractors.rewards import Reward, clip_from_open_clip, find_reward
from tests.metrics.network_files import seeded
from tests.tiny_pipelines import tokenizer

PROMPTS = ["a cat", "two dogs, old"]
WIDTH, LAYERS, EMBEDDED, SIZE, LONGEST = 64, 2, 12, 64, 16  # a head has 64 channels, as in OpenAI's code


def images(height: int = 40, width: int = 40) -> Tensor:
    levels = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


def config(vocabulary: int) -> Any:
    from transformers import CLIPConfig

    layers = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    text = {"vocab_size": vocabulary, "max_position_embeddings": LONGEST, **layers, **ends, "num_attention_heads": 1}
    vision = {"image_size": SIZE, "patch_size": 32, **layers, "num_attention_heads": 1}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDED)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, as ``save_pretrained`` writes it."""
    from transformers import CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokens = tokenizer(folder)
    network = CLIPModel(config(len(tokens)))
    with seeded(3):  # not before: versions of transformers draw other numbers of their own
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
        nn.init.constant_(network.logit_scale, 2.0)
    for part in (network, tokens, CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "scale"), [("clip_score", 100.0), ("pickscore", 7.389056)])
@pytest.mark.parametrize("shape", [(40, 40), (50, 90)])
def test_scores_are_those_of_transformers_own_processor(
    clip: Path, name: str, scale: float, shape: tuple[int, int]
) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    batch = images(*shape)
    shown = [Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for image in batch]
    pixels = CLIPImageProcessor.from_pretrained(clip)(shown, return_tensors="pt")
    texts = AutoTokenizer.from_pretrained(clip)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = CLIPModel.from_pretrained(clip)(**pixels, **texts)
    expected = scale * (found.image_embeds * found.text_embeds).sum(1)
    reward = find_reward(name, weights=clip)("cpu").about(PROMPTS)
    assert reward.name.startswith(f"{name}-")
    leaf = batch.clone().requires_grad_()
    scores = reward(leaf)
    torch.testing.assert_close(scores[:, 0], expected, rtol=0, atol=0.01 * scale)
    assert float(scores.detach().std()) > 0.02 * scale, "they tell images apart"
    [gradient] = torch.autograd.grad(scores.sum(), leaf)
    assert gradient.abs().sum() > 0
    with pytest.raises(MetricError, match="needs prompts, and the sampler has none"):
        reward.about(None)(batch)


def open_clip(vocabulary: int) -> tuple[Any, dict[str, Tensor]]:
    """The networks of OpenAI's code, whose names open_clip kept: ``(images, tokens) → embeddings``, and the weights."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual, LayerNorm, Transformer

    with seeded(4):
        visual = CLIPVisual(EMBEDDED, SIZE, LAYERS, WIDTH, 32).visual
        mask = torch.full((LONGEST, LONGEST), -torch.inf).triu_(1)
        text = nn.ModuleDict({"transformer": Transformer(WIDTH, LAYERS, 1, mask), "ln_final": LayerNorm(WIDTH)})
        text["token_embedding"] = nn.Embedding(vocabulary, WIDTH)
        for parameter in (*visual.parameters(), *text.parameters()):  # norms and biases, too, begin alike
            nn.init.normal_(parameter, std=0.2)
        more = {"positional_embedding": torch.randn(LONGEST, WIDTH), "text_projection": torch.randn(WIDTH, EMBEDDED)}
    state = {**{f"visual.{name}": value for name, value in visual.state_dict().items()}, **text.state_dict(), **more}

    def embedded(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = (text["token_embedding"](tokens) + more["positional_embedding"]).permute(1, 0, 2)
        x = text["ln_final"](text["transformer"](x).permute(1, 0, 2))
        return visual(pixels), x[torch.arange(len(x)), tokens.argmax(1)] @ more["text_projection"]

    return embedded, {**state, "logit_scale": torch.tensor(2.0)}


def test_hpsv2_is_read_from_its_own_file_clip_from_open_clip(clip: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    settings = CLIPConfig.from_pretrained(clip)
    embedded, weights = open_clip(settings.text_config.vocab_size)
    network = CLIPModel(settings).eval()
    network.load_state_dict(clip_from_open_clip(weights))
    tokens = AutoTokenizer.from_pretrained(clip)(PROMPTS, padding="max_length", max_length=LONGEST, return_tensors="pt")
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network(pixel_values=pixels, **tokens)
        for one, other in zip((found.image_embeds, found.text_embeds), embedded(pixels, tokens.input_ids), strict=True):
            torch.testing.assert_close(one, nn.functional.normalize(other), rtol=1e-4, atol=1e-5)
    for file in clip.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": {name: value.half() for name, value in weights.items()}}, path)
    scores = find_reward("hpsv2", weights=tmp_path)("cpu").about(PROMPTS)(images())
    assert scores.abs().max() <= 1
    torch.save({"state_dict": dict(list(weights.items())[5:])}, path)
    with pytest.raises(MetricError, match="holds no hpsv2"):
        find_reward("hpsv2", weights=tmp_path)("cpu")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None"),
        (torch.zeros(2, 1), r"the shape \[2, 1\], expected 2 scores"),
        ([1.0, float("nan")], "not finite"),
    ],
)
def test_what_is_no_score_of_each_image_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(MetricError, match=f"^reward my:f: .*{message}"):
        Reward("my:f", lambda images: returned)(images())


def test_lists_are_scores_without_a_graph() -> None:
    found = Reward("my:f", lambda images, prompts: [len(one) for one in prompts]).about(PROMPTS)(images())
    assert found.tolist() == [[5.0], [13.0]]
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("pickscore", None, "weights: {pickscore: FOLDER} is missing; .*PickScore_v1"),
        ("pickscore", "nowhere", "nowhere does not exist"),
        ("pick_score", None, "a function of your own, or clip_score, pickscore, hpsv2.*'pick_score'"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        find_reward(name, weights=None if weights is None else Path(weights))
