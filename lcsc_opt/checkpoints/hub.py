"""Checkpoints that are revisions of a repository at the Hugging Face hub: ``hf://owner/name@step-*``.

Each is a path in our cache, under the commit that the revision is at. Reading it downloads its weights, once. Where the
hub cannot be reached, as on the nodes of many clusters, the revisions are those of the client's own cache, which
``hf download`` fills.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import urllib.parse
from pathlib import Path

from lcsc_opt.base.errors import LcscError, MissingPackageError, ObjectiveError, TrajectoryError
from lcsc_opt.base.files import only_process, remove, replacing, sync_folder
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.progress import notice

_PATTERN = re.compile(r"hf:/+([^/@]+/[^/@]+)@(.+)")
_FILES = re.compile(r"hf:/+([^/@]+/[^/@]+)/(.+)")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAFETENSORS_FILES = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]  # also in subfolders
_PICKLED_FILES = ["*.bin", "*.bin.index.json", "adapter_config.json"]
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def revisions(pattern: Path) -> list[Path] | None:
    """Where the branches and tags that match ``hf://owner/name@GLOB`` are, or will be; nothing is downloaded.

    Returns:
        ``None`` if the pattern is of this machine.

    Raises:
        TrajectoryError: another form, no such repository or revision, or no network and none in the client's cache.
    """
    if not str(pattern).startswith("hf:/"):  # a path makes one slash of two
        return None
    match = _PATTERN.fullmatch(str(pattern))
    if match is None:
        advice = ""
        files = _FILES.fullmatch(str(pattern))
        if files is not None:
            advice = (
                f"; for files of one revision: hf download {files[1]} --local-dir FOLDER, and give FOLDER/{files[2]}"
            )
        raise TrajectoryError(f"{pattern}: expected hf://owner/name@REVISIONS, where REVISIONS may be a glob{advice}.")
    repository, glob = match.groups()
    commits = _commits(repository)
    matching = [revision for revision in commits if fnmatch.fnmatchcase(revision, glob)]
    if not matching:
        some = ", ".join(sorted(commits)[:4])
        raise TrajectoryError(f"hf://{repository} has no revision {glob}: it has {some}.")
    folder = _hub_directory() / repository.replace("/", "--")
    paths = []
    for revision in matching:
        name = urllib.parse.quote(revision, safe="")
        paths.append(folder / commits[revision] / name)
    return paths


def fetched(path: Path) -> Path:
    """Download the revision if necessary; return its path. Paths that are no :func:`revisions` are returned as is.

    A download that was interrupted is continued. Of several processes that need one revision, one downloads it.

    Raises:
        TrajectoryError: it holds no weights, or there is no network and none of them in the client's cache.
    """
    repository = repository_of(path)
    if repository is None or path.exists():
        return path
    with only_process(path, busy=f"another process downloads {path}: waiting"):
        if not path.exists():  # that process may have finished meanwhile
            _download(repository, path)
    return path


def repository_of(path: Path) -> str | None:
    """``owner/name`` of one of :func:`revisions`; ``None`` for other paths."""
    if _hub_directory() not in path.parents:
        return None
    return path.relative_to(_hub_directory()).parts[0].replace("--", "/")


def model_folder(name: str) -> Path:
    """A model's configuration and tokenizer, downloaded without its weights: of ``model`` in ``objectives/score.py``.

    Raises:
        ObjectiveError: no such model, or no network.
    """
    try:
        if not _NAME.fullmatch(name):
            raise ValueError("not a valid name on the hub")
        client = import_extra("huggingface_hub")
        return Path(client.snapshot_download(name, allow_patterns=_SMALL_FILES))
    except MissingPackageError:
        raise
    except Exception as error:
        unreachable = _unreachable(ObjectiveError, f"model: {name} is no folder, and", error)
        advice = "where a folder moved, name its new place: lcsc run FILE objective.settings.model=PLACE"
        raise ObjectiveError(f"{unreachable}; {advice}") from error


def _download(repository: str, path: Path) -> None:
    """Download a revision next to ``path``, and give it this name when it is complete."""
    _, commit, revision = path.relative_to(_hub_directory()).parts
    address = f"hf://{repository}@{urllib.parse.unquote(revision)}"
    notice(f"{address}: downloading its weights to {path}")
    client = import_extra("huggingface_hub")
    partial = path.with_name(f"{path.name}.partial")
    try:
        for patterns in (_SAFETENSORS_FILES, _PICKLED_FILES):
            client.snapshot_download(repository, revision=commit, allow_patterns=patterns, local_dir=partial)
            if any(partial.rglob(patterns[0])):
                break
        else:
            raise TrajectoryError(
                f"{address} holds neither {_SAFETENSORS_FILES[0]} nor {_PICKLED_FILES[0]}: name other revisions."
            )
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes
    except TrajectoryError:
        raise
    except Exception as error:
        files = _cached_weights(repository, commit)
        if not files:
            raise _unreachable(TrajectoryError, address, error) from error
        with replacing(path) as copied:  # not in ``partial``, which the client would take for a download of its own
            _link_or_copy(files, _cached_snapshot(repository, commit), copied)
        remove(partial)
        return
    partial.rename(path)
    sync_folder(path.parent)


def _commits(repository: str) -> dict[str, str]:
    """Branch or tag → its commit, of the hub; where that cannot be reached, of the client's cache."""
    client = import_extra("huggingface_hub")
    try:
        refs = client.HfApi().list_repo_refs(repository)
    except Exception as error:  # the client raises what its transport does
        cached = _cached_commits(repository)
        if not cached:
            raise _unreachable(TrajectoryError, f"hf://{repository}", error) from error
        reason = f"the hub cannot be reached ({type(error).__name__})"
        notice(f"hf://{repository}: {reason}; using the {len(cached)} revisions in {_client_cache(repository)}")
        return cached
    return {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}


