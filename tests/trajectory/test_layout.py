from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.in_memory import pack_state_dicts
from lcsc_opt.trajectory.layout import ALIGNMENT, DTYPES, MERGED, Layout

described = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(sorted(DTYPES))),
    min_size=1,
    max_size=12,
)


@given(described)
def test_tensors_never_overlap_and_regions_are_aligned(tensors):
    layout = Layout.arranged((name, shape, dtype) for name, (shape, dtype) in tensors.items())
    end = 0
    previous = None
    for spec in layout.tensors:
        assert spec.offset >= end
        region = spec.dtype if spec.dtype in MERGED else "copied"
        if region != previous:
            assert spec.offset % ALIGNMENT == 0
        elif spec.merged:
            assert spec.offset == end  # a region is one matrix, so nothing lies between its tensors
        end = spec.end
        previous = region
    assert layout.row_bytes % ALIGNMENT == 0
    assert layout.row_bytes >= max(end, ALIGNMENT)


@settings(max_examples=20)
@given(described, st.randoms())
def test_layout_does_not_depend_on_the_order_of_the_state_dict(tensors, random):
    items = [(name, shape, dtype) for name, (shape, dtype) in tensors.items()]
    shuffled = random.sample(items, len(items))
    assert Layout.arranged(items) == Layout.arranged(shuffled)


def test_non_contiguous_and_conjugated_tensors_are_stored_by_value():
    tensors = {"z": torch.tensor([1 + 2j, 3 - 1j]).conj(), "t": torch.arange(6.0).view(2, 3).t()}
    layout = Layout.of(tensors)
    row = layout.row_of(tensors)
    assert len(row) == layout.row_bytes
    contents = {spec.name: spec.of_row(row) for spec in layout.tensors}
    assert contents["z"].view(torch.complex64).tolist() == [1 - 2j, 3 + 1j]
    assert contents["t"].view(torch.float32).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("tensor", [torch.ones(2).to_sparse(), torch.ones(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_cannot_be_stored_are_refused(tmp_path, tensor):
    with pytest.raises(TrajectoryError, match=r"^Tensor 'w' is sparse"):
        Layout.of({"w": tensor})
    with pytest.raises(TrajectoryError, match="the state dict of step 2: Tensor 'w' is sparse"):
        pack_state_dicts({1: {"w": torch.ones(2)}, 2: {"w": tensor}}, tmp_path)
