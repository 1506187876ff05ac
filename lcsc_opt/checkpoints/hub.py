"""Checkpoints that are revisions of a repository at the Hugging Face hub: ``hf://owner/name@step-*``.

Each is a path in the cache, under the commit that the revision is at. Reading it fetches its weights, once.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import urllib.parse
from pathlib import Path

from lcsc_opt.base.errors import LcscError, MissingPackageError, ObjectiveError, TrajectoryError
from lcsc_opt.base.files import sync_folder
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.progress import notice

_PATTERN = re.compile(r"hf:/+([^/@]+/[^/@]+)@(.+)")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAFE = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
_PICKLED = ["*.bin", "*.bin.index.json"]
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]


def revisions(pattern: Path) -> list[Path] | None:
    """Where the branches and tags that match ``hf://owner/name@GLOB`` are, or will be; nothing is fetched.

    Returns:
        ``None`` if the pattern is of this machine.

    Raises:
        TrajectoryError: another form, no such repository or revision, or no network.
    """
    if not str(pattern).startswith("hf:/"):  # a path makes one slash of two
        return None
    if (found := _PATTERN.fullmatch(str(pattern))) is None:
        raise TrajectoryError(f"{pattern}: expected hf://owner/name@REVISIONS, where REVISIONS may be a glob.")
    name, wanted = found.groups()
    client = import_extra("huggingface_hub")
    try:
        refs = client.HfApi().list_repo_refs(name)
    except Exception as error:  # the client raises what its transport does
        raise _unreachable(TrajectoryError, f"hf://{name}", error) from error
    there = {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}
    matching = [revision for revision in there if fnmatch.fnmatchcase(revision, wanted)]
    if not matching:
        some = ", ".join(sorted(there)[:4])
        raise TrajectoryError(f"hf://{name} has no revision {wanted}: it has {some}.")
    place = _place() / name.replace("/", "--")
    return [place / there[revision] / urllib.parse.quote(revision, safe="") for revision in matching]


def fetched(path: Path) -> Path:
    """The same path, where its weights are by now if it is one of :func:`revisions`; others are left alone.

    Raises:
        TrajectoryError: it holds no weights, or there is no network.
    """
    name = repository_of(path)
    if name is None or path.exists():
        return path
    _, commit, revision = path.relative_to(_place()).parts
    where = f"hf://{name}@{urllib.parse.unquote(revision)}"
    notice(f"{where}: its weights are fetched to {path}")
    client = import_extra("huggingface_hub")
    partial = path.with_name(f"{path.name}.partial")
    try:
        for kinds in (_SAFE, _PICKLED):
            client.snapshot_download(name, revision=commit, allow_patterns=kinds, local_dir=partial)
            if any(any(partial.glob(kind)) for kind in kinds):
                break
        else:
            raise TrajectoryError(f"{where} holds neither {_SAFE[0]} nor {_PICKLED[0]}: name other revisions.")
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes
        partial.rename(path)
        sync_folder(path.parent)
    except TrajectoryError:
        raise
    except Exception as error:
        raise _unreachable(TrajectoryError, where, error) from error
    return path


def repository_of(path: Path) -> str | None:
    """``owner/name`` of one of :func:`revisions`; ``None`` for other paths."""
    return path.relative_to(_place()).parts[0].replace("--", "/") if _place() in path.parents else None


def model_folder(name: str) -> Path:
    """A model's configuration and tokenizer, fetched without its weights.

    Raises:
        ObjectiveError: no such model, or no network.
    """
    try:
        if not _NAME.fullmatch(name):
            raise ValueError("this is no name at the hub")
        return Path(import_extra("huggingface_hub").snapshot_download(name, allow_patterns=_SMALL))
    except MissingPackageError:
        raise
    except Exception as error:
        raise _unreachable(ObjectiveError, f"model: {name} is no folder, and", error) from error


def _unreachable(kind: type[LcscError], what: str, error: Exception) -> LcscError:
    reason = " ".join(str(error).split())[:200]
    return kind(f"{what} cannot be fetched from the Hugging Face hub ({type(error).__name__}: {reason})")


def _place() -> Path:
    return cache_directory() / "hub"
