"""Published networks, small and with random weights: torch-fidelity's numbers, and nothing in a file is executed."""

import pickle
import shutil
import urllib.error
import zipfile
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import MetricError
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.metrics import FeatureExtractor
from lcsc_opt.metrics.extractors.base import image_gradient
from lcsc_opt.metrics.extractors.by_name import find_extractor
from lcsc_opt.metrics.extractors.published import (
    ClipExtractor,
    DinoV2Extractor,
    InceptionExtractor,
)
from tests.metrics import network_files
from tests.metrics.examples import Explosive

KINDS: dict[str, Any] = {"inception": InceptionExtractor, "clip": ClipExtractor, "dinov2": DinoV2Extractor}
DIMENSIONS = {"inception": 2048, "clip": 12, "dinov2": 64}
SMALL = 107  # pixels, for gradients of Inception; the network's own 299 cost seven times as much


@pytest.fixture(scope="module")
def inception():
    return network_files.random_inception()


@pytest.fixture(scope="module")
def dinov2():
    return network_files.random_dinov2()


@pytest.fixture(scope="module")
def files(inception, dinov2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save(inception.state_dict(), folder / "inception.pth")
    network_files.write_clip(folder / "ViT-B-32.pt")
    dinov2.save_pretrained(folder / "dinov2")
    return {"inception": folder / "inception.pth", "clip": folder / "ViT-B-32.pt", "dinov2": folder / "dinov2"}


@pytest.fixture(scope="module")
def extractors(files):
    state = torch.random.get_rng_state()
    built = {name: KINDS[name](file) for name, file in files.items()}
    assert torch.equal(torch.random.get_rng_state(), state), "building drew from the global generator"
    return built


@pytest.fixture
def small_extractors(extractors, monkeypatch):
    monkeypatch.setattr(extractors["inception"].network, "INPUT_IMAGE_SIZE", SMALL)
    return extractors


def levels(count=2, channels=3):
    return torch.randint(0, 256, (count, channels, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def images(count=2, channels=3):
    return levels(count, channels) / 127.5 - 1


def theirs(name, files, inception, dinov2, monkeypatch):
    if name == "inception":
        return inception
    if name == "clip":
        from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

        return FeatureExtractorCLIP("clip-vit-b-32", ["clip"], str(files["clip"]))
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class ClassToken(torch.nn.Module):
        def forward(self, x):
            return dinov2(pixel_values=x).pooler_output

    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: ClassToken())
    return FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])


