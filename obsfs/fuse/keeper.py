"""A server's side of its supervisor (:mod:`obsfs.fuse.supervisor`): what it gives to keep, and what it inherits."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from obsfs.fuse.supervisor import CONTROL, FORMAT

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_MOST_MESSAGE = 64 << 10


class Keeper:
    """Speaks to the supervisor of this process; to nobody, when it has none. Safe to use from many threads."""

    def __init__(self) -> None:
        number = os.environ.pop(CONTROL, None)
        self._control = socket.socket(fileno=int(number)) if number else None
        if self._control is not None:
            self._control.set_inheritable(False)
            # Without it nobody would follow us, and nobody could tell that the mount is served.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    @property
    def is_there(self) -> bool:
        """Whether there is a supervisor."""
        return self._control is not None

    def listen(self, on_refused: Callable[[dict[str, Any]], None]) -> None:
        """Have it told, from a thread, why the supervisor did not replace this server: ``number`` and ``reason``."""
        if self._control is not None:
            threading.Thread(target=self._listen, args=(on_refused,), name="obsfs-supervisor", daemon=True).start()

    def _listen(self, on_refused: Callable[[dict[str, Any]], None]) -> None:
        assert self._control is not None
        while True:
            try:
                data = self._control.recv(_MOST_MESSAGE)
                message = json.loads(data) if data else None
            except (OSError, ValueError):
                message = None
            if message is None:
                return
            if isinstance(message, dict) and isinstance(message.get("refused"), dict):
                on_refused(message["refused"])

    def keep(self, name: str, fds: Sequence[int], state: dict[str, Any] | None = None) -> None:
        """Have descriptors kept open under a name, in place of those that it had; `state` is for a successor."""
        self._send({"keep": name, **({"state": state} if state is not None else {})}, fds)

    def note(self, state: dict[str, Any]) -> None:
        """Change what a successor is told, and nothing that is kept. (A supervisor of format 0 knows no message
        without a name.)"""
        self._send({"keep": "note", "state": state}, [])

    def drop(self, name: str) -> None:
        """What is kept under a name may close."""
        self._send({"keep": name}, [])

    def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        if self._control is not None:
            try:
                socket.send_fds(self._control, [json.dumps({"format": FORMAT, **message}).encode()], list(fds))
            except OSError:
                pass  # it is gone, and so are we in a moment
