"""The DINOv2 extractor: the same numbers as transformers' network inside torch-fidelity's extractor."""

import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureExtractor
from lcsc_opt.metrics.extractors.dinov2 import DinoV2Extractor, GatedLayers, VisionTransformer
from tests.metrics import network_files


@pytest.fixture(scope="module")
def theirs():
    return network_files.random_dinov2()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "dinov2.pth"
    torch.save(network_files.dinov2_weights(theirs), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    return DinoV2Extractor(weights)


def levels(count=2, channels=3):
    return torch.randint(0, 256, (count, channels, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_features_are_those_of_torch_fidelity_around_another_librarys_network(extractor, theirs, monkeypatch):
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class ClassToken(torch.nn.Module):
        def forward(self, x):
            return theirs(pixel_values=x).pooler_output

    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: ClassToken())
    expected = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])(levels())[0]
    features = extractor(levels() / 127.5 - 1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert features.std() > 0.1


def test_features_with_a_graph_are_the_same_bit_for_bit_and_its_gradient_leads(extractor):
    network_files.assert_same_with_graph(extractor, levels() / 127.5 - 1)
    network_files.assert_gradient_leads(extractor, levels() / 127.5 - 1)


def test_extractor_keeps_its_contract(extractor):
    features = extractor(levels(1, channels=1) / 127.5 - 1)
    assert isinstance(extractor, FeatureExtractor)
    assert features.shape == (1, extractor.dimension) == (1, 64)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert extractor.name.startswith("dinov2-64-")


def test_positions_of_other_image_sizes_are_the_authors():
    """Recorded from the authors' repository (b8931f7), whose factors are shifted by 0.1 and so differ from others'."""
    network = VisionTransformer(64, 0, 37, gated=False)
    network.pos_embed.data = torch.sin(torch.arange(1370 * 64).reshape(1, 1370, 64) * 0.37)
    positions = network._positions(16, 16).detach()
    assert positions.shape == (1, 257, 64)
    found = [float(positions[0, i, j]) for i, j in ((0, 1), (1, 0), (17, 5), (256, 63))]
    assert found == pytest.approx(POSITIONS, abs=1e-5)


POSITIONS = [0.361615, 0.072726, 0.9022, -0.284871]


def test_the_giant_models_gate_is_found(tmp_path, weights):
    stored = torch.load(weights)
    for i in range(2):
        for name in ("fc1", "fc2"):
            for kind in ("weight", "bias"):
                del stored[f"blocks.{i}.mlp.{name}.{kind}"]
        stored |= {f"blocks.{i}.mlp.{name}": value for name, value in GatedLayers(64).state_dict().items()}
    torch.save(stored, tmp_path / "giant.pth")
    assert DinoV2Extractor(tmp_path / "giant.pth")(levels(1) / 127.5 - 1).isfinite().all()


def test_the_first_half_of_the_giant_models_layer_is_the_gate():
    """``x1, x2 = x12.chunk(2)``, then ``silu(x1) * x2``, in the authors' repository."""
    layers = GatedLayers(64)
    layers.w12.bias.data.chunk(2)[0].fill_(-100)
    closed = layers(torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(closed, layers.w3.bias.expand(1, 3, 64))


@pytest.mark.parametrize("change", ["missing", "extra", "none"])
def test_weights_of_another_network_are_refused(tmp_path, weights, change):
    stored = torch.load(weights)
    if change == "missing":
        del stored["norm.weight"]
    elif change == "extra":
        stored["register_tokens"] = torch.zeros(1, 4, 64)
    else:
        stored = {"pos_embed": torch.zeros(3)}
    torch.save(stored, tmp_path / "other.pth")
    with pytest.raises(MetricError, match="belongs to another network") as caught:
        DinoV2Extractor(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_a_failed_download_says_what_to_fetch(tmp_path, monkeypatch):
    def no_network(url, destination, hash_prefix):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(MetricError, match=r"dinov2_vitl14_pretrain\.pth and put it at"):
        DinoV2Extractor()
