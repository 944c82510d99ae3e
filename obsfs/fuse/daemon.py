"""The process behind a mount: builds engine and tree, mounts, serves until unmounted, and cleans up.

:mod:`obsfs.fuse.mounts` starts it as ``python -m obsfs.fuse.daemon SOURCE MOUNTPOINT`` with one JSON line on stdin
(``settings``, ``lifeline``) and reads one JSON line from its stdout: ``{"pid": ...}`` when the directory answers, or
``{"error": ..., "remedy": ...}``. Secrets come by the environment only, never in arguments. With a lifeline, the
mount ends when the other end of stdin closes, which the kernel does for a process that is killed.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from obsfs.blocks.reader import Engine
from obsfs.errors import ObsfsError, UsageError
from obsfs.fuse import state
from obsfs.fuse.journal import Journal
from obsfs.fuse.kernel import channel
from obsfs.fuse.operations import Operations
from obsfs.fuse.tree import Source, Tree
from obsfs.library import snapshot
from obsfs.remote.address import Address, parse_address
from obsfs.remote.client import Bucket
from obsfs.remote.objects import Page
from obsfs.settings import Settings

log = logging.getLogger(__name__)

_LOG_BYTES = 4 << 20
_LINGER_SECONDS = 5.0


class Stop:
    """Ends a mount from a signal handler or another thread; `wait` returns once somebody has asked."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.wait = self._event.wait

    def __call__(self, *_: object) -> None:
        self._event.set()


def serve(
    source: str,
    mountpoint: Path,
    settings: Settings,
    on_ready: Callable[[], None],
    stop: Stop,
) -> None:
    """Mount `source` on `mountpoint` and serve it, until it is unmounted or `stop` is called.

    `on_ready` is called once, when the directory answers. Raises ObsfsError, and leaves no mount behind.
    """
    address = parse_address(source)
    with ExitStack() as cleanup:
        cleanup.callback(os.close, state.lock(mountpoint))
        bucket = Bucket(address, settings)
        names: Source = bucket
        if settings.snapshot:
            names = snapshot.take(bucket, address, settings.snapshot)
            page = next(names.list(address.prefix))
        else:
            page = _check(bucket, address)
        engine = Engine(bucket, settings)
        cleanup.callback(engine.close)
        journal = Journal(state.path(mountpoint, "journal"))
        cleanup.callback(journal.close)
        tree = Tree(names, address.prefix, settings.metadata_ttl, journal.record)
        tree.prime(page)
        journal.snapshot = tree.snapshot
        identity: dict[str, object] = {
            "mountpoint": str(mountpoint),
            "source": str(address),
            "endpoint": bucket.endpoint,
            "snapshot": settings.snapshot,
            "pid": os.getpid(),
            "engine": settings.engine,
        }
        operations = Operations(tree, engine, settings, identity, lambda: bucket.sites)
        if settings.engine == "native":
            _serve_natively(operations, mountpoint, settings, on_ready, stop)
        else:
            from obsfs.fuse import portable

            portable.serve(operations, mountpoint, settings, on_ready, stop.wait)


def _serve_natively(
    operations: Operations,
    mountpoint: Path,
    settings: Settings,
    on_ready: Callable[[], None],
    stop: Stop,
) -> None:
    from obsfs.fuse.kernel.server import Server

    fd = channel.mount(str(operations.identity["source"]), mountpoint, allow_other=settings.allow_other)
    server = Server(fd, operations, passthrough=settings.passthrough, on_end=stop)
    try:
        try:
            server.start()
        except OSError as error:
            raise UsageError(
                f"this kernel cannot serve {mountpoint} ({error.strerror})", "try --engine fusepy"
            ) from None
        if not channel.set_read_ahead(mountpoint, int(settings.kernel_read_ahead)):
            log.info("the kernel's read-ahead stays as it is: root may raise it")
        on_ready()
        stop.wait()
    finally:
        entry = channel.mounted_at(mountpoint)
        if entry is not None and not server.ended.is_set():
            channel.unmount(mountpoint, lazy=True)
            # Who still has files open keeps being served for a moment, then gets ENOTCONN.
            server.ended.wait(_LINGER_SECONDS)
        server.join()


def _check(bucket: Bucket, address: Address) -> Page:
    page = bucket.check()
    if address.prefix and not page.objects and not page.prefixes:
        raise UsageError(f"there is nothing under {address}", f"see what is in {address.scheme}://{address.bucket}")
    return page


def log_to(handler: logging.Handler, level: str) -> None:
    """Send obsfs's own log there. Other libraries' debug output, which may hold headers, goes nowhere."""
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("obsfs")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def main() -> int:
    """Run as a child of :func:`obsfs.fuse.mounts.start`; the exit status is 0, or 2 after a reported error."""
    source, mountpoint = sys.argv[1], Path(sys.argv[2])
    request = json.loads(sys.stdin.buffer.readline())
    settings = Settings(**request["settings"])
    # The memory of this process holds keys: it is not to be written to a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    os.chdir("/")
    answer = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    def on_ready() -> None:
        print(json.dumps({"pid": os.getpid()}), file=answer, flush=True)
        answer.close()
        log.info("serving %s on %s", source, mountpoint)

    try:
        path = state.path(mountpoint, "log")
        log_to(logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1), settings.log_level)
        if request["lifeline"]:
            threading.Thread(target=lambda: stop(sys.stdin.buffer.read()), name="obsfs-lifeline", daemon=True).start()
        serve(source, mountpoint, settings, on_ready, stop)
    except Exception as error:
        if isinstance(error, ObsfsError):
            message, remedy = error.message, error.remedy
        else:
            log.exception("the mount ended")
            message, remedy = f"internal error: {type(error).__name__}: {error}", f"see {state.path(mountpoint, 'log')}"
        if not answer.closed:
            print(json.dumps({"error": message, "remedy": remedy}), file=answer, flush=True)
        return 2
    log.info("unmounted %s", mountpoint)
    return 0


if __name__ == "__main__":
    # Worker threads may be stuck in a request to a server that does not answer; the process ends all the same.
    status = main()
    logging.shutdown()
    os._exit(status)
