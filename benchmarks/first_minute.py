"""The first minute: words to type and seconds to wait, from an empty environment to the first printed gain.

    python benchmarks/first_minute.py [--rounds 3] [--keep FOLDER] [--here]

README's first block of Python, and the quickstart of Optuna's README with a line that prints what it found. Each is
installed into a new environment of its own and run there in an empty folder. The seconds of an installation depend on
the network and on what pip has at hand. With ``--keep`` the environments stay in a folder, and the same command after
an interruption goes on with them. With ``--here`` nothing is installed and the environment of this script is used.
Writes results/first_minute.md.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, machine, parse

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OPTUNA = """\
import optuna

def objective(trial):
    x = trial.suggest_float('x', -10, 10)
    return (x - 2) ** 2

study = optuna.create_study()
study.optimize(objective, n_trials=100)

print(study.best_params)
"""
SEARCH = re.compile(r"(\d+\.\d) s$", re.M)  # the seconds of a search in the printed table


@dataclasses.dataclass(frozen=True)
class Way:
    """What a newcomer types.

    Attributes:
        name: in the table.
        requirements: what pip installs, one command each.
        code: of the script.
        gain: what the line of the first printed gain contains.
    """

    name: str
    requirements: tuple[str, ...]
    code: str
    gain: str

    @property
    def folder(self) -> str:
        """The name of its environment's folder."""
        return re.sub(r"\W+", "-", self.name)

    @property
    def lines(self) -> int:
        """Lines of code, without empty ones."""
        return sum(bool(line.strip()) for line in self.code.splitlines())

    @property
    def words(self) -> int:
        """What stands between spaces: in the code without its comments, and in one command that installs."""
        code = re.sub(r"  # .*", "", self.code)
        return len(code.split()) + len(["pip", "install", self.requirements[-1]])


def readme_block() -> str:
    """README's first block of Python."""
    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    return block[1]


def install(way: Way, folder: Path) -> tuple[Path, float]:
    """A new environment with what a way needs, unless it is there: its Python, and the seconds that this took."""
    python = folder / "bin" / "python"
    seconds_file = folder / "seconds.txt"  # written when all is installed
    if seconds_file.exists():
        return python, float(seconds_file.read_text())
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    for requirement in way.requirements:
        pip: list[str | Path] = [python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS]
        subprocess.run([*pip, *requirement.split()], check=True)
    seconds = time.perf_counter() - start
    seconds_file.write_text(str(seconds))
    return python, seconds


def processor_seconds() -> float:
    """Of all processes that ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_gain(way: Way, python: Path) -> tuple[float, str]:
    """Seconds from the start of Python to the first printed gain, and all that was printed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "first.py").write_text(way.code)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(
            [python, "first.py"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        seconds = 0.0
        printed = []
        for line in process.stdout:
            printed.append(line)
            if way.gain in line and not seconds:
                seconds = time.perf_counter() - start
        if process.wait() != 0 or not seconds:
            sys.exit(f"{way.name}: ended with {process.returncode} and printed {''.join(printed)!r}")
    return seconds, "".join(printed)


def measured_row(way: Way, rounds: int, environments: Path | None) -> str:
    """The row of a way in the table; without a folder for ``environments``, in that of this script."""
    installing = "not measured"
    python = Path(sys.executable)
    if environments is not None:
        python, seconds = install(way, environments / way.folder)
        installing = f"{seconds:.0f}"
    gains = []
    searches = []
    before = processor_seconds()
    for _ in range(rounds):
        gain, printed = first_gain(way, python)
        gains.append(gain)
        searches.append(sum(float(seconds) for seconds in SEARCH.findall(printed)))
    processor = (processor_seconds() - before) / rounds
    search = f"{statistics.median(searches):.1f}" if any(searches) else "–"
    shown_gains = f"{statistics.median(gains):.1f} ({min(gains):.1f} to {max(gains):.1f})"
    return f"| {way.name} | {way.lines} | {way.words} | {installing} | {shown_gains} | {search} | {processor:.1f} |"


def main() -> None:
    """Measure both ways and write the table."""
    here = {"action": "store_true", "help": "install nothing"}
    keep = {"type": Path, "help": "a folder for the environments"}
    arguments = parse(__doc__, rounds=3, here=here, keep=keep)
    load = os.getloadavg()[0]
    torch = re.search(r"^torch==\S+", CONSTRAINTS.read_text(), re.M)
    assert torch is not None
    ways = [
        Way("README's block", (torch[0], str(ROOT)), readme_block(), "below EMA*"),
        Way("Optuna's quickstart", ("optuna",), OPTUNA, "{'x': "),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        environments = None if arguments.here else (arguments.keep or Path(temporary))
        rows = [measured_row(way, arguments.rounds, environments) for way in ways]
    lines = [
        "# The first minute",
        "",
        machine(),
        "",
        f"Seconds from the start of Python are medians of {arguments.rounds} runs, with the range; those of a",
        f"processor are means. The load average was {load:.1f} at the start. Optuna prints no time of its search.",
        "",
        "| | lines | words | s to install | s to the first printed gain | of these, s of search | processor s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "first_minute.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
