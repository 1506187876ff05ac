"""Zip files and ``.npz`` made to inflate to gigabytes are refused before they do; what is only large is read."""

import io
import struct
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest

from lcsc_opt.base.archives import array_header, array_members, check_member, read_array, read_member
from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.reference.files import read_reference_file
from lcsc_opt.metrics.reference.images import ImageFiles
from lcsc_opt.metrics.statistics import ReferenceStatistics

MEGABYTE = 2**20
ZEROS = bytes(100 * MEGABYTE)  # 0.4 MB deflated at the fastest level


def header(shape, dtype="<f8"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def write(path, compression=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_dot_", "."), content)
    return path


def edited(path, change):
    """Write something else into the last entry of the zip's directory."""
    content = bytearray(path.read_bytes())
    change(content, content.rindex(b"PK\x01\x02"))
    path.write_bytes(content)
    return path


@contextmanager
def little_memory(most=4 * MEGABYTE):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def statistics(path):
    ReferenceStatistics.load(path)


def images_or_statistics(path):
    read_reference_file(path, "clip", images=True)


def folder(path):
    ImageFiles(path, cache=path.parent / "cache")


MU, SIGMA = npy(np.zeros(3)), npy(np.eye(3))


@pytest.mark.parametrize(
    ("read", "members", "message"),
    [
        (folder, {"a_dot_png": ZEROS}, r"a\.png would take 104,857,600 bytes out of .* without compression"),
        (images_or_statistics, {"arr_0_dot_npy": header((400, 512, 512, 1), "|u1") + ZEROS}, "arr_0.npy would take"),
        (images_or_statistics, {"features_dot_npy": header((MEGABYTE, 25), "<f4") + ZEROS}, "features.npy would take"),
        (statistics, {"mu_dot_npy": ZEROS, "sigma_dot_npy": SIGMA}, "mu.npy would take"),
        (statistics, {"mu_dot_npy": npy(np.zeros(20_000)), "sigma_dot_npy": SIGMA}, "with D from 1 to 16,384, got"),
        (statistics, {"mu_dot_npy": MU, "sigma_dot_npy": npy(np.zeros((2000, 2000)))}, r"sigma: expected .* \[3, 3\]"),
        (statistics, {"mu_dot_npy": npy(np.zeros(3, "S999999")), "sigma_dot_npy": SIGMA}, "mu: expected real numbers"),
        (
            statistics,
            {"mu_dot_npy": MU, "sigma_dot_npy": SIGMA, "extractor_dot_npy": npy(np.array("x" * MEGABYTE))},
            "extractor: expected one string",
        ),
        (statistics, {"mu_dot_npy": header((2**40,)), "sigma_dot_npy": SIGMA}, "is not .* bytes long"),
        (
            statistics,
            {"mu_dot_npy": b"\x93NUMPY\2\0" + struct.pack("<I", 2**25) + b" " * 2**25, "sigma_dot_npy": SIGMA},
            "cannot be read as reference statistics",
        ),
        (statistics, {"mu_dot_npy": b"\x93NUMPY\1\0\x28\x23" + b"-" * 8999 + b"1", "sigma_dot_npy": SIGMA}, "cannot"),
    ],
)
def test_what_would_inflate_is_refused_in_one_line_and_little_memory(tmp_path, read, members, message):
    path = write(tmp_path / ("bomb.zip" if read is folder else "bomb.npz"), **members)
    with pytest.raises(MetricError, match=message) as caught, little_memory():
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_image_of_very_many_bytes_is_refused_even_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("lcsc_opt.metrics.reference.images.MOST_BYTES", 1000)
    with pytest.raises(MetricError, match=r"a\.png has 1,001 bytes, at most 1,000 are read"):
        folder(write(tmp_path / "a.zip", a_dot_png=bytes(1001)))


def test_a_member_that_claims_less_than_it_is_is_read_as_far_as_it_claims(tmp_path):
    path = write(tmp_path / "a.zip", a=ZEROS)
    edited(path, lambda content, entry: struct.pack_into("<I", content, entry + 24, 1000))
    with zipfile.ZipFile(path) as archive, little_memory():
        check_member(archive, archive.infolist()[0])
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            read_member(archive, archive.infolist()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, entry: struct.pack_into("<I", content, entry + 20, 2**31), "cut off"),
        (lambda content, entry: struct.pack_into("<H", content, entry + 8, 1), "encrypted"),
        (lambda content, entry: struct.pack_into("<H", content, entry + 10, zipfile.ZIP_LZMA), "in a rare way"),
    ],
)
def test_members_that_cannot_be_read_in_parts_are_refused(tmp_path, change, message):
    path = edited(write(tmp_path / "a.zip", a_dot_png=bytes(10)), change)
    with pytest.raises(MetricError, match=message) as caught:
        folder(path)
    assert str(caught.value).startswith(str(path))


def test_a_damaged_image_in_a_zip_is_named(tmp_path):
    path = write(tmp_path / "a.zip", a_dot_bmp=bytes(1000))
    content = bytearray(path.read_bytes())
    content[30 + len("a.bmp")] = 0xFF  # a deflated block of a kind that does not exist
    path.write_bytes(content)
    with pytest.raises(MetricError, match=r"a\.bmp: cannot be read as an image"):
        folder(path)


def test_an_npy_that_claims_more_than_the_file_is_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(header((2**30, 2**15), "<f4") + bytes(100))
    with pytest.raises(MetricError, match=r"a\.npy: cannot be read"), little_memory():
        images_or_statistics(tmp_path / "a.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_they_were_saved(tmp_path, save):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    columns = np.asfortranarray(random.standard_normal((6, 7)))
    save(tmp_path / "a.npz", pixels, columns=columns, none=np.zeros((0, 3)), text=np.array("pixels-1"))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        read = {name: read_array(archive, info) for name, info in array_members(archive).items()}
    with np.load(tmp_path / "a.npz") as expected:
        assert set(read) == set(expected)
        for name, array in expected.items():
            assert array.dtype == read[name].dtype
            assert np.array_equal(array, read[name])


@pytest.mark.parametrize("times", [1.0, 1.5, 150])
def test_the_images_of_adm_are_not_too_large(tmp_path, times):
    """50,000 images of 256x256: their bytes are claimed here, and not there."""
    shape = (50_000, 256, 256, 3)
    claimed = len(header(shape, "|u1")) + 50_000 * 256 * 256 * 3
    path = write(tmp_path / "VIRTUAL.npz", arr_0_dot_npy=header(shape, "|u1"))
    with zipfile.ZipFile(path) as archive:
        with path.open("r+b") as file:
            file.truncate(claimed)  # longer, and sparse
        info = archive.infolist()[0]
        info.file_size, info.compress_size = claimed, int((claimed - 1000) / times)
        assert array_header(archive, info) == (shape, np.uint8)
