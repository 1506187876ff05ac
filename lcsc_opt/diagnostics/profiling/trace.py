"""A Chrome trace of a few trials: every span, every operation of torch, every kernel of a GPU, thread by thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.spans import listening


def check_trace_file(file: Path) -> None:
    """Refuse a file that cannot be written before anything is run.

    Raises:
        StudySpecError: its folder is not there, or it is a folder itself.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise StudySpecError(f"--trace: {file} cannot be written; give a file in a folder that is there")


def write_trace(file: Path, run: Callable[[], object]) -> None:
    """Run, and write what happened as JSON for Perfetto and chrome://tracing; compressed if ``file`` ends in ``.gz``.

    Raises:
        StudySpecError: the file cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its library prints on stderr when it begins and ends
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    threads = _ExperimentalConfig(profile_all_threads=True)  # merging has a thread of its own
    with profile(activities=activities, experimental_config=threads) as recorded, listening(record_function):
        run()
    try:
        recorded.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        raise StudySpecError(f"--trace: {file} cannot be written ({' '.join(str(error).split())})") from error
