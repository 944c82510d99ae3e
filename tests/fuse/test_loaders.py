"""What loaders are about to read: pure, with a clock of the test's own."""

from __future__ import annotations

from obsfs.fuse.loaders import WholeReads

WEIGHTS = "model-00001-of-00002.safetensors"


class Setup:
    def __init__(self, available: int) -> None:
        self.now = 100.0
        self.reads = WholeReads(lambda: available, lambda: self.now)


def test_weights_are_read_whole_after_their_config() -> None:
    setup = Setup(available=4000)
    assert setup.reads.on_open(7, WEIGHTS, 600) == 0, "whoever opens weights alone may want one tensor of them"
    assert setup.reads.on_open(7, "config.json", 10) == 0
    assert setup.reads.on_open(7, "vocab.json", 10) == 0
    assert setup.reads.on_open(7, WEIGHTS, 600) == 600
    assert setup.reads.on_open(8, WEIGHTS, 600) == 0, "another directory"


def test_no_more_is_read_than_a_quarter_of_the_memory() -> None:
    setup = Setup(available=4000)
    setup.reads.on_open(7, "config.json", 10)
    assert [setup.reads.on_open(7, WEIGHTS, 600) for _ in range(3)] == [600, 400, 0]


def test_a_load_is_over_after_a_while() -> None:
    setup = Setup(available=4000)
    setup.reads.on_open(7, "config.json", 10)
    setup.now += 29
    assert setup.reads.on_open(7, WEIGHTS, 600) == 600
    setup.now += 2
    assert setup.reads.on_open(7, WEIGHTS, 100) == 0
