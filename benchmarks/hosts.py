"""docs/cluster.sh over two hosts. Both are this machine, through a ``sshd`` of its own on loopback.

    python benchmarks/hosts.py

One search runs to its end. Another one is told to end in the middle, and continued. The trials must be those of
``lcsc run`` without a cluster, and no process of Ray may be left. Writes ``results/hosts.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, machine
from ray_nodes import OBJECTIVE, ROOT, study_file
from stress_search import Rows, rows, sqlite_url

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import study_names

NO_SSHD = "no sshd on this machine: apt-get install openssh-server"
SCRIPT = ROOT / "docs" / "cluster.sh"
OPTIMIZERS = ("LCSC", "CMA")
EVALUATIONS, EARLY, SECONDS = 24, 10, 0.3
HEAD_PORTS = range(21000, 31000)  # below those that systems assign, above those that Ray's workers take
CONFIGURATION = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile {folder}/pid
"""


def main() -> None:
    """Run, kill, print, write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        print(f"skipped: {NO_SSHD}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no daemon behind
    os.environ |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory(prefix="lcsc-hosts-") as name, server(Path(name), sshd):
        folder = Path(name)
        local = run(folder / "local", ["lcsc", "run", "study.yaml", "workers=3"])
        answers = [("runs to its end", judged(run(folder / "whole", command()), local))]
        kept = sum(map(len, run(folder / "again", command(), early=True).values()))
        ended = kept < len(OPTIMIZERS) * EVALUATIONS and not left()
        answers.append(
            ("SIGTERM in the middle", f"{kept} trials kept" if ended else f"WRONG: {kept} trials, {left()} left")
        )
        answers.append(("the same command again", judged(run(folder / "again", command()), local)))
    text = (
        "# docs/cluster.sh\n\nTwo hosts that are this machine, by ssh on loopback; here only Ray's head and the search"
    )
    text += f": {machine()}.\n\n| | |\n|---|---|\n" + "".join(f"| {what} | {seen} |\n" for what, seen in answers)
    print(text)
    (RESULTS / "hosts.md").write_text(text)
    sys.exit(any("WRONG" in seen for _, seen in answers))


@contextlib.contextmanager
def server(folder: Path, sshd: str) -> Iterator[None]:
    """Run a ``sshd`` that accepts the key in the folder; ``SSH`` and ``RAY`` say how to use it."""
    port = free_port(range(31000, 32000))
    for key in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "config").write_text(CONFIGURATION.format(port=port, folder=folder))
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd needs it
    there = folder / "ray"  # a login does not have this process's environment
    there.write_text(f'#!/bin/bash\nexport PYTHONPATH={ROOT} OMP_NUM_THREADS=1\nexec {shutil.which("ray")} "$@"\n')
    there.chmod(0o755)
    client = f"ssh -p {port} -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    os.environ |= {"SSH": f"{client} -o LogLevel=ERROR", "RAY": str(there), "HEAD": "127.0.0.1", "HEAD_CPUS": "0"}
    os.environ["RAY_PORT"] = str(free_port(HEAD_PORTS))
    daemon = subprocess.Popen([sshd, "-D", "-f", str(folder / "config")])
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait()


def command() -> list[str]:
    """The script, with two names of this machine as its hosts."""
    return [str(SCRIPT), "study.yaml", "127.0.0.1", f"{getpass.getuser()}@127.0.0.1"]


def run(folder: Path, arguments: list[str], *, early: bool = False) -> dict[str, Rows]:
    """Run the search, with ``early`` only to its middle. Study → its trials so far."""
    log, url = folder / "evaluations", sqlite_url(folder, "studies")
    study: dict[str, Any] = {
        "name": "hosts",
        "objective": {"file": OBJECTIVE, "settings": {"seconds": SECONDS, "log": str(log)}},
    }
    study |= {"optimizers": list(OPTIMIZERS), "seeds": [0], "budget": {"evaluations": EVALUATIONS}, "storage": url}
    study_file(folder, **study, workers={"ray": 3, "cpus": 1})
    with (folder / "output").open("ab") as output:
        running = subprocess.Popen(arguments, cwd=folder, stdout=output, stderr=output)
        while early and running.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) >= EARLY:
                running.terminate()
                break
            time.sleep(0.1)
        status = running.wait()
    if status and not early:
        print((folder / "output").read_text()[-4000:], file=sys.stderr)
    for _ in range(60):
        if not left():
            break
        time.sleep(0.5)
    return {name: rows(url, name) for name in (f"hosts/{optimizer}/0" for optimizer in OPTIMIZERS) if has(url, name)}


def has(url: str, name: str) -> bool:
    """Whether the database has a study of this name."""
    return name in study_names(open_storage(url, write=False))


def judged(found: dict[str, Rows], expected: dict[str, Rows]) -> str:
    """The text for the table: whether the trials are equal. Attempts may differ."""
    kept, wanted = ({name: [row[:5] + row[6:] for row in r] for name, r in d.items()} for d in (found, expected))
    equal = kept == wanted and len(wanted) == len(OPTIMIZERS) and not left()
    return f"{sum(map(len, kept.values()))} trials, equal" if equal else f"WRONG: trials differ, or {left()} left"


def left() -> int:
    """How many processes have the head's port in their command line."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += f":{os.environ['RAY_PORT']}" in (process / "cmdline").read_text(errors="replace")
    return found


def free_port(ports: range) -> int:
    """The first port that nothing listens on."""
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port in {ports}")


if __name__ == "__main__":
    main()
