"""The Inception extractor, with random weights in the real file's format, and the import that it needs."""

import copy
import importlib
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureExtractor, extract
from lcsc_opt.metrics.extractors.base import ClassifyingExtractor, features_with_graph
from lcsc_opt.metrics.extractors.by_name import build_extractor
from lcsc_opt.metrics.extractors.inception import InceptionExtractor
from lcsc_opt.metrics.extractors.network import to_bytes, to_levels
from tests.metrics import network_files

SMALL = 107  # pixels, for gradients; the network's own 299 cost seven times as much


@pytest.fixture(scope="module")
def theirs():
    return network_files.random_inception()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(theirs.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    state = torch.random.get_rng_state()
    built = InceptionExtractor(weights)
    assert torch.equal(torch.random.get_rng_state(), state), "building drew from the global generator"
    return built


def images_of(channels, count=2):
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_features_are_those_of_torch_fidelity(extractor, theirs):
    images = images_of(3)
    as_written = ((images + 1) / 2 * 255).round().to(torch.uint8)
    features = extract(extractor, images)
    np.testing.assert_allclose(features, theirs(as_written)[0].double().numpy(), rtol=1e-5, atol=1e-7)
    assert features.std() > 0


def test_one_pass_gives_features_and_the_logits_of_torch_fidelity(extractor, theirs):
    images = images_of(3)
    features, logits = extractor.features_and_logits(images)
    expected = theirs(to_bytes(images))
    assert torch.equal(features, expected[0])
    assert torch.equal(logits, expected[1])
    assert isinstance(extractor, ClassifyingExtractor)


def test_features_with_a_graph_are_the_same_bit_for_bit(extractor):
    images = images_of(3)
    with torch.inference_mode():
        expected = extractor(images)
    features = features_with_graph(extractor, images.requires_grad_())
    assert torch.equal(features.detach(), expected)


def test_gradient_of_the_network_is_that_of_central_differences(extractor):
    """In float64, around levels that nothing rounds."""
    double = copy.copy(extractor)
    double._network = copy.deepcopy(extractor._network).double()
    double._network.INPUT_IMAGE_SIZE = SMALL
    levels = to_levels(images_of(3, 1)).double().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    weights, step = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (2048, levels.shape))
    (gradient,) = torch.autograd.grad(double._features(levels) @ weights, levels)
    with torch.inference_mode():
        ahead, behind = (double._features(levels + sign * 1e-6 * step) @ weights for sign in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-3)


def test_following_the_gradient_changes_features_of_rounded_images_as_it_says(extractor, monkeypatch):
    monkeypatch.setattr(extractor._network, "INPUT_IMAGE_SIZE", SMALL)
    network_files.assert_gradient_leads(extractor, images_of(3))


def test_extractor_keeps_its_contract(extractor):
    features = extractor(images_of(3, 1))
    assert isinstance(extractor, FeatureExtractor)
    assert features.shape == (1, extractor.dimension) == (1, 2048)
    assert features.dtype == torch.float32
    assert extractor.name.startswith("inception-v3-2048-")


def test_random_weights_need_no_file_are_the_same_each_time_and_let_images_through(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", pytest.fail)
    state = torch.random.get_rng_state()
    one, other = (build_extractor("random", weights=None, device="cpu") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.name == other.name
    assert one.name.startswith("inception-random-2048-")
    features, logits = one.features_and_logits(images_of(3))
    assert float((features[0] - features[1]).abs().mean()) > 0.01 * float(features.mean()) > 1e-4
    assert torch.isfinite(logits).all()
    with pytest.raises(MetricError, match="random takes no file"):
        build_extractor("random", weights=Path("file"), device="cpu")


def test_grey_images_are_repeated_to_three_channels(extractor):
    grey = images_of(1, 1)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_bytes_are_the_nearest_levels():
    levels = torch.arange(256)
    assert torch.equal(to_bytes(levels / 127.5 - 1), levels.to(torch.uint8))
    assert torch.equal(to_bytes((levels + 0.4) / 127.5 - 1)[:255], levels[:255].to(torch.uint8))
    assert to_bytes(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 2, 8, 8), (3, 8, 8)])
def test_images_of_another_shape_are_refused(extractor, shape):
    with pytest.raises(MetricError, match="1 or 3"):
        extractor(torch.zeros(shape))


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Explosive()}, "give the weights of torch-fidelity's Inception"),
        (torch.nn.Linear(2, 2), "holds a whole module"),
        ([torch.zeros(2)], "holds a list, not a state dict"),
        ({"state_dict": {"a": torch.zeros(2)}}, "has a dict at 'state_dict', not a tensor"),
        ({"fc.weight": torch.full((2, 2), torch.nan)}, "not finite"),
        ({"fc.weight": torch.zeros(2, 2)}, "belongs to another network"),
    ],
)
def test_files_that_are_no_inception_weights_are_refused(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(MetricError, match=message) as caught:
        InceptionExtractor(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_broken_and_missing_files_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("these are no weights")
    with pytest.raises(MetricError, match="is truncated or is not weights"):
        InceptionExtractor(tmp_path / "text.pth")
    with pytest.raises(MetricError, match="does not exist"):
        InceptionExtractor(tmp_path / "missing.pth")


def test_weights_in_the_hub_folder_are_found(tmp_path, monkeypatch, weights, extractor):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weights)
    assert InceptionExtractor().name == extractor.name


def test_failed_download_says_where_to_put_the_file(tmp_path, monkeypatch):
    asked = {}

    def no_network(url, destination, hash_prefix):
        asked.update(url=url, hash_prefix=hash_prefix)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(MetricError, match="no route to host") as caught:
        InceptionExtractor()
    assert str(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth") in str(caught.value)
    assert asked["hash_prefix"] == "6726825d"
    assert asked["url"] in str(caught.value)


def test_missing_torch_fidelity_is_named(monkeypatch, tmp_path):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MetricError, match="needs torch-fidelity"):
        InceptionExtractor(tmp_path / "weights.pth")


@pytest.fixture
def torchvision_registering(tmp_path, monkeypatch):
    """A torchvision whose registration of operators runs the given code; what is imported now comes back afterwards."""

    def is_ours(name):
        return name.partition(".")[0] == "torchvision"

    def make(code):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text("from . import _meta_registrations, later")
        (tmp_path / "torchvision" / "_meta_registrations.py").write_text(code)
        (tmp_path / "torchvision" / "later.py").touch()
        monkeypatch.syspath_prepend(tmp_path)

    before = {name: module for name, module in sys.modules.items() if is_ours(name)}
    for name in before:
        del sys.modules[name]
    yield make
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def test_torchvision_is_imported_where_its_operators_are_missing(torchvision_registering):
    torchvision_registering("raise RuntimeError('operator torchvision::nms does not exist')")
    from torchvision import later

    assert later is sys.modules["torchvision.later"]


def test_torchvision_that_cannot_be_imported_is_named_with_the_remedy(torchvision_registering):
    torchvision_registering("raise RuntimeError('something else')")
    with pytest.raises(ImportError, match="install the torchvision that belongs to this torch"):
        importlib.import_module("torchvision")