@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_torch_fidelity(name, extractors, files, inception, dinov2, monkeypatch):
    features = extractors[name](images())
    expected = theirs(name, files, inception, dinov2, monkeypatch)(levels())
    torch.testing.assert_close(features, expected[0], rtol=1e-4, atol=1e-5)
    assert features.std() > 0
    if name == "inception":
        modules = extractors[name].network.modules()
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in modules), "it is folded"
        found = extractors[name].features_and_logits(images())
        for value, theirs_value in zip(found, expected, strict=True):
            scale = float(theirs_value.abs().max())
            torch.testing.assert_close(value, theirs_value, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", KINDS)
def test_an_extractor_keeps_its_contract(name, small_extractors):
    extractor = small_extractors[name]
    grey = images(1, channels=1)
    features = extractor(grey)
    assert isinstance(extractor, FeatureExtractor)
    assert features.shape == (1, extractor.dimension) == (1, DIMENSIONS[name])
    assert (features.dtype, features.requires_grad) == (torch.float32, False)
    assert extractor.name.startswith(f"{extractor.label}-{DIMENSIONS[name]}-")
    assert torch.equal(features, extractor(grey.repeat(1, 3, 1, 1))), "grey is repeated to three channels"
    half = images().bfloat16()
    assert torch.equal(extractor(half), extractor(half.float())), "half precision loses nothing more"
    with pytest.raises(MetricError, match="1 or 3"):
        extractor(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("name", KINDS)
def test_features_with_a_graph_are_the_same_and_its_gradient_leads(name, small_extractors):
    extractor = small_extractors[name]
    batch, generator = images(), torch.Generator().manual_seed(3)
    with torch.inference_mode():
        expected = extractor(batch)
    assert torch.equal(extractor(batch.clone().requires_grad_()).detach(), expected)
    weights = torch.randn(extractor.dimension, generator=generator)
    gradient = image_gradient(extractor, batch, weights.expand(len(batch), -1))
    step = gradient.sign() * (torch.rand(batch.shape, generator=generator) < 0.1) / 127.5  # a whole level
    with torch.inference_mode():
        ahead, behind = (float((extractor(batch + sign * step) @ weights).double().sum()) for sign in (1, -1))
    assert (ahead - behind) / 2 == pytest.approx(float((gradient * step).sum()), rel=0.1)


def test_a_bare_state_dict_is_the_same_network(tmp_path, files, extractors):
    weights = {name: tensor.clone() for name, tensor in read_checkpoint(files["clip"]).tensors.items()}
    save_file(weights, tmp_path / "clip.safetensors")
    assert ClipExtractor(tmp_path / "clip.safetensors").name == extractors["clip"].name


def test_positions_of_other_image_sizes_are_the_authors(tmp_path):
    """Recorded from the authors' repository (b8931f7), whose factors are shifted by 0.1 and so differ from others'."""
    network = network_files.random_dinov2(image_size=518)
    positions = network.embeddings.position_embeddings
    positions.data = torch.sin(torch.arange(1370 * 64).reshape(1, 1370, 64) * 0.37)
    network.save_pretrained(tmp_path / "dinov2")
    scaled = DinoV2Extractor(tmp_path / "dinov2").network.embeddings.position_embeddings
    assert scaled.shape == (1, 257, 64)
    found = [float(scaled[0, i, j]) for i, j in ((0, 1), (1, 0), (17, 5), (256, 63))]
    assert found == pytest.approx([0.361615, 0.072726, 0.9022, -0.284871], abs=1e-5)


class Levels(InceptionExtractor):
    """Gives the levels that its network would get."""

    def _build(self, weights):
        return torch.nn.Identity(), 12, {}

    def _features(self, levels):
        return levels.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_levels_are_the_nearest_bytes_and_let_the_gradient_through(dtype):
    extractor, every = Levels(), torch.arange(256.0)
    assert torch.equal(extractor((every / 127.5 - 1).reshape(64, 1, 2, 2))[:, :4].flatten(), every)
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 0.1, -0.1, 0.7]).to(dtype).requires_grad_()
    found = extractor(values.reshape(2, 1, 2, 2))
    assert torch.equal(found, extractor(values.detach().reshape(2, 1, 2, 2)))
    assert found[:, :4].flatten()[:5].tolist() == [0, 0, 128, 255, 255]
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert gradient.dtype == dtype
    expected = [0, *[3 * 127.5] * 3, 0, *[3 * 127.5] * 3]  # grey is repeated to three channels
    assert gradient.tolist() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (InceptionExtractor, {"model": Explosive()}, "give the weights of torch-fidelity's Inception"),
        (ClipExtractor, {"visual.proj": torch.zeros(2, 2)}, "belongs to another network"),
        (DinoV2Extractor, {"pos_embed": torch.zeros(3)}, "give the folder in weights"),
    ],
)
def test_files_that_are_not_its_weights_are_refused(tmp_path, kind, content, message):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with network_files.refused(path, message):
        kind(path)


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_a_folder_with_a_torn_file_is_refused(tmp_path, files, damaged):
    folder = tmp_path / "torn"
    shutil.copytree(files["dinov2"], folder)
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content[: len(content) // 2])
    with pytest.raises(MetricError, match=r"torn: cannot be read \(.*give the folder in weights"):
        DinoV2Extractor(folder)


@pytest.mark.parametrize("content", [pickle.dumps(Explosive(), 2), b"no pickle"])
def test_nothing_in_an_archive_is_executed(tmp_path, files, content):
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(files["clip"]) as archive, zipfile.ZipFile(path, "w") as bad:
        for name in archive.namelist():
            bad.writestr(name, content if name.endswith("/data.pkl") else archive.read(name))
    with network_files.refused(path):
        ClipExtractor(path)


def test_weights_are_looked_for_where_torch_fidelity_puts_them(tmp_path, monkeypatch, files):
    name, asked = "clip-vit-b-32-40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af.pt", []

    def no_network(url, destination, hash_prefix):
        asked.extend([url, destination, hash_prefix[:8]])
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(MetricError, match=r"no route to host.*give its path in the setting weights") as caught:
        find_extractor("clip", weights=None)  # before anything is packed
    assert asked[1:] == [str(tmp_path / "checkpoints" / name), "40d36571"]
    assert asked[0] in str(caught.value)
    (tmp_path / "checkpoints" / name).symlink_to(files["clip"])
    assert ClipExtractor().name.startswith(ClipExtractor.label)
