"""Threads for requests that wait: whose calls run, in which order, on how many threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.fuse.kernel.pool import WaitingPool
from tests.conftest import wait_for


@pytest.fixture
def held() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("groups", [9, 40, 300])
def test_however_many_groups_are_held_up_another_one_runs(groups: int, held: threading.Event) -> None:
    pool = WaitingPool("test")
    begun: list[int] = []
    for number in range(groups):
        for _ in range(20):
            pool.submit(number, lambda number=number: (begun.append(number), held.wait(20)))
    done = threading.Event()
    pool.submit("other", done.set)
    assert done.wait(20)
    wait_for(lambda: set(begun) == set(range(groups)))
    assert pool.thread_count <= groups + 70
    held.set()
    wait_for(lambda: Counter(begun) == Counter(dict.fromkeys(range(groups), 20)))
    pool.close()


def test_one_group_holds_few_threads_and_its_calls_begin_in_order(held: threading.Event) -> None:
    pool = WaitingPool("test", max_per_group=3)
    begun: list[int] = []
    for number in range(50):
        pool.submit("a", lambda number=number: (begun.append(number), held.wait(20)))
    wait_for(lambda: len(begun) == 3)
    assert pool.thread_count == 3
    held.set()
    wait_for(lambda: len(begun) == 50)
    assert sorted(begun[:3]) == [0, 1, 2]
    pool.close()


def test_however_many_calls_of_some_groups_are_silent_the_others_do_not_wait_for_each_other(
    held: threading.Event,
) -> None:
    """One group that has used up what it may leaves more than one thread to each of the next ones."""
    pool = WaitingPool("test", max_threads=64, max_per_group=48, shared=48)
    begun: Counter[str] = Counter()
    for group in ("first", "second", "third"):
        for _ in range(500):
            pool.submit(group, lambda group=group: (begun.update([group]), held.wait(20)))
    wait_for(lambda: begun == {"first": 24, "second": 12, "third": 6})
    silent, done = threading.Event(), threading.Event()
    pool.submit("fourth", lambda: (silent.set(), held.wait(20)))
    assert silent.wait(20)
    pool.submit("fourth", done.set)
    assert done.wait(20)
    for number in range(20):
        one = threading.Event()
        pool.submit(number, one.set)
        assert one.wait(20)
    held.set()
    wait_for(lambda: begun == dict.fromkeys(("first", "second", "third"), 500))
    pool.close()


def test_threads_that_have_nothing_to_do_end(held: threading.Event) -> None:
    pool = WaitingPool("test", idle_seconds=0.05)
    for number in range(30):
        pool.submit(number, lambda: held.wait(20))
    assert pool.thread_count == 30
    held.set()
    wait_for(lambda: pool.thread_count == 0)
    done = threading.Event()
    pool.submit(0, done.set)
    assert done.wait(20)
    pool.close()


def test_a_call_that_fails_takes_no_thread_along() -> None:
    pool = WaitingPool("test", max_threads=1)
    done = threading.Event()
    pool.submit(0, lambda: print(1 / 0))
    pool.submit(0, done.set)
    assert done.wait(20)
    pool.close()


def test_closing_forgets_what_has_not_begun(held: threading.Event) -> None:
    pool = WaitingPool("test", max_per_group=1)
    ran: list[int] = []
    begun = threading.Event()
    pool.submit(0, lambda: (begun.set(), held.wait(20)))
    assert begun.wait(20)
    pool.submit(0, lambda: ran.append(1))
    pool.close()
    pool.submit(1, lambda: ran.append(2))
    held.set()
    wait_for(lambda: pool.thread_count == 0)
    assert not ran


@given(
    calls=st.lists(st.integers(0, 4), max_size=60),
    max_threads=st.integers(1, 6),
    max_per_group=st.integers(1, 4),
    shared=st.integers(0, 6),
)
def test_each_call_runs_once_and_bounds_hold(
    calls: list[int], max_threads: int, max_per_group: int, shared: int
) -> None:
    pool = WaitingPool("test", max_threads=max_threads, max_per_group=max_per_group, shared=shared)
    guard, running, ran = threading.Lock(), Counter[int](), list[int]()
    excess: list[str] = []

    def call(group: int, number: int) -> None:
        with guard:
            running[group] += 1
            if running[group] > max_per_group or running.total() > max_threads:
                excess.append(f"{running}")
        with guard:
            running[group] -= 1
            ran.append(number)

    for number, group in enumerate(calls):
        pool.submit(group, lambda group=group, number=number: call(group, number))
    wait_for(lambda: len(ran) == len(calls))
    assert sorted(ran) == list(range(len(calls)))
    assert not excess
    pool.close()
