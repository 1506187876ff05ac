"""A program that scores a model on the disk, with a time limit.

    objective:
      file: score.py
      settings: {checkpoints: runs/checkpoint-*, model: runs/checkpoint-500, score: "command:accuracy", maximize: true}

``COMMAND`` gets the folder of the merged model, and prints JSON in its last line. Its output goes into a file and not
into a pipe: a pipe stays open, and its reader waits, as long as any process that the program has started holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "evaluate.py"]
SECONDS = 600.0


def accuracy(model: Any, draw: Any) -> float:
    """What the program measures; ``draw.group`` and ``draw.seed`` tell it on which data."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # of another network: torch.save(model.state_dict(), ...)
        printed = run([*COMMAND, folder, draw.group, str(draw.seed)], Path(folder) / "output.txt")
    return float(json.loads(printed.splitlines()[-1])["accuracy"])


def run(command: list[str], output: Path) -> str:
    """What a program prints. It is ended with all that it has started, when it has ended or its time is over.

    Raises:
        subprocess.SubprocessError: the time is over, or its exit status is not zero; the trial's reason says so.
    """
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    try:
        status = process.wait(SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status:
        raise subprocess.CalledProcessError(status, command)
    return output.read_text(encoding="utf-8")
