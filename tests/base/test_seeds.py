from __future__ import annotations

import hashlib
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.base.reproducibility import derive_seed

parts = st.one_of(st.text(max_size=8), st.integers(-5, 5))
names = st.lists(parts, max_size=4).map(tuple)


@given(st.integers(0, 2**64), names, st.integers(1, 256))
def test_a_seed_has_the_bits_that_were_asked_for(seed: int, name: tuple[str | int, ...], bits: int) -> None:
    derived = derive_seed(seed, *name, bits=bits)
    assert 0 <= derived < 2**bits
    assert derived == derive_seed(seed, *name, bits=bits)
    assert derived == derive_seed(seed, *name, bits=256) >> (256 - bits)


@given(st.integers(0, 3), names, st.integers(0, 3), names)
def test_different_names_give_different_seeds(
    seed: int, name: tuple[str | int, ...], other_seed: int, other_name: tuple[str | int, ...]
) -> None:
    same = (seed, *map(repr, name)) == (other_seed, *map(repr, other_name))
    assert (derive_seed(seed, *name) == derive_seed(other_seed, *other_name)) == same


def test_seeds_of_neighbouring_names_look_independent() -> None:
    seeds = [derive_seed(seed, "noise", i, bits=64) for seed, i in itertools.product(range(4), range(500))]
    bits = np.unpackbits(np.array(seeds, dtype=np.uint64).view(np.uint8)).reshape(len(seeds), 64)
    assert len(set(seeds)) == len(seeds)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(seeds))


def test_a_seed_is_the_beginning_of_a_sha256() -> None:
    digest = hashlib.sha256(b'[7,"search",0]').hexdigest()
    assert derive_seed(7, "search", 0, bits=256) == int(digest, 16)
    assert derive_seed(7, "search", 0, bits=32) == int(digest[:8], 16)
    assert derive_seed(7, "search", 0) == derive_seed(7, "search", 0, bits=63)
