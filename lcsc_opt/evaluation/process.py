"""Starts a worker as a process of this machine, and holds the connection to it.

The process is started by ``subprocess``. With ``multiprocessing`` it would run the user's script again, and would have
its own environment variables only after the script's imports. An executor of ``concurrent.futures`` runs one call at a
time in a process, so the stages of two candidates could not overlap there. Nor can it stop a running call, or say with
which exit code a process died.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from multiprocessing import spawn
from typing import Any

from lcsc_opt.evaluation.worker import Answer, WorkerSettings

_SCRIPT_KEYS = ("init_main_from_name", "init_main_from_path")  # the user's script, by its module or its path


class WorkerProcess:
    """A worker process, and the connection to it.

    The process begins with the environment variables of its settings, before anything is imported. It is stopped by
    :meth:`terminate`, and ends by itself when this process ends.

    Args:
        settings: the settings of the worker.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._connection, connection_of_worker = multiprocessing.Pipe()
        # the path comes first: it is where the worker finds this library
        code = f"import sys; sys.path[:] = {sys.path!r}; from lcsc_opt.evaluation.worker import main; main()"
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-c", code],
                stdin=connection_of_worker.fileno(),
                env={**os.environ, **settings.variables()},
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            connection_of_worker.close()
        with contextlib.suppress(OSError):  # it has died: receive() reports that
            self._connection.send(_preparation(settings))
            self._connection.send(settings)

    def send(self, pickled_job: bytes) -> None:
        """Give the worker a job. Raises OSError if it is gone."""
        self._connection.send_bytes(pickled_job)

    def receive(self) -> Answer:
        """Wait for its next answer. Raises EOFError or OSError if it is gone."""
        answer: Answer = self._connection.recv()
        return answer

    def terminate(self) -> None:
        """Stop it, also in the middle of a job."""
        self._process.terminate()

    def join(self) -> tuple[str, bool]:
        """Wait until it has ended, and close the connection.

        Returns how it ended, and that this counts as a death: unlike a node of Ray's, nothing else can have taken it.
        """
        exit_code = self._process.wait()
        self._connection.close()
        cause = f"exit code {exit_code}"
        if exit_code < 0:  # a signal ended it
            cause = f"killed, or out of memory; {cause}"
        return f"the worker process died ({cause})", True


def _preparation(settings: WorkerSettings) -> dict[str, Any]:
    """What ``multiprocessing`` prepares a new process with: the module path, arguments and working directory.

    The user's script is imported, under another name than ``__main__``, only if the objective is defined in it. So
    other scripts need no ``if __name__ == "__main__"``.
    """
    preparation = spawn.get_preparation_data("lcsc worker")
    del preparation["authkey"]  # refuses to be pickled, and nothing here needs it
    if b"__main__" not in pickle.dumps(settings):
        for key in _SCRIPT_KEYS:
            preparation.pop(key, None)
    return preparation
