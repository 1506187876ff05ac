"""Reads checkpoints in a process of its own, and tells what each cost and whether anything ran.

Of each file: ``outcome`` ("read", "refused", or the name of an error that no user should see), ``message``,
``seconds`` of CPU time, ``megabytes`` by which the process's peak memory grew, and ``events``: whatever Python reported
about running code, starting programs or writing files meanwhile.
"""

from __future__ import annotations

import codecs
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.processes import CONTEXT, SECONDS, forked

WATCHED = ("exec", "compile", "import", "os.", "subprocess", "socket", "shutil", "ctypes", "pty", "pickle.find_class")
CODECS = ("cp437", "unicode_escape", "utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
events: list[str] = []
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writing or (event.startswith(WATCHED) and event not in HARMLESS):
        events.append(f"{event} {arguments!r}"[:200])


def memory(*, peak: bool) -> float:
    """Megabytes that this process has resident now; with ``peak``, the most since :func:`forget_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the most since the process began
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(name))


def forget_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def read(path: str) -> dict[str, Any]:
    global watching
    from lcsc_opt.base.errors import TrajectoryError
    from lcsc_opt.checkpoints.order import checkpoint_steps
    from lcsc_opt.checkpoints.reading import read_checkpoint

    events.clear()
    forget_peak()
    resident, start = memory(peak=False), time.process_time()
    outcome, message = "read", ""
    watching = True
    try:
        checkpoint_steps([Path(path).parent / f"step=1{Path(path).suffix}"])[0]
        for tensor in read_checkpoint(path).tensors.values():
            tensor.ne(
                tensor
            ).any() if tensor.numel() and not tensor.is_quantized and tensor.itemsize > 1 else tensor.shape
    except TrajectoryError as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        outcome, message = type(error).__name__, str(error)[:300]
    watching = False
    seconds = time.process_time() - start
    grown = memory(peak=True) - resident
    found = {"outcome": outcome, "message": message, "seconds": seconds, "megabytes": grown, "events": list(events)}
    return {"path": path, **found}


def in_a_child(paths: Sequence[Path], *, warm: Path) -> list[dict[str, Any]]:
    """What :func:`read` found for each path, in a new process that has read ``warm`` before."""
    received, sent = CONTEXT.Pipe(duplex=False)
    process = forked(_read_all, sent, [str(path) for path in (warm, *paths)])
    process.start()
    sent.close()
    found: list[dict[str, Any]] = []
    while len(found) <= len(paths):
        assert received.poll(SECONDS), f"no answer after {found[-1:]}"
        found.append(received.recv())
    process.join()
    assert found[0]["outcome"] == "read", found[0]
    return found[1:]


def _read_all(sent: Connection, paths: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for codec in CODECS:
        codecs.lookup(codec)  # which imports it, the first time
    sys.addaudithook(watch)
    for path in paths:
        sent.send(read(path))
