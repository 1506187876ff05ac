"""Runs the quick tests on other Pythons, dependencies, processors and users; exits with 1 if a row is red.

    python benchmarks/matrix.py [--quick] [--only WORD]

Other Pythons, users and dependencies run the quick tests of every room, other processors those of the rooms where
numbers are made; ``--quick`` runs these alone.

Each environment is made from the source distribution, in a folder of its own: with the versions of constraints.txt by
``make setup``, with the lowest or newest ones that pyproject.toml allows by uv. What this machine lacks is skipped,
with the reason. Each row replaces the one of its name in ``results/matrix.md``; ``--quick``, with many conditions in a
row, writes nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from common import RESULTS, machine, markdown, parse

ROOT = Path(__file__).parents[1]
NOBODY = "65534"
HERE = "{}.{}".format(*sys.version_info)
DEBIAN = "/usr/bin/python3"
OLDEST = {"OPENBLAS_CORETYPE": "Nehalem", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
ROOMS_OF_NUMBERS = (
    "base",
    "checkpoints",
    "coefficients",
    "database",
    "metrics",
    "objective",
    "optimizers",
    "test_contracts.py",
)
MANY_CORES = """
import os
os.cpu_count = lambda: 64
os.sched_getaffinity = lambda _process: set(range(64))
"""


class SkippedError(Exception):
    """This machine cannot have the row; the text says why."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of the tests: the environment (``python``, ``packages``, ``folder``, ``root``), and how it is run.

    Attributes:
        python: a version, or the path of an interpreter.
        packages: ``constraints``, ``lowest`` or ``newest``.
        folder: the checkout's name.
        root: whether the tests run as the user that runs this; otherwise as nobody.
        variables: of the environment.
        cores: ``1`` for one core; ``64`` for a machine that claims so many.
        memory_folder: whether there is a /dev/shm; otherwise TMPDIR is elsewhere, too.
        rooms: of the tests; none for all of them.
    """

    name: str
    python: str = HERE
    packages: str = "constraints"
    folder: str = "lcsc_opt"
    root: bool = True
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: int | None = None
    memory_folder: bool = True
    rooms: tuple[str, ...] = ()

    @property
    def environment(self) -> str:
        """The name of the folder with its checkout and its environment."""
        return f"{Path(self.python).name}-{self.packages}-{'root' if self.root else 'nobody'}"


ROWS = (
    Row("OpenBLAS for Haswell", variables={"OPENBLAS_CORETYPE": "Haswell"}),
    Row("OpenBLAS for SkylakeX", variables={"OPENBLAS_CORETYPE": "SkylakeX"}, rooms=ROOMS_OF_NUMBERS),
    Row("the oldest kernels of OpenBLAS, ATen and oneDNN", variables=OLDEST, rooms=ROOMS_OF_NUMBERS),
    Row("64 cores, faked", cores=64, rooms=ROOMS_OF_NUMBERS),
    Row("one core", cores=1, rooms=ROOMS_OF_NUMBERS),
    Row("no /dev/shm, TMPDIR elsewhere", memory_folder=False, rooms=ROOMS_OF_NUMBERS),
    Row("Debian's Python, not root, spaces and umlauts", python=DEBIAN, folder="Größen und Maße", root=False),
    *(Row(f"Python {version}", python=version) for version in ("3.10", "3.11", "3.12", "3.13") if version != HERE),
    Row("lowest dependencies", python="3.10", packages="lowest"),
    Row("newest dependencies", python="3.13", packages="newest"),
)
QUICK_ROWS = (
    Row(
        "Debian's Python, not root, spaces and umlauts, no /dev/shm, Haswell, 64 cores",
        python=DEBIAN,
        folder="Größen und Maße",
        root=False,
        variables={"OPENBLAS_CORETYPE": "Haswell"},
        cores=64,
        memory_folder=False,
    ),
    Row("lowest dependencies", python="3.10", packages="lowest"),
    Row("newest dependencies, the oldest kernels", python="3.13", packages="newest", variables=OLDEST),
)


def main() -> None:
    """Make the environments, run the tests, print, write."""
    quick = {"action": "store_true", "help": "three rows of many conditions, and a part of the tests"}
    arguments = parse(__doc__, quick=quick, only={"default": "", "help": "only rows whose name contains this"})
    rows = [row for row in (QUICK_ROWS if arguments.quick else ROWS) if arguments.only in row.name]
    if arguments.quick:
        rows = [dataclasses.replace(row, rooms=ROOMS_OF_NUMBERS) for row in rows]
    red, start = False, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lcsc-matrix-", dir="/tmp") as folder:
        work = Path(folder)
        work.chmod(0o755)
        archive = source_distribution(work)
        for number, row in enumerate(rows):
            began = time.perf_counter()
            try:
                failed, result = run(row, checkout(row, work, archive))
            except SkippedError as reason:
                failed, result = False, f"skipped: {reason}"
            red = red or failed
            seconds = time.perf_counter() - began
            if not arguments.quick:
                write(row, result, seconds)
            left = (time.perf_counter() - start) / (number + 1) * (len(rows) - number - 1)
            print(f"{row.name}: {result} ({seconds:.0f} s; about {left / 60:.0f} min left)", flush=True)
    sys.exit(red)


def write(row: Row, result: str, seconds: float) -> None:
    """Put a row into the table, in place of the one of its name."""
    path = RESULTS / "matrix.md"
    cells = [line.strip("| ").split(" | ") for line in path.read_text().splitlines()] if path.exists() else []
    known = {cell[0]: cell for cell in cells if cell[0] in {row.name for row in ROWS}}
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    rooms = "of numbers" if row.rooms else "all"
    about = [Path(row.python).name, row.packages, rooms, result, f"{seconds:.0f}", f"{day}, {commit.stdout.strip()}"]
    known[row.name] = [row.name, *about]
    header = ["condition", "Python", "dependencies", "rooms", "result", "seconds, with set-up", "run"]
    said = f"`make matrix`. Rooms of numbers: {', '.join(ROOMS_OF_NUMBERS)}."
    table = markdown([header, *(known[one.name] for one in ROWS if one.name in known)])
    path.write_text("\n".join(["# The quick tests elsewhere", "", said, "", machine(), "", *table, ""]))


def source_distribution(work: Path) -> Path:
    """What a release would hold, built from this checkout."""
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(work), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (archive,) = work.glob("*.tar.gz")
    return archive


def checkout(row: Row, work: Path, archive: Path) -> Path:
    """The row's checkout, with an environment; made once for all rows that share it.

    Raises:
        SkippedError: this machine has no such Python, user or tool.
    """
    folder = work / row.environment / row.folder
    if folder.exists():
        return folder
    python = interpreter(row)
    folder.parent.mkdir()
    with tarfile.open(archive) as packed:
        packed.extractall(folder.parent, filter="data") if sys.version_info >= (3, 12) else packed.extractall(
            folder.parent
        )
    next(folder.parent.iterdir()).rename(folder)
    if row.packages == "constraints":
        execute("make", "setup", f"PYTHON={python}", cwd=folder)
    else:
        execute(python, "-m", "venv", ".venv", cwd=folder)
        resolution = ("--resolution", "lowest-direct" if row.packages == "lowest" else "highest")
        into = ("--python", ".venv/bin/python")
        uv, whole = (sys.executable, "-m", "uv", "pip"), ("--extra", "dev", "pyproject.toml")
        execute(*uv, "compile", *into, *resolution, *whole, "-o", "all.txt", cwd=folder)
        execute(*uv, "install", *into, "-r", "all.txt", cwd=folder)
        execute(*uv, "install", *into, "--no-deps", "-e", ".", cwd=folder)
        (folder / ".venv" / ".set-up").touch()
    if not row.root:
        execute("chown", "-R", f"{NOBODY}:{NOBODY}", str(folder.parent), cwd=work)
    return folder


def interpreter(row: Row) -> str:
    """The path of the row's Python. Raises SkippedError where the row cannot run here."""
    if not row.root and (os.geteuid() != 0 or shutil.which("setpriv") is None):
        raise SkippedError("only root can become another user, with setpriv")
    if not row.memory_folder and subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        raise SkippedError("unshare is not allowed here")
    if row.python == HERE:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [*map(str, sorted(pyenv.glob(f"versions/{row.python}.*/bin/python")))]
    found += filter(None, (shutil.which(row.python), shutil.which(f"python{row.python}")))
    for python in found:
        if subprocess.run([python, "-c", "import ensurepip, venv"], check=False, capture_output=True).returncode == 0:
            return python
    raise SkippedError(f"no {row.python} on this machine that can make environments")


