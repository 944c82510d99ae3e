"""How a process that serves a mount is told to end."""

from __future__ import annotations

import signal
import socket
from contextlib import suppress


class Stop:
    """Ends a mount, from a signal handler or another thread: call it, and :meth:`wait` returns.

    SIGTERM and SIGINT ask for the end as well, and the signals `further`, once :meth:`on_signals` was called.
    """

    def __init__(self, *further: signal.Signals) -> None:
        self._signals = signal.SIGTERM, signal.SIGINT, *further
        # Not an Event or a queue: a signal that comes while the thread goes to sleep in one is not seen until it wakes.
        # A byte in a socket is.
        self._wake, self._poke = socket.socketpair()
        self._poke.setblocking(False)

    def on_signals(self) -> None:
        """Have signals ask for the end, and interrupt nothing. Only in the main thread."""
        signal.set_wakeup_fd(self._poke.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            # A signal that came just before wrote no byte, and its handler is called only now.
            signal.signal(number, lambda *_: self())

    def ignore_signals(self) -> None:
        """Have those signals do nothing from now on, so that another one does not change how the process ends."""
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)

    def __call__(self) -> None:
        with suppress(BlockingIOError):
            self._poke.send(b"\0")

    def wait(self) -> None:
        """Wait until the end was asked for. Returns at once afterwards, in every thread."""
        self._wake.recv(1, socket.MSG_PEEK)
