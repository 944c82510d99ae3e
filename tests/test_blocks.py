"""Block numbers as ranges."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from obsfs.blocks import runs


@given(st.sets(st.integers(0, 50)))
def test_runs_have_no_gaps(blocks: set[int]) -> None:
    found = list(runs(sorted(blocks)))
    assert [block for run in found for block in run] == sorted(blocks)
    assert all(before.stop < after.start for before, after in itertools.pairwise(found))
