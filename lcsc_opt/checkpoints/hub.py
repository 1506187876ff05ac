"""Checkpoints that are revisions of a repository at the Hugging Face hub: ``hf://owner/name@step-*``.

Each is a path in the cache, under the commit that the revision is at. Reading it downloads its weights, once.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import urllib.parse
from pathlib import Path

from lcsc_opt.base.errors import LcscError, MissingPackageError, ObjectiveError, TrajectoryError
from lcsc_opt.base.files import only_process, sync_folder
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.progress import notice

_PATTERN = re.compile(r"hf:/+([^/@]+/[^/@]+)@(.+)")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAFETENSORS_FILES = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
_PICKLED_FILES = ["*.bin", "*.bin.index.json"]
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def revisions(pattern: Path) -> list[Path] | None:
    """Where the branches and tags that match ``hf://owner/name@GLOB`` are, or will be; nothing is downloaded.

    Returns:
        ``None`` if the pattern is of this machine.

    Raises:
        TrajectoryError: another form, no such repository or revision, or no network.
    """
    if not str(pattern).startswith("hf:/"):  # a path makes one slash of two
        return None
    match = _PATTERN.fullmatch(str(pattern))
    if match is None:
        raise TrajectoryError(f"{pattern}: expected hf://owner/name@REVISIONS, where REVISIONS may be a glob.")
    repository, glob = match.groups()
    client = import_extra("huggingface_hub")
    try:
        refs = client.HfApi().list_repo_refs(repository)
    except Exception as error:  # the client raises what its transport does
        raise _unreachable(TrajectoryError, f"hf://{repository}", error) from error
    commits = {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}
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
        TrajectoryError: it holds no weights, or there is no network.
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
    """A model's configuration and tokenizer, downloaded without its weights.

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
        raise _unreachable(ObjectiveError, f"model: {name} is no folder, and", error) from error


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
            if any(any(partial.glob(pattern)) for pattern in patterns):
                break
        else:
            raise TrajectoryError(
                f"{address} holds neither {_SAFETENSORS_FILES[0]} nor {_PICKLED_FILES[0]}: name other revisions."
            )
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes
        partial.rename(path)
        sync_folder(path.parent)
    except TrajectoryError:
        raise
    except Exception as error:
        raise _unreachable(TrajectoryError, address, error) from error


def _unreachable(kind: type[LcscError], subject: str, error: Exception) -> LcscError:
    reason = " ".join(str(error).split())[:200]
    return kind(f"{subject} cannot be fetched from the Hugging Face hub ({type(error).__name__}: {reason})")


def _hub_directory() -> Path:
    return cache_directory() / "hub"
