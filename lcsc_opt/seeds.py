"""Every random number descends, by name, from one seed.

A name is a sequence of strings and integers, such as ``("search", 0)`` or ``("held-out", 0)``; two different
names give independent streams, and the same name gives the same stream on every machine.
"""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *name: str | int, bits: int = 63) -> int:
    """A seed for the stream called ``name`` below ``seed``: the first ``bits`` (1 to 256) of a SHA-256.

    63 bits fit what ``torch.Generator.manual_seed`` takes, 32 what ``numpy.random.RandomState`` takes.
    """
    text = json.dumps([seed, *name], separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest, "big") >> (256 - bits)
