"""Many pieces of work at the same time."""

from __future__ import annotations

import threading

import pytest

from obsfs.library.transfer import WorkerPool


@pytest.mark.parametrize("started", [0, 1, 3])
def test_interrupted_while_its_threads_start(monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    start, left = threading.Thread.start, [started]

    def interrupted(thread: threading.Thread) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    done = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        WorkerPool(8).run(iter([done.set] * 100))
    assert done.wait(5) == bool(started)
