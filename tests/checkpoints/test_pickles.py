"""The pickle machine: plain data comes back as pickle itself would give it, and nothing is imported or called."""

from __future__ import annotations

import collections
import pickle
import pickletools

import hypothesis
import pytest
from hypothesis import strategies as st

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import InertUnpickler, PickleBytes, Record, Span

NUMBERS = st.integers(-(2**59), 2**59) | st.floats(allow_nan=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text()
KEYS = st.text() | st.integers(-(2**59), 2**59)
DATA = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def load(content: bytes, **options):
    return InertUnpickler(PickleBytes(memoryview(content)), **options).load()


@hypothesis.given(DATA, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_data_comes_back(data, protocol):
    content = pickle.dumps(data, protocol)
    assert load(content) == data
    assert load(pickletools.optimize(content)) == data


@hypothesis.given(DATA)
def test_shared_and_recursive_objects_stay_one_object(data):
    shared = [data]
    shared.append(shared)
    first, second = load(pickle.dumps([shared, shared]))
    assert first is second
    assert first[1] is first


def test_objects_classes_and_calls_are_records_of_what_the_pickle_says():
    counter, default = load(pickle.dumps([collections.Counter("aab"), collections.defaultdict(list, a=1)]))
    assert (counter.name, counter.args) == ("collections.Counter", ({"a": 2, "b": 1},))
    assert (default.name, default.args[0].name, default.items) == ("collections.defaultdict", "builtins.list", {"a": 1})
    assert all(type(record) is Record for record in (counter, default))


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_bytes_are_not_read_but_located(protocol):
    content = pickle.dumps({"a": b"x" * 300, "b": b"yz"}, protocol)
    spans = load(content)
    assert all(type(span) is Span for span in spans.values())
    texts = [content[span.start : span.start + span.size] for span in spans.values()]
    assert texts == [b"x" * 300, b"yz"]


@hypothesis.given(DATA, st.data())
def test_a_truncated_pickle_is_refused(data, draw):
    content = pickle.dumps(data)
    length = draw.draw(st.integers(0, len(content) - 1))
    with pytest.raises(TrajectoryError, match="truncated"):
        load(content[:length])


@pytest.mark.parametrize(
    "content",
    [b"(ios\nsystem\n.", b"(cos\nsystem\no.", b"\x82\x01.", b"(d.", b"(l.", b"I1\n.", b"\x97.", b"\xff."],
    ids=["INST", "OBJ", "EXT1", "DICT", "LIST", "INT", "NEXT_BUFFER", "none"],
)
def test_opcodes_that_no_writer_of_checkpoints_uses_are_refused(content):
    with pytest.raises(TrajectoryError, match="not weights"):
        load(content)
