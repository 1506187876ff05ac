"""Reference images from folders, zip files, arrays and torchvision's datasets."""

import os
import pickle
import struct
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.metrics.reference.images import ImageSet
from tests.metrics import examples


def pixels(count=5, height=6, width=8, channels=3, seed=0):
    return examples.pixels(count, height, width, channels, seed)


def write(folder, images, suffix=".png", **options):
    for i, image in enumerate(images):
        path = folder / f"class-{i % 2}" / f"{i:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path, **options)
    return folder


def in_order(images):
    """As names sort: the even ones are in the first folder."""
    return np.concatenate([images[::2], images[1::2]])


def all_bytes(image_set):
    levels = ((torch.cat(list(image_set.batches(2))) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def read(place, **options):
    return ImageSet.of_files(place, folder=place.parent / "cache", **options)


@pytest.mark.parametrize("most_decoded", [2**26, 5 * 6 * 8 * 3 - 1])
@pytest.mark.parametrize(
    ("suffix", "options"), [(".png", {}), (".WEBP", {"lossless": True}), (".bmp", {}), (".tiff", {})]
)
def test_every_level_of_every_image_comes_back_in_the_order_of_names(tmp_path, suffix, options, most_decoded):
    images = pixels()
    found = read(write(tmp_path / "real", images, suffix, **options), most_decoded=most_decoded)
    assert (found.count, found.size) == (5, (6, 8))
    assert np.array_equal(all_bytes(found), in_order(images))


def test_a_zip_file_is_the_folder(tmp_path):
    folder = write(tmp_path / "real", pixels())
    (folder / ".thumbnails").mkdir()
    for hidden in ("._1.png", ".thumbnails/1.png"):  # macOS and image viewers write such files
        (folder / hidden).write_bytes(b"no image")
    with zipfile.ZipFile(tmp_path / "real.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
        archive.writestr("dataset.json", "{}")
    zipped, unzipped = read(tmp_path / "real.zip"), read(folder)
    assert zipped.content == unzipped.content
    assert np.array_equal(all_bytes(zipped), all_bytes(unzipped))


def test_grey_images_stay_grey_and_one_coloured_one_makes_all_rgb(tmp_path):
    folder = write(tmp_path / "real", pixels(4, channels=1))
    grey = read(folder)
    assert next(grey.batches(4)).shape == (4, 1, 6, 8)
    Image.fromarray(pixels(1)[0]).save(folder / "class-0" / "001.png")  # neither the first nor the last
    mixed = all_bytes(read(folder))
    assert mixed.shape == (5, 6, 8, 3)
    assert np.array_equal(mixed[[0, 2, 3, 4]], np.repeat(all_bytes(grey), 3, axis=3))


def test_files_are_read_once_until_one_changes(tmp_path):
    folder = write(tmp_path / "real", pixels())
    first = folder / "class-0" / "000.png"
    content, before = read(folder).content, first.stat()
    first.write_bytes(bytes(before.st_size))
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(folder).content == content, "nobody has looked inside"
    Image.fromarray(pixels(seed=3)[0]).save(first)
    os.utime(first, ns=(1, 1))
    assert read(folder).content != content


def test_folders_that_are_no_image_set_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetricError, match="holds no images"):
        read(tmp_path / "empty")
    folder = write(tmp_path / "real", pixels())
    Image.fromarray(pixels(1, 9, 9)[0]).save(folder / "odd.png")
    with pytest.raises(MetricError, match=r"differ in size: class-0/000.png is 6x8 and odd.png 9x9"):
        read(folder)
    (folder / "odd.png").write_bytes(b"no image")
    with pytest.raises(MetricError, match=r"odd.png: cannot be read as an image"):
        read(folder)
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(MetricError, match="is not a zip file"):
        read(tmp_path / "no.zip")


def deep_png(path, colour, channels):
    """A PNG of 16 bits a channel, as Pillow cannot write it in colours."""
    raw = b"".join(b"\0" + bytes(2 * 8 * channels) for _ in range(6))

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = struct.pack(">IIBBBBB", 8, 6, 16, colour, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)], ids=["grey", "colour", "transparent"])
def test_more_than_8_bits_a_channel_are_refused(tmp_path, colour, channels):
    deep_png(tmp_path / "deep.png", colour, channels)
    with pytest.raises(MetricError, match=r"deep.png has more than 8 bits"):
        read(tmp_path)


