"""The policy against simulated links: it finds what the link needs, and stays where more would bring nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.fetch.concurrency import AdaptiveConcurrency, RoundTrip, StallDetector

MB = 10**6
BLOCK = 1 << 20


class Link:
    """A link of so many bytes per second, per connection and in all; blocks arrive one by one, a little unevenly."""

    def __init__(self, policy: AdaptiveConcurrency, per_connection: int, total: int, seed: int = 0) -> None:
        self.policy = policy
        self.per_connection, self.total = per_connection, total
        self.now = 100.0
        self._random = random.Random(seed)

    @property
    def rate(self) -> float:
        return min(self.policy.current * self.per_connection, self.total)

    def run(self, seconds: float, *, is_busy: bool = True) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += BLOCK / self.rate * self._random.uniform(0.5, 1.5)
            self.policy.on_arrival(self.now, BLOCK, is_busy=is_busy)


@given(
    per_connection=st.integers(1 * MB, 200 * MB),
    total=st.integers(20 * MB, 3000 * MB),
    most=st.integers(1, 256),
    seed=st.integers(0, 9),
)
def test_it_finds_what_the_link_gives_and_settles(per_connection: int, total: int, most: int, seed: int) -> None:
    policy = AdaptiveConcurrency(most)
    link = Link(policy, per_connection, total, seed)
    link.run(50)
    assert 1 <= policy.current <= most
    best = min(most * per_connection, total)
    trying = 0.5 if policy.current * per_connection > total else 1.0
    assert link.rate >= trying * best * 0.7


def test_a_link_that_is_full_stays_with_the_connections_it_has() -> None:
    policy = AdaptiveConcurrency(64)
    link = Link(policy, 80 * MB, 400 * MB)
    link.run(3)
    assert policy.current == 16
    link.run(50)
    assert policy.current == 16, "what did not help is not tried again for a minute"


def test_a_far_server_gets_more_within_two_seconds() -> None:
    policy = AdaptiveConcurrency(64)
    link = Link(policy, 16 * MB, 400 * MB)
    link.run(2)
    assert policy.current == 32


def test_a_server_that_answers_late_gets_more_from_the_start() -> None:
    policy = AdaptiveConcurrency(64)
    for latency, connections in ((0.5, 64), (0.12, 32), (0.3, 32), (0.03, 16), (0.2, 16)):
        policy.on_answer(latency)
        assert policy.current == connections
    link = Link(policy, 80 * MB, 400 * MB)
    link.run(3)
    policy.on_answer(0.001)
    assert policy.current == 16
    assert AdaptiveConcurrency(5).current == 5
    few = AdaptiveConcurrency(5)
    few.on_answer(1.0)
    assert few.current == 5


def test_one_who_reads_little_at_a_time_changes_nothing() -> None:
    policy = AdaptiveConcurrency(64)
    Link(policy, 10 * MB, 400 * MB).run(20, is_busy=False)
    assert policy.current == 16


@pytest.mark.parametrize("most", [1, 5, 16])
def test_never_more_than_asked_for(most: int) -> None:
    policy = AdaptiveConcurrency(most)
    Link(policy, 1 * MB, 400 * MB).run(300)
    assert policy.current == most


def test_what_was_measured_long_ago_is_not_compared_with() -> None:
    policy = AdaptiveConcurrency(64)
    link = Link(policy, 20 * MB, 10_000 * MB)
    link.run(0.7)
    assert policy.current == 32
    link.run(60, is_busy=False)
    link.per_connection = 5 * MB
    link.run(30)
    assert policy.current == 64, "the slower link needs them all the more"


def test_nobody_is_impatient_before_anything_has_come() -> None:
    patience = StallDetector()
    assert patience.seconds == float("inf")
    patience.on_block(0.05)
    assert patience.seconds == 1.0


@given(st.lists(st.floats(0.001, 100), min_size=1))
def test_patience_is_longer_than_what_blocks_take(seconds: list[float]) -> None:
    patience = StallDetector()
    for one in seconds:
        patience.on_block(one)
    assert patience.seconds >= max(1.0, 4 * seconds[-1])
    for _ in range(1000):
        patience.on_block(0.001)
    assert patience.seconds == 1.0


@pytest.mark.parametrize(
    ("latency", "block", "expected"), [(0.03, 0.0131, 2), (0.2, 0.0131, 8), (0.03, 0.2, 0), (0.001, 0.0004, 2)]
)
def test_what_comes_in_the_time_of_an_answer(latency: float, block: float, expected: int) -> None:
    trip = RoundTrip()
    assert trip.blocks == 0
    for _ in range(50):
        trip.on_answer(latency)
        trip.on_answer(3 * latency)
        trip.on_block(block)
    assert trip.blocks == expected