def _client_cache(repository: str) -> Path:
    """The repository in the client's own cache: ``refs/REVISION`` holds a commit, ``snapshots/COMMIT`` the files.

    The layout is that of huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    constants = import_extra("huggingface_hub.constants")
    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _cached_commits(repository: str) -> dict[str, str]:
    """Revision → commit, of those in the client's cache."""
    folder = _client_cache(repository) / "refs"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8").strip() for path in files}


def _cached_weights(repository: str, commit: str) -> list[Path]:
    """The files of weights of a commit in the client's cache; none if one that an index lists is missing."""
    folder = _cached_snapshot(repository, commit)
    for patterns in (_SAFETENSORS_FILES, _PICKLED_FILES):
        files = [path for pattern in patterns for path in folder.rglob(pattern) if path.exists()]
        has_weights = any(path.suffix != ".json" for path in files)
        if has_weights and all(map(_has_all_parts, files)):
            return files
    return []


def _cached_snapshot(repository: str, commit: str) -> Path:
    return _client_cache(repository) / "snapshots" / commit


def _has_all_parts(file: Path) -> bool:
    """Whether the files that an index lists are there; other files list none."""
    if not file.name.endswith(".index.json"):
        return True
    try:
        listed = set(json.loads(file.read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # a download was interrupted in it
        return False
    return all((file.parent / str(name)).exists() for name in listed)


def _link_or_copy(files: list[Path], source: Path, destination: Path) -> None:
    """Put files of one folder into another, as links to the same bytes where the file system can."""
    for file in files:
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:  # of another file system
            shutil.copyfile(file, target)


def _unreachable(kind: type[LcscError], subject: str, error: Exception) -> LcscError:
    reason = " ".join(str(error).split())[:200]
    return kind(f"{subject} cannot be fetched from the Hugging Face hub ({type(error).__name__}: {reason})")


def _hub_directory() -> Path:
    return cache_directory() / "hub"
