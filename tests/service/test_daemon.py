"""The process that serves a mount, from the outside."""

from __future__ import annotations

import signal
import subprocess
import sys

_ROUNDS = 20_000
_ENDS = """
from obsfs.service.stop import Stop
while True:
    stop = Stop()
    stop.on_signals()
    print("asked", flush=True)
    stop.wait()
"""


def test_a_signal_at_any_moment_is_seen() -> None:
    """One that comes just when the process goes to sleep would be lost by most ways to wait."""
    with subprocess.Popen([sys.executable, "-c", _ENDS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for _ in range(_ROUNDS):
                assert process.stdout.readline() == b"asked\n"
                process.send_signal(signal.SIGTERM)
        finally:
            process.kill()
