"""The process that serves a mount, as its supervisor starts it.

:mod:`obsfs.service.supervisor` runs it as ``python -m obsfs.fuse.daemon SOURCE MOUNTPOINT``, with one JSON line on
stdin: ``settings``, and ``takeover`` for a successor. :mod:`obsfs.service.starting` reads one JSON line from its
stdout: ``{"pid": ...}`` when the directory answers, or ``{"error": ..., "remedy": ...}``. Before it, there is one
``{"note": ...}`` for each thing that the user should know. Secrets come in the environment only, never in arguments.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from obsfs import private
from obsfs.errors import ObsfsError, UsageError, WaitWarning
from obsfs.library import snapshot
from obsfs.logs import VisibleFormatter
from obsfs.service import state, takeover_log
from obsfs.service.serving import serve
from obsfs.service.stop import Stop
from obsfs.service.supervisor_client import SupervisorClient
from obsfs.service.takeover import read_request
from obsfs.store.address import parse_address
from obsfs.version import __version__

log = logging.getLogger(__name__)

_LOG_BYTES = 4 << 20


def log_to(handler: logging.Handler, level: str) -> None:
    """Send obsfs's own log to a handler. Debug output of other libraries, which may hold headers, goes nowhere."""
    handler.setFormatter(VisibleFormatter())
    logger = logging.getLogger("obsfs")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def main() -> int:
    """Run as a child of the supervisor.

    Returns:
        The exit status: 0, 2 after a reported error, or RETRY when it could not take over yet.
    """
    if sys.argv[1] == "--probe":
        return _probe(sys.argv[2], Path(sys.argv[3]))
    source, mountpoint = sys.argv[1], Path(sys.argv[2])
    request = json.loads(sys.stdin.buffer.readline())
    settings, takeover, notes = read_request(request)
    request.pop("takeover", None)
    supervisor = SupervisorClient.inherited()
    if takeover is not None:
        takeover.own()
    else:
        supervisor.end_with_it()
    stop = Stop()
    stop.on_signals()
    os.chdir("/")
    os.umask(private.OTHERS)
    answer = _Answer()

    def on_ready() -> None:
        if takeover is None:
            log.info("serving %s on %s (pid %d, obsfs %s)", source, mountpoint, os.getpid(), __version__)
            answer.send(pid=os.getpid())
            answer.close()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if isinstance(message, WaitWarning):
            log.warning("%s", message)
            answer.send(note=str(message))

    warnings.showwarning = show
    try:
        path = state.file_path(mountpoint, "log")
        log_to(logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1), settings.log_level)
        for note in notes:
            log.warning("%s", note)
        serve(
            source,
            mountpoint,
            settings,
            on_ready,
            stop,
            supervisor=supervisor,
            takeover=takeover,
            log_file=path,
            request=request,
        )
    except Exception as error:
        message, remedy = _explain(error, mountpoint)
        answer.send(error=message, remedy=remedy)
        return 2
    log.info("unmounted %s", mountpoint)
    if request.get("is_temporary"):
        with suppress(OSError):
            mountpoint.rmdir()
    return 0


class _Answer:
    """What the process tells the one that waits for the mount, on stdout. Takes stdout and stderr from the rest."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        quiet = os.open(os.devnull, os.O_RDWR)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)

    def send(self, **message: object) -> None:
        """Send a line, unless the last one was sent."""
        if not self._file.closed:
            print(json.dumps(message), file=self._file, flush=True)

    def close(self) -> None:
        """Send no more."""
        self._file.close()


def _explain(error: Exception, mountpoint: Path) -> tuple[str, str]:
    """Log why the mount ended. Returns the message and the remedy for the user."""
    if isinstance(error, ObsfsError):
        log.error("%s ended: %s", mountpoint, error)
        return error.message, error.remedy
    log.exception("the mount ended")
    return f"internal error: {type(error).__name__}: {error}", f"see {state.file_path(mountpoint, 'log')}"


def _probe(source: str, mountpoint: Path) -> int:
    """Say whether this program could take over a mount, without touching it: exit status 0, or a line and 2."""
    from obsfs.fuse.kernel import server  # noqa: F401 - so that all of it was imported

    try:
        settings, _, notes = read_request(json.loads(sys.stdin.buffer.readline()))
        parse_address(source)
        for note in notes:
            print(note)
        if settings.fuse_backend != "native":
            raise UsageError(f"the FUSE backend {settings.fuse_backend} cannot take over", "mount again")
        takeover_log.read(state.file_path(mountpoint, "journal"))
        file = state.file_path(mountpoint, "snapshot")
        if settings.snapshot and file.exists():
            snapshot.check(file.read_bytes())
    except (ObsfsError, OSError, ValueError) as error:
        print(error)
        return 2
    return 0
