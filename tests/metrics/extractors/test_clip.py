"""The CLIP extractor, on a small archive as OpenAI's; and that nothing in such an archive is executed."""

import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import MetricError
from lcsc_opt.checkpoints import read_checkpoint
from lcsc_opt.metrics import FeatureExtractor
from lcsc_opt.metrics.extractors.clip import ClipExtractor
from lcsc_opt.metrics.extractors.weights import read_weights
from tests.metrics import network_files


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "ViT-B-32.pt"
    network_files.write_clip(path)
    return path


@pytest.fixture(scope="module")
def extractor(archive):
    state = torch.random.get_rng_state()
    built = ClipExtractor(archive)
    assert torch.equal(torch.random.get_rng_state(), state), "building drew from the global generator"
    return built


def levels(count=3, channels=3):
    return torch.randint(0, 256, (count, channels, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_features_are_those_of_torch_fidelity_from_the_same_archive(extractor, archive):
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    theirs = FeatureExtractorCLIP("clip-vit-b-32", ["clip"], str(archive))
    features = extractor(levels() / 127.5 - 1)
    assert torch.equal(features, theirs(levels())[0])
    assert features.std() > 0.1


def test_tensors_are_those_that_torch_reads_from_the_archive(archive):
    with pytest.warns((DeprecationWarning, FutureWarning), match="jit"):
        expected = torch.jit.load(archive).state_dict()
    read = read_checkpoint(archive).tensors
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) and read[name].dtype == expected[name].dtype for name in read)
    assert read["visual.conv1.weight"].dtype == torch.float16


def test_features_with_a_graph_are_the_same_bit_for_bit_and_its_gradient_leads(extractor):
    network_files.assert_same_with_graph(extractor, levels() / 127.5 - 1)
    network_files.assert_gradient_leads(extractor, levels() / 127.5 - 1)


def test_extractor_keeps_its_contract(extractor):
    features = extractor(levels(channels=1) / 127.5 - 1)
    assert isinstance(extractor, FeatureExtractor)
    assert features.shape == (3, extractor.dimension) == (3, 12)
    assert features.dtype == torch.float32
    assert extractor.name.startswith("clip-vit-b-32-12-")
    with pytest.raises(MetricError, match="1 or 3"):
        extractor(torch.zeros(1, 2, 8, 8))


def test_half_precision_samples_lose_nothing_more(extractor):
    images = (levels() / 127.5 - 1).bfloat16()
    assert torch.equal(extractor(images), extractor(images.float()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_bare_state_dict_is_the_same_network(tmp_path, archive, extractor, suffix):
    path, read = tmp_path / f"clip{suffix}", read_checkpoint(archive).tensors
    weights = {name: tensor.clone() for name, tensor in read.items()}
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    assert ClipExtractor(path).name == extractor.name


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"visual.proj": torch.zeros(2, 2), "text_projection": torch.zeros(2, 2)}, path)
    with pytest.raises(MetricError, match="belongs to another network") as caught:
        ClipExtractor(path)
    assert str(caught.value).startswith(str(path))


def test_weights_are_looked_for_where_torch_fidelity_puts_them(tmp_path, monkeypatch):
    asked = {}

    def no_network(url, destination, hash_prefix):
        asked.update(url=url, destination=destination, hash_prefix=hash_prefix)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(MetricError, match="no route to host") as caught:
        ClipExtractor()
    assert asked["url"].endswith(f"{asked['hash_prefix']}/ViT-B-32.pt")
    assert asked["destination"] == str(tmp_path / "checkpoints" / f"clip-vit-b-32-{asked['hash_prefix']}.pt")
    assert "weights: {clip: PATH}" in str(caught.value)


def rewritten(archive, path, *, member, content, compression=zipfile.ZIP_STORED):
    """The archive with one member replaced."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(member) else old.read(name))
    return path


class Explosive:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file was executed')",))


TENSOR_TOO_LARGE = (
    b"\x80\x02c__torch__.m\nM\n)\x81}X\x01\x00\x00\x00ac"
    b"torch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    b"K\x00J\x00\x00\x00\x01\x85K\x00\x85\x89}tRsb."
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Explosive(), 2), "archive of a __builtin__.exec, not of a module"),
        (pickle.dumps(print, 2), "archive of a __builtin__.print, not of a module"),
        (b"\x80\x02}.", "archive of a dict, not of a module"),
        (b"\x80\x02c__torch__.m\nM\n)\x81}b.", "holds no tensor"),
        (b"not a pickle", "is truncated or is not weights"),
        (TENSOR_TOO_LARGE, "tensors of 0.1 GiB in a file of 0.0 GiB"),
    ],
)
def test_nothing_in_an_archive_is_executed(tmp_path, archive, content, message):
    path = rewritten(archive, tmp_path / "bad.pt", member="/data.pkl", content=content)
    with pytest.raises(MetricError, match=message) as caught:
        ClipExtractor(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_archives_are_one_line(tmp_path, archive):
    generator, refused = random.Random(0), []
    with zipfile.ZipFile(archive) as stored:
        tree = stored.read("ViT-B-32/data.pkl")
    for _ in range(30):
        content = network_files.damaged(tree, generator)
        path = rewritten(archive, tmp_path / "damaged.pt", member="/data.pkl", content=content)
        try:
            read_weights(path, what="CLIP")
        except MetricError as error:
            refused.append(str(error))
    assert len(refused) > 15
    assert not any("\n" in message for message in refused)


def test_a_compressed_archive_is_refused_before_it_unfolds(tmp_path, archive):
    path = rewritten(archive, tmp_path / "bomb.pt", member="/data/0", content=b"0", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(MetricError, match="is truncated or is not weights"):
        ClipExtractor(path)
