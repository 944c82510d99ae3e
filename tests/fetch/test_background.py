"""What runs beside fetching: in which order, and what waits for what."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from obsfs.fetch.background import Background
from tests.conftest import wait_for


class House:
    def __init__(self) -> None:
        self.is_quiet = True
        self.done: list[str] = []
        self.background = Background(lambda: self.is_quiet)

    def steps(self, name: str, count: int) -> Iterator[None]:
        for number in range(count):
            self.done.append(f"{name}{number}")
            yield


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.background.close()


def test_prompt_tasks_run_in_order_while_housekeeping_is_held_up(house: House) -> None:
    held, begun = threading.Event(), threading.Event()

    def long_step() -> Iterator[None]:
        begun.set()
        held.wait(20)
        yield

    house.background.run_in_steps(long_step())
    assert begun.wait(20)
    for name in ("a", "b", "c"):
        house.background.run_in_background(lambda name=name: house.done.append(name))
    wait_for(lambda: house.done == ["a", "b", "c"])
    held.set()


def test_long_pieces_take_turns_and_come_to_their_ends(house: House) -> None:
    started = threading.Event()
    house.background.run_in_steps(started.wait(20) for _ in range(1))
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        house.background.run_in_steps(house.steps(name, count))
    started.set()
    wait_for(lambda: len(house.done) == 6)
    assert house.done == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_a_piece_without_end_does_not_keep_quiet_tasks_from_their_turn(house: House) -> None:
    def endless() -> Iterator[None]:
        while True:
            yield

    house.is_quiet = False
    house.background.run_in_steps(endless())
    house.background.run_when_idle(lambda: house.done.append("one"))
    house.background.run_when_idle(lambda: house.done.append("two"))
    house.is_quiet = True
    wait_for(lambda: house.done == ["one", "two"])


def test_rounds_come_again_and_again_beside_all_else(house: House) -> None:
    def endless() -> Iterator[None]:
        while True:
            yield

    house.background.run_in_steps(endless())
    house.background.run_repeatedly(0.01, lambda: house.done.append("round") or print(1 / 0))
    wait_for(lambda: house.done.count("round") > 3)
    alone = House()
    alone.background.run_repeatedly(0.01, lambda: alone.done.append("round"))
    wait_for(lambda: alone.done.count("round") > 3)
    alone.background.run_when_idle(lambda: alone.done.append("quiet"))
    wait_for(lambda: "quiet" in alone.done)
    alone.background.close()
    count = len(alone.done)
    time.sleep(0.05)
    assert len(alone.done) == count


def test_what_fails_takes_nothing_else_along(house: House) -> None:
    house.background.run_in_background(lambda: print(1 / 0))
    house.background.run_in_steps(print(1 / 0) for _ in range(3))
    house.background.run_when_idle(lambda: print(1 / 0))
    house.background.run_in_background(lambda: house.done.append("task"))
    house.background.run_in_steps(house.steps("step", 1))
    house.background.run_when_idle(lambda: house.done.append("quiet"))
    wait_for(lambda: sorted(house.done) == ["quiet", "step0", "task"])


def test_the_end_runs_all_tasks_and_drops_steps() -> None:
    house = House()
    house.is_quiet = False

    def endless() -> Iterator[None]:
        while True:
            yield

    house.background.run_in_steps(endless())
    for name in ("a", "b"):
        house.background.run_in_background(lambda name=name: house.done.append(name))
        house.background.run_when_idle(lambda name=name: house.done.append(f"quiet {name}"))
    house.background.close()
    assert sorted(house.done) == ["a", "b", "quiet a", "quiet b"]
    assert not any(thread.is_alive() for thread in house.background._threads)
