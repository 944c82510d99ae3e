"""The table of open files, against counts that the test keeps itself."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.vfs.handles import BadHandleError, HandleTable, Mode

_NODES = (2, 3, 1 << 41)


def table(records: list[list[object]], closed: list[int] | None = None) -> HandleTable:
    on_closed = (lambda node: None) if closed is None else closed.append
    return HandleTable(threading.RLock(), lambda *changes: records.extend(changes), on_closed)


def restored(records: list[list[Any]]) -> HandleTable:
    other = table([])
    for kind, number, *values in records:
        other.restore(kind, number, values)
    return other


def counts(handles: HandleTable) -> dict[int, tuple[int, int, int]]:
    return {file.node: (file.buffered, file.passthrough, file.backing) for file in handles.files()}


steps = st.lists(
    st.tuples(
        st.sampled_from(["open", "release", "make_buffered", "backing"]), st.sampled_from(_NODES), st.sampled_from(Mode)
    ),
    max_size=40,
)


@given(steps)
def test_it_counts_each_mode_and_a_successor_counts_the_same(steps: list[tuple[str, int, Mode]]) -> None:
    records: list[list[object]] = []
    closed: list[int] = []
    handles = table(records, closed)
    expected: Counter[tuple[int, Mode]] = Counter()
    backings: dict[int, int] = {}
    numbers: dict[tuple[int, Mode], int] = {}
    for step, (what, node, mode) in enumerate(steps, 1):
        is_open = expected[node, mode] > 0
        if what == "open":
            numbers[node, mode] = handles.open(node, mode, unique=step * 2)
            expected[node, mode] += 1
            assert handles.counted(step * 2) is mode
        elif what == "release" and is_open:
            if mode is Mode.PASSTHROUGH and expected[node, mode] == 1 and backings.pop(node, 0):
                file, _ = handles.find(numbers[node, mode])
                handles.set_backing(file, 0)
            before = len(closed)
            handles.release(numbers[node, mode], step * 2)
            expected[node, mode] -= 1
            is_last = not any(expected[node, one] for one in Mode)
            assert closed[before:] == ([node] if is_last else [])
        elif what == "make_buffered" and expected[node, Mode.PASSTHROUGH] and not backings.get(node):
            number = handles.make_buffered(numbers[node, Mode.PASSTHROUGH], step * 2)
            expected[node, Mode.PASSTHROUGH] -= 1
            expected[node, Mode.BUFFERED] += 1
            numbers[node, Mode.BUFFERED] = number
            assert handles.counted(step * 2) is Mode.BUFFERED
        elif what == "backing" and expected[node, Mode.PASSTHROUGH]:
            backings[node] = step
            file, _ = handles.find(numbers[node, Mode.PASSTHROUGH])
            handles.set_backing(file, step)
        elif what == "release" and (node, mode) in numbers:
            with pytest.raises(BadHandleError):
                handles.release(numbers[node, mode])
        wanted = {
            node: (expected[node, Mode.BUFFERED], expected[node, Mode.PASSTHROUGH], backings.get(node, 0))
            for node in _NODES
            if any(expected[node, one] for one in Mode)
        }
        assert counts(handles) == wanted
        assert {node for node in _NODES if handles.is_open(node)} == set(wanted)
        snapshot = [record for node in _NODES for record in handles.records_of(node)] + list(handles.records())
        for successor in (restored(records), restored(snapshot)):
            assert counts(successor) == wanted
            assert [successor.counted(n * 2) for n in range(1, step + 1)] == [
                handles.counted(n * 2) for n in range(1, step + 1)
            ]
            for (one, kind), number in numbers.items():
                if expected[one, kind]:
                    file, found = successor.find(number)
                    assert (file.node, found) == (one, kind), "a handle means the same in a successor"


@pytest.mark.parametrize("handle", [0, 1, 4, 5, 2**63, -1])
def test_a_handle_that_nobody_gave_is_refused_and_changes_nothing(handle: int) -> None:
    records: list[list[object]] = []
    handles = table(records)
    given = handles.open(3, Mode.BUFFERED)
    before = list(records)
    for call in (handles.find, handles.release, handles.make_buffered):
        with pytest.raises(BadHandleError):
            call(handle)
    assert handles.reader(handle) is None
    assert (counts(handles), records) == ({3: (1, 0, 0)}, before)
    assert handles.find(given)[0].node == 3


def test_a_file_that_is_open_in_one_mode_has_no_handle_of_the_other() -> None:
    handles = table([])
    for node, mode, other in ((2, Mode.BUFFERED, Mode.PASSTHROUGH), (3, Mode.PASSTHROUGH, Mode.BUFFERED)):
        handles.open(node, mode)
        with pytest.raises(BadHandleError):
            handles.release(handles.handle_of(node, other))
    assert counts(handles) == {2: (1, 0, 0), 3: (0, 1, 0)}


def test_of_the_requests_the_last_4096_are_remembered() -> None:
    handles = table([])
    for unique in range(1, 5001):
        handles.open(2, Mode.BUFFERED, unique=unique)
    assert handles.counted(0) is None
    assert handles.counted(904) is None
    assert handles.counted(905) is Mode.BUFFERED


@pytest.mark.parametrize("values", [[1, 0], [1, -1, 0, False], ["1", 0, 0, False], [True, 0, 0, False], [1, 0, -4, 0]])
def test_a_damaged_record_is_refused(values: list[Any]) -> None:
    handles = table([])
    with pytest.raises((TypeError, ValueError)):
        handles.restore("open", 2, values)
