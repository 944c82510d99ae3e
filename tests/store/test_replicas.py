from __future__ import annotations

from obsfs.store.replicas import Replicas


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_is_measured_then_the_nearest_serves() -> None:
    replicas = Replicas(3, Clock())
    for seconds in (0.3, 0.1, 0.2):
        replicas.answered(replicas.order()[0], seconds)
    assert replicas.order() == [1, 2, 0]
    for _ in range(50):
        replicas.answered(1, 0.9)
    assert replicas.order()[0] == 2


def test_one_that_failed_is_left_alone_for_a_while() -> None:
    clock = Clock()
    replicas = Replicas(2, clock)
    replicas.answered(0, 0.1)
    replicas.answered(1, 0.2)
    replicas.failed(0)
    replicas.failed(0)  # at the same time: one failure
    assert replicas.order() == [1, 0]
    clock.now = 1.1
    assert replicas.order() == [0, 1]
    replicas.failed(0)
    clock.now = 2.2
    assert replicas.order() == [1, 0]
    clock.now = 3.2
    replicas.answered(0, 0.1)
    assert replicas.health[0].failures == 0


def test_when_all_have_failed_they_are_asked_all_the_same() -> None:
    replicas = Replicas(2, Clock())
    replicas.failed(0)
    replicas.failed(1)
    assert sorted(replicas.order()) == [0, 1]


def test_one_that_was_not_measured_for_a_minute_is_measured_again() -> None:
    clock = Clock()
    replicas = Replicas(2, clock)
    replicas.answered(0, 0.1)
    replicas.answered(1, 0.5)
    for clock.now in range(1, 60):
        replicas.answered(replicas.order()[0], 0.1)
    clock.now = 61
    assert replicas.order() == [1, 0]
    assert replicas.order() == [0, 1]  # whoever goes to measure it goes alone
