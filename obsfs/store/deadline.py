"""Bound the wait for calls that have no timeout of their own, such as a name lookup."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_T = TypeVar("_T")


def call_within(call: Callable[[], _T], seconds: float, *, name: str, extend: Callable[[], float] = lambda: 0.0) -> _T:
    """Return what `call` returns, if it does so in time.

    A call that takes longer continues in a daemon thread, and its result is dropped.

    Args:
        call: Runs in a thread of its own.
        seconds: How long to wait.
        name: The thread's name.
        extend: Called once when the time is up; returns how many more seconds to wait.

    Raises:
        TimeoutError: The call takes too long.
        BaseException: Whatever the call raises.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    if not wait([result], seconds).done and (more := extend()):
        wait([result], more)
    return result.result(timeout=0)
