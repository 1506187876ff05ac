"""Revisions at the Hugging Face hub, with a stand-in for its client."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save, save_file

import lcsc_opt
from lcsc_opt.base.errors import ObjectiveError, TrajectoryError
from lcsc_opt.checkpoints import hub
from lcsc_opt.checkpoints.finding import Selection
from lcsc_opt.search.result import Result
from lcsc_opt.trajectory.cached import PackRequest
from lcsc_opt.trajectory.packing import check_checkpoints, open_or_pack
from tests.objectives.image_objectives import one_line

PATTERN = Path("hf://owner/name@step*")
HF_API = huggingface_hub.HfApi
SNAPSHOT_DOWNLOAD = huggingface_hub.snapshot_download


class Hub:
    """Some revisions of one repository, each with a file of weights or of pickled ones."""

    def __init__(self) -> None:
        self.commits = {"main": "c0", "step2": "c2", "step10": "ca", "step30": "cb"}
        self.fetched: list[tuple[str, str]] = []
        self.suffix = "safetensors"
        self.subfolder = ""

    def list_repo_refs(self, name: str) -> Any:
        if name != "owner/name":
            raise RuntimeError("404 Client Error.\nRepository Not Found")
        refs = [types.SimpleNamespace(name=ref, target_commit=commit) for ref, commit in self.commits.items()]
        return types.SimpleNamespace(branches=refs[:2], tags=refs[2:])

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: Sequence[str], local_dir: Path) -> str:
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        if f"*.{self.suffix}" in allow_patterns:
            self.fetched.append((name, revision))
            local_dir = local_dir / self.subfolder
            local_dir.mkdir(exist_ok=True)
            weights = {"a": torch.full((2,), float(int(revision[1:], 16)))}
            if self.suffix == "bin":
                torch.save(weights, local_dir / "pytorch_model.bin")
            else:
                name = "diffusion_pytorch_model" if self.subfolder else "model"
                save_file(weights, local_dir / f"{name}.safetensors")
        elif self.suffix == "bin":
            (local_dir / "adapter_config.json").write_text("{}")  # an adapter's, and no weights
        return str(local_dir)


@pytest.fixture
def real_client(monkeypatch: pytest.MonkeyPatch, client: Hub) -> None:
    """The client itself, in place of the stand-in."""
    monkeypatch.setattr(huggingface_hub, "HfApi", HF_API)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", SNAPSHOT_DOWNLOAD)


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.mark.parametrize(("suffix", "subfolder"), [("safetensors", ""), ("bin", ""), ("safetensors", "unet")])
def test_matching_revisions_are_packed_in_the_order_of_their_steps(
    client: Hub, tmp_path: Path, suffix: str, subfolder: str
) -> None:
    client.suffix = suffix
    client.subfolder = subfolder
    trajectory = open_or_pack([PATTERN], folder=tmp_path)
    assert trajectory.steps == (2, 10, 30)
    assert trajectory.merge([0, 1, 0])["a"].tolist() == [10, 10]
    assert client.fetched == [("owner/name", commit) for commit in ("c2", "ca", "cb")]
    assert open_or_pack([PATTERN], folder=tmp_path).path == trajectory.path, "they are packed already"
    assert len(client.fetched) == 3
    client.commits["step30"] = "cc"
    assert open_or_pack([PATTERN], folder=tmp_path).merge([0, 0, 1])["a"].tolist() == [12, 12]


def test_only_what_is_selected_is_fetched(client: Hub, tmp_path: Path) -> None:
    selection = Selection(last=2)
    check_checkpoints(PackRequest([PATTERN], tmp_path, selection=selection))
    assert client.fetched == [("owner/name", "ca")]
    assert open_or_pack([PATTERN], folder=tmp_path, selection=selection).steps == (10, 30)
    assert client.fetched == [("owner/name", "ca"), ("owner/name", "cb")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("hf://owner/name", "expected hf://owner/name@REVISIONS, where REVISIONS may be a glob"),
        ("hf://owner/name/lora-*.safetensors", r"hf download owner/name --local-dir FOLDER, and give FOLDER/lora-\*"),
        ("hf://owner/name@epoch*", "no revision epoch.*: it has main, step10, step2"),
        ("hf://owner/other@step*", r"cannot be fetched from the Hugging Face hub \(RuntimeError: 404 Client"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path: Path, pattern: str, message: str) -> None:
    one_line(TrajectoryError, message, lambda: open_or_pack([Path(pattern)], folder=tmp_path))


def test_revisions_without_weights_are_one_line(client: Hub, tmp_path: Path) -> None:
    client.suffix = "onnx"
    one_line(TrajectoryError, r"step2 holds neither \*.safetensors", lambda: open_or_pack([PATTERN], folder=tmp_path))


def test_a_model_that_is_no_folder_is_asked_for_at_the_hub() -> None:
    one_line(ObjectiveError, "model: a/b/c is no folder, and cannot be fetched", lambda: hub.model_folder("a/b/c"))


def test_revision_that_two_processes_need_is_fetched_once(
    client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one waits for the first, which keeps what an interrupted download has, and then finds it there."""
    path = (hub.revisions(PATTERN) or [])[0]
    download = client.snapshot_download
    both_asked = threading.Barrier(2)

    def slow_download(*args: Any, **kwargs: Any) -> str:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_asked.wait(0.5)
        return download(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", slow_download)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(hub.fetched, [path, path])) == [path, path]
    assert client.fetched == [("owner/name", "c2")]
    assert [entry.name for entry in path.iterdir()] == ["model.safetensors"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


class ClientCache:
    """A repository in the client's own cache, in its layout: blobs, to which snapshots link, and refs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "models--owner--cached"

    def add(self, revision: str, files: dict[str, bytes]) -> None:
        commit = hashlib.sha1(revision.encode()).hexdigest()
        ref = self.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        (self.folder / "blobs").mkdir(exist_ok=True)
        for name, content in files.items():
            blob = self.folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = self.folder / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


def weights(value: float, key: str = "weight") -> bytes:
    return save({key: torch.tensor([[0.0, value]])})


@pytest.fixture
def client_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, real_client: None) -> ClientCache:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return ClientCache(tmp_path / "hf")


def test_without_a_network_a_search_uses_the_cache_of_the_client(
    client_cache: ClientCache, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 10):
        client_cache.add(f"step-{step}", {"model.safetensors": weights(step), "README.md": b"a model"})
    client_cache.add("main", {"README.md": b"a model"})

    def searched() -> Result:
        net = torch.nn.Linear(2, 1, bias=False)
        return lcsc_opt.search(
            "hf://owner/cached@step-*", build=net, score=lambda net: (net.weight[0, 1] - 5) ** 2, budget=12, name="hub"
        )

    result = searched()
    assert result.studies[0].steps == (1, 2, 10)
    assert result.merge()["weight"][0, 1] == pytest.approx(5, abs=0.5)
    assert "the hub cannot be reached (OfflineModeIsEnabled); using the 4 revisions in" in capfd.readouterr().err
    shutil.rmtree(client_cache.folder)
    assert list(searched().compare()) == list(result.compare()), "what is stored needs neither the hub nor its cache"


def test_a_copy_of_the_cache_of_the_client_that_was_interrupted_is_made_again(
    client_cache: ClientCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_cache.add("step-1", {"model.safetensors": weights(1)})
    [path] = hub.revisions(Path("hf://owner/cached@step-1")) or []

    def cannot_link(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def copy_half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", cannot_link)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_half)
        with pytest.raises(KeyboardInterrupt):
            hub.fetched(path)
    assert (hub.fetched(path) / "model.safetensors").read_bytes() == weights(1)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "files",
    [
        {"unet/diffusion_pytorch_model.safetensors": weights(3), "unet/config.json": b"{}"},
        {
            "model.safetensors.index.json": b'{"weight_map": {"a": "part.safetensors"}}',
            "part.safetensors": weights(3, "a"),
        },
    ],
)
def test_folders_and_parts_in_the_cache_of_the_client_are_read(
    client_cache: ClientCache, tmp_path: Path, files: dict[str, bytes]
) -> None:
    client_cache.add("step-1", files)
    client_cache.add("step-2", files)
    [tensor] = open_or_pack(["hf://owner/cached@step-*"], folder=tmp_path).merge([0.5, 0.5]).values()
    assert tensor[0, 1] == 3


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}"},
        {"model.safetensors.index.json": b'{"weight_map": {"a": "part.safetensors", "b": "p2.safetensors"}}'}
        | {"part.safetensors": weights(3, "a")},
        {"model.safetensors.index.json": b'{"weight_map": {"a": "pa', "part.safetensors": weights(3, "a")},
        {"model.safetensors.index.json": b"[]", "part.safetensors": weights(3, "a")},
    ],
)
def test_what_the_cache_of_the_client_holds_in_part_is_refused(
    client_cache: ClientCache, tmp_path: Path, files: dict[str, bytes]
) -> None:
    client_cache.add("step-1", files)
    client_cache.add("step-2", files)
    one_line(
        TrajectoryError,
        r"hf://owner/cached@step-1 cannot be fetched",
        lambda: open_or_pack([Path("hf://owner/cached@step-*")], folder=tmp_path),
    )