def execute(*command: str, cwd: Path) -> None:
    """Run a command of the set-up; what it printed is shown where it fails."""
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", flush=True)
        raise SystemExit(f"{' '.join(command)}: ended with {done.returncode}")


def run(row: Row, folder: Path) -> tuple[bool, str]:
    """Run the tests as the row says: whether they are red, and their last line."""
    variables = {**os.environ, **row.variables, "HOME": str(folder.parent), "PYTEST_ADDOPTS": "-m 'not slow' -q"}
    tests = " ".join(f"tests/{room}" for room in row.rooms) or "tests"
    command = ["make", "test", f"TESTS={tests}"]
    if row.cores == 1:
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    elif row.cores:
        (folder.parent / "cores").mkdir(exist_ok=True)
        (folder.parent / "cores" / "sitecustomize.py").write_text(MANY_CORES)
        variables["PYTHONPATH"] = str(folder.parent / "cores")
        command.append("JOBS=2")
    if not row.root:
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
    if not row.memory_folder:
        variables["TMPDIR"] = str(folder.parent / "temporary")
        (folder.parent / "temporary").mkdir(exist_ok=True)
        (folder.parent / "temporary").chmod(0o777)
        command = ["unshare", "--mount", "sh", "-c", 'umount -l /dev/shm; exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=folder, env=variables, check=False, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-12_000:], done.stderr[-2000:], sep="\n", flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout[-400:])
    return done.returncode != 0, ", ".join(counts) or f"no test ran, status {done.returncode}"


if __name__ == "__main__":
    main()