def test_a_palette_and_a_bitmap_of_few_bits_are_read(tmp_path):
    image = Image.fromarray(pixels(1)[0])
    image.save(tmp_path / "a.bmp")
    image.convert("P", colors=4).save(tmp_path / "b.png")
    image.save(tmp_path / "c.ppm")
    assert read(tmp_path).count == 3


@pytest.mark.parametrize("error", [struct.error("unpack"), KeyError("x"), TypeError("x")])
def test_whatever_a_damaged_file_makes_pillow_raise_names_it(tmp_path, monkeypatch, error):
    folder = write(tmp_path / "real", pixels(1), suffix=".jpg")

    def open_image(file):
        raise error

    monkeypatch.setattr(Image, "open", open_image)
    with pytest.raises(MetricError, match=r"000.jpg: cannot be read as an image"):
        read(folder)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_hugging_face_turns_them(tmp_path, suffix, orientation):
    gradient = np.linspace(0, 255, 16 * 8).reshape(16, 8, 1).repeat(3, axis=2).astype(np.uint8)
    path = tmp_path / "real" / f"photo{suffix}"
    path.parent.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(gradient).save(path, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # as datasets.Image decodes
    found = read(path.parent)
    assert found.size == upright.shape[:2]
    assert np.array_equal(all_bytes(found)[0], upright)


def test_linked_folders_and_files_are_followed_and_a_link_upwards_ends(tmp_path):
    images = pixels(6)
    folder = write(tmp_path / "real", images[:4])
    elsewhere = write(tmp_path / "disk2" / "dogs", images[4:])
    (folder / "dogs").symlink_to(elsewhere, target_is_directory=True)
    (folder / "first.png").symlink_to(folder / "class-0" / "000.png")
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    (elsewhere / "round").symlink_to(tmp_path, target_is_directory=True)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    assert read(folder).count == 7


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 2), (0, 3, 4, 3)])
def test_arrays_that_are_no_images_are_refused(shape):
    with pytest.raises(MetricError, match="expected images"):
        ImageSet.of_array(np.zeros(shape, dtype=np.uint8), source="x")
    with pytest.raises(MetricError, match="float32"):
        ImageSet.of_array(np.zeros((2, 3, 4, 3), dtype=np.float32), source="x")


@pytest.fixture
def datasets():
    from torchvision import datasets

    return datasets


def write_cifar10(root, images):
    """CIFAR-10 as published: rows of 3,072 bytes in pickled dictionaries."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    names = [f"data_batch_{i}" for i in range(1, 6)]
    for i, name in enumerate([*names, "test_batch"]):
        part = rows[i::6]
        with (folder / name).open("wb") as file:
            pickle.dump({"data": part, "labels": [0] * len(part)}, file)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]}))


def test_cifar10_is_read_as_torchvision_does(tmp_path, monkeypatch, datasets):
    images = pixels(12, 32, 32)
    write_cifar10(tmp_path, images)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: True)  # not the published files
    train, test = (ImageSet.of_dataset(f"cifar10-{split}", root=tmp_path) for split in ("train", "test"))
    assert (train.count, test.count, train.size) == (10, 2, (32, 32))
    assert np.array_equal(all_bytes(test), images[5::6])
    assert train.content != test.content


def test_grey_datasets_have_one_channel(tmp_path, monkeypatch, datasets):
    grey = pixels(3, channels=1)
    stored = SimpleNamespace(data=torch.from_numpy(grey[..., 0]))
    monkeypatch.setattr(datasets, "MNIST", lambda root, *, train, download: stored)
    assert np.array_equal(all_bytes(ImageSet.of_dataset("mnist-test", root=tmp_path)), grey)


def test_bundled_images_are_a_data_set(tmp_path):
    digits = ImageSet.of_dataset("mnist", root=tmp_path)
    images, _ = bundled_images("mnist")
    assert digits.count == len(images)
    [first] = (batch for batch in digits.batches(len(images)))
    assert torch.allclose(first, images, atol=1 / 127), "as they are saved"


def test_a_dataset_that_was_changed_is_downloaded_and_never_unpickled(tmp_path, monkeypatch, datasets):
    asked = []
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", lambda *a, **k: asked.append(a))
    write_cifar10(tmp_path, pixels(12, 32, 32))
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(examples.Explosive()))
    with pytest.raises(MetricError, match="cifar10-train cannot be read from"):
        ImageSet.of_dataset("cifar10-train", root=tmp_path)
    assert len(asked) == 1
