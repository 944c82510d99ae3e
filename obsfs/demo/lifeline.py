"""The process between a program and who started it: the program ends when the starter does, however that was ended.

A parent that is killed cannot end its children, and the kernel's own way (PR_SET_PDEATHSIG) ends them with the thread
that started them. So this process starts the program, and waits for the end of its stdin, a pipe whose other end the
starter holds. Imports only the standard library, to be there in a hundredth of a second.

Run as ``python -I -S lifeline.py PATTERN PROGRAM ARGUMENT...``. When the starter is gone, the program is killed, and
what matches the glob PATTERN is removed.
"""

from __future__ import annotations

import ctypes
import glob
import os
import select
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""
_libc = ctypes.CDLL(None)


def _prepare() -> None:
    """In the program, before it begins: end with the parent, and take SIGTERM."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def keep(pattern: str, command: list[str]) -> int:
    """Run a program until it ends, or stdin does. SIGTERM is passed on. Returns its exit status, as a shell does."""
    # Until there is a program to pass it on to, a SIGTERM waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_prepare)  # noqa: PLW1509
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    ended = os.pidfd_open(program.pid)
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    waiting.register(0, 0)  # which tells of nothing but the end
    if all(fd != ended for fd, _ in waiting.poll()):
        program.kill()
        program.wait()
        for path in glob.glob(pattern):  # noqa: PTH207 - pathlib takes longer to import than the rest
            shutil.rmtree(path, ignore_errors=True)
    status = program.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
