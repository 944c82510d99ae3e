"""The process that serves a mount: builds engine and tree, mounts, serves until unmounted, and cleans up.

:mod:`obsfs.service.supervisor` starts it as ``python -m obsfs.fuse.daemon SOURCE MOUNTPOINT`` with a JSON line on stdin
(``settings``, and ``takeover`` for a successor); :mod:`obsfs.service.mounts` reads one JSON line from its stdout:
``{"pid": ...}`` when the directory answers, or ``{"error": ..., "remedy": ...}``; before it, one ``{"note": ...}`` for
each thing that whoever mounts should know. Secrets come by the environment only, never in arguments.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsfs import mountinfo, private
from obsfs.errors import ObsfsError, UsageError, WaitWarning
from obsfs.fetch.reader import Engine
from obsfs.fuse.kernel import channel
from obsfs.library import snapshot
from obsfs.limits import LEAST_FILES, allow_open_files, open_files_limit
from obsfs.logs import VisibleFormatter
from obsfs.service import program, state, takeover_log
from obsfs.service.supervisor import FORMAT, RETRY
from obsfs.service.supervisor_client import SupervisorClient, appoint
from obsfs.service.takeover_log import TakeoverLog
from obsfs.settings import Settings
from obsfs.store import open_store
from obsfs.store.address import Address, parse_address
from obsfs.store.base import ObjectStore
from obsfs.store.types import Page
from obsfs.version import __version__
from obsfs.vfs.listings import Source
from obsfs.vfs.operations import Operations
from obsfs.vfs.tree import Tree

if TYPE_CHECKING:
    from obsfs.fuse.kernel.server import Server

log = logging.getLogger(__name__)

_LOG_BYTES = 4 << 20
_LINGER_SECONDS = 5.0
_AGAIN_SECONDS = 30.0
"""Between two attempts to start a supervisor in place of one that was killed."""
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Takeover:
    """What a successor gets from its supervisor: the lock, and all descriptors of the connection."""

    lock: int
    fds: list[int]
    direct: bool
    restarts: int
    server: int
    """The number of this server of the mount: greater than those of its predecessors."""
    is_whole: bool
    """Whether the journal has all that was to be recorded."""
    upgrades: int = 0
    is_upgrade: bool = False

    @staticmethod
    def parse(request: dict[str, Any]) -> Takeover:
        """From the supervisor's request. What is not known of it is left out.

        Raises UsageError for one that was made by a program of another kind.
        """
        try:
            lock, *fds = map(int, request["connection"])
            restarts = int(request["restarts"])
            server = int(request.get("servers", restarts))
            direct, is_whole = bool(request["direct"]), bool(request.get("is_whole", True))
            upgrades, is_upgrade = int(request.get("upgrades", 0)), bool(request.get("is_upgrade", False))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the takeover request cannot be read ({error!r})", "mount again") from None
        return Takeover(lock, fds, direct, restarts, server, is_whole, upgrades, is_upgrade)

    def own(self) -> None:
        """Keep the descriptors from children."""
        for fd in (self.lock, *self.fds):
            os.set_inheritable(fd, False)


class Stop:
    """Ends a mount from a signal handler or another thread; `wait` returns once somebody has asked.

    SIGTERM and SIGINT ask for the end, and the signals `further`, once :meth:`on_signals` was called.
    """

    def __init__(self, *further: signal.Signals) -> None:
        self._signals = signal.SIGTERM, signal.SIGINT, *further
        # No Event, and no queue: a signal that comes while the thread goes to sleep in one is not seen until it wakes.
        # A byte in a socket is.
        self._wake, self._poke = socket.socketpair()
        self._poke.setblocking(False)

    def on_signals(self) -> None:
        """Have signals ask for the end, and interrupt nothing. Only in the main thread."""
        signal.set_wakeup_fd(self._poke.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            # One that came just before has written no byte, and has its handler called only now.
            signal.signal(number, lambda *_: self())

    def ignore_signals(self) -> None:
        """Have those signals do nothing any more, so that another one does not change how the process ends."""
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)

    def __call__(self) -> None:
        with suppress(BlockingIOError):
            self._poke.send(b"\0")

    def wait(self) -> None:
        """Until somebody has asked; at once afterwards, in every thread."""
        self._wake.recv(1, socket.MSG_PEEK)


def serve(
    source: str,
    mountpoint: Path,
    settings: Settings,
    on_ready: Callable[[], None],
    stop: Stop,
    *,
    takeover: Takeover | None = None,
    log_file: Path | None = None,
    request: dict[str, Any] | None = None,
) -> None:
    """Mount `source` on `mountpoint` and serve it, until it is unmounted or `stop` is called.

    `on_ready` is called once, when the directory answers. Raises ObsfsError, and leaves no mount behind: from when it
    mounts, signals do no more than call `stop` (so it runs in the main thread only). With a `takeover` nothing is
    mounted: the kernel goes on with this process where another one has died. `request` is what the supervisor has asked
    for, which another one is given should it be killed.
    """
    address = parse_address(source)
    supervisor = SupervisorClient(is_successor=takeover is not None)
    allow_open_files()
    if takeover is None and (limit := open_files_limit()) < LEAST_FILES:
        raise UsageError(
            f"the limit of open files is {limit}, and a mount needs {LEAST_FILES} at least",
            "raise it (LimitNOFILE= of a unit, `ulimit -n`)",
        )
    with ExitStack() as cleanup, _retried(takeover) as is_serving:
        ends_with = supervisor.pid or os.getpid()
        lock = takeover.lock if takeover else state.acquire_lock(mountpoint, ends_with)
        cleanup.callback(os.close, lock)
        bucket = open_store(address, settings, is_known=takeover is not None)
        names: Source = bucket
        page: Page | None = None
        if settings.snapshot:
            names, file = _snapshot(bucket, address, settings.snapshot, mountpoint, is_successor=takeover is not None)
            cleanup.callback(file.unlink, missing_ok=True)
            page = next(names.list(address.prefix))
        elif takeover is None:
            page = _check(bucket, address)
        engine = Engine(bucket, settings, scrubs=True)
        cleanup.callback(engine.close)
        place = state.file_path(mountpoint, "journal")
        journal = TakeoverLog(place, keep=takeover is not None)
        cleanup.callback(journal.close)
        tree = Tree(
            names,
            address.prefix,
            settings.metadata_ttl,
            # Nobody follows a server of libfuse.
            journal.record if settings.fuse_backend == "native" else lambda *changes: None,
            max_entries=settings.max_entries,
            server=takeover.server if takeover else 0,
        )
        journal.snapshot = tree.snapshot
        if takeover is not None:
            _restore(tree, place, bucket, takeover)
            journal.renew()
        if page is not None:
            tree.seed_root(page)
        identity: dict[str, object] = {
            "mountpoint": str(mountpoint),
            "source": str(address),
            "endpoint": bucket.endpoint,
            "snapshot": settings.snapshot,
            "pid": os.getpid(),
            "fuse_backend": settings.fuse_backend,
            # Its old name and values, for one version.
            "engine": "native" if settings.fuse_backend == "native" else "fusepy",
            "supervisor": supervisor.pid,
            "restarts": takeover.restarts if takeover else 0,
            "upgrades": takeover.upgrades if takeover else 0,
            "log": str(log_file) if log_file else None,
            "can_be_followed": takeover is not None,
            "ends_with_program": bool(request and request.get("lifeline")),
        }
        operations = Operations(tree, engine, settings, identity, lambda: bucket.stats().endpoints)
        stop.on_signals()
        if settings.fuse_backend == "native":
            native = _Native(
                operations,
                mountpoint,
                settings,
                supervisor=supervisor,
                lock=lock,
                journal=journal,
                request=request or {},
            )
            journal.on_whole = native.note_whole
            native.serve(on_ready, stop, takeover, is_serving)
        else:
            from obsfs.fuse import libfuse as portable

            def on_lost() -> None:
                _is_alone(identity, lock, request or {}, stop)

            # Nobody can follow this server, and so it does not need its supervisor to go on.
            supervisor.listen(lambda refused: None, on_lost)
            portable.serve(operations, mountpoint, settings, on_ready, stop.wait)


def _snapshot(
    bucket: ObjectStore, address: Address, wanted: str, mountpoint: Path, *, is_successor: bool
) -> tuple[snapshot.Snapshot, Path]:
    """What the mount shows, and the file in which it is kept for successors. Raises ObsfsError."""
    file = state.file_path(mountpoint, "snapshot")
    if is_successor:
        try:
            return snapshot.restore(file.read_bytes(), bucket), file
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): the bucket is asked again", file, error)
    try:
        taken = snapshot.take(bucket, address, wanted)
    except UsageError as error:
        if not is_successor:
            raise
        # What is open is in the journal.
        log.error("the snapshot cannot be taken again: %s", error)
        taken = snapshot.Snapshot(())
    try:
        new = file.with_suffix(".new-snapshot")
        new.touch(mode=0o600)
        new.write_bytes(taken.to_json())
        new.replace(file)
    except OSError as error:
        log.warning("%s cannot be written (%s): a server that follows asks the bucket again", file, error)
    return taken, file


def _restore(tree: Tree, place: Path, bucket: ObjectStore, takeover: Takeover) -> None:
    """Take over what the journal tells. What it does not costs the files that it is about, never the mount."""
    try:
        found = takeover_log.read(place)
    except OSError as error:
        log.error("%s cannot be read (%s): what is open is lost", place, error)
        return
    is_counted = takeover.is_whole and found.format > 0 and not found.damaged
    lost = found.damaged + tree.restore(found.records, bucket.version, is_counted=is_counted)
    if lost:
        log.error("%d of %d records of %s cannot be read: those files are lost", lost, len(found.records), place)
    if not is_counted:
        log.warning("the names that the kernel knows were not all counted: they are kept until the mount ends")


@contextmanager
def _retried(takeover: Takeover | None) -> Iterator[threading.Event]:
    """A takeover that fails before the event is set ends the process at once, and leaves everything for the next."""
    is_serving = threading.Event()
    try:
        yield is_serving
    except Exception:
        if takeover is not None and not is_serving.is_set():
            log.exception("could not take over yet")
            logging.shutdown()
            os._exit(RETRY)
        raise


def _is_alone(identity: dict[str, object], lock: int, request: dict[str, Any], stop: Stop) -> bool:
    """The supervisor was killed: whether its server goes on."""
    lost, identity["supervisor"] = identity["supervisor"], None
    state.record_supervisor(lock, os.getpid())
    if request.get("lifeline"):
        log.error("the supervisor (pid %s) was killed: the mount ends, since a program has made it", lost)
        stop()
        return False
    log.error("the supervisor (pid %s) was killed", lost)
    return True


class _Native:
    """The native FUSE backend on a mountpoint: from a new mount, or from the connection of a server that died."""

    def __init__(
        self,
        operations: Operations,
        mountpoint: Path,
        settings: Settings,
        *,
        supervisor: SupervisorClient,
        lock: int,
        journal: TakeoverLog,
        request: dict[str, Any],
    ) -> None:
        self._operations, self._mountpoint, self._settings = operations, mountpoint, settings
        self._supervisor, self._lock = supervisor, lock
        self._journal = journal
        self._request = request
        self._fds: list[int] = []
        self._server_number = 0
        self._copy = -1
        self._appointed: subprocess.Popen[bytes] | None = None

    def serve(
        self, on_ready: Callable[[], None], stop: Stop, takeover: Takeover | None, is_serving: threading.Event
    ) -> None:
        """Until it is unmounted, or told to stop."""
        from obsfs.fuse.kernel.server import Server

        operations, settings = self._operations, self._settings
        if takeover is None:
            source = str(operations.identity["source"])
            fd = channel.mount(source, self._mountpoint, allow_other=settings.allow_other)
        else:
            fd = takeover.fds[0]
        server = Server(fd, operations, passthrough=settings.passthrough, on_end=stop, fd_store=self._supervisor)
        if takeover is not None:
            self._fds, self._server_number = takeover.fds, takeover.server
            operations.inherit()
            server.take_over(takeover.fds, direct=takeover.direct)
            log.log(
                logging.INFO if takeover.is_upgrade else logging.WARNING,
                "took over %s from a server that %s (pid %d, obsfs %s)",
                self._mountpoint,
                "was upgraded" if takeover.is_upgrade else "died",
                os.getpid(),
                __version__,
            )
            self._supervisor.store_fds("connection", [self._lock, *takeover.fds], self._state)
            state.record_supervisor(self._lock, self._supervisor.pid or os.getpid())
        is_serving.set()
        try:
            if takeover is None:
                self._begin(server)
            self._supervisor.listen(self._on_refused, lambda: self._on_lost(server, stop))
            on_ready()
            if operations.identity["can_be_followed"]:
                steps = program.copy_in_steps(program.process_start(), self._keep_copy)
                operations.run_in_background(steps)
            stop.wait()
        finally:
            entry = mountinfo.mounted_at(self._mountpoint)
            if entry is not None and not server.ended.is_set():
                connection = channel.Connection(entry)
                channel.unmount(self._mountpoint, lazy=True)
                # Who still has files open keeps being served for a moment, then gets ENOTCONN. Not by our end: a
                # thread of ours may be waiting in the kernel for somebody who waits for us.
                server.ended.wait(_LINGER_SECONDS)
                connection.abort()
            server.join()

    @property
    def _state(self) -> dict[str, object]:
        return {
            "direct": self._operations.can_pass_through,
            "is_whole": self._journal.is_whole,
            "log": self._operations.identity["log"],
        }

    def note_whole(self, is_whole: bool) -> None:
        """The journal has lost records, or has all of them again."""
        if self._operations.identity["can_be_followed"]:
            self._supervisor.update_state(self._state)

    def _on_refused(self, refused: dict[str, Any]) -> None:
        log.error("no other server follows this one: %s", refused.get("reason"))
        self._operations.identity["upgrade_refused"] = refused

    def _keep_copy(self, fd: int) -> None:
        self._copy = fd
        self._supervisor.store_fds("program", [fd])

    def _on_lost(self, server: Server, stop: Stop) -> None:
        """The supervisor was killed: nobody is hurt, and another one takes its place."""
        identity = self._operations.identity
        if server.ended.is_set() or not _is_alone(identity, self._lock, self._request, stop):
            return
        if not identity["can_be_followed"]:
            return
        identity["can_be_followed"] = False
        if self._appointed is not None:
            self._appointed.wait()
            server.ended.wait(_PAUSE_SECONDS)
        while not server.ended.is_set():
            counts = {name: int(str(identity[name])) for name in ("restarts", "upgrades")}
            arguments = [str(identity["source"]), str(self._mountpoint)]
            found = appoint(arguments, self._request, {**counts, "servers": self._server_number}, self._copy)
            if not isinstance(found, str):
                self._appointed, control = found
                self._supervisor.adopt(control)
                self._supervisor.store_fds("connection", [self._lock, *self._fds], self._state)
                server.store_fds_again()
                if self._copy >= 0:
                    self._supervisor.store_fds("program", [self._copy])
                state.record_supervisor(self._lock, self._appointed.pid)
                identity.pop("no_supervisor", None)
                identity.update(supervisor=self._appointed.pid, can_be_followed=True)
                log.warning("another supervisor is there (pid %d)", self._appointed.pid)
                return
            identity["no_supervisor"] = found
            server.ended.wait(_AGAIN_SECONDS)

    def _begin(self, server: Server) -> None:
        try:
            fds = server.start()
        except OSError as error:
            raise UsageError(
                f"this kernel cannot serve {self._mountpoint} ({error.strerror})", "try --fuse-backend libfuse"
            ) from None
        self._fds = fds
        if server.can_be_followed:
            self._supervisor.store_fds("connection", [self._lock, *fds], self._state)
            self._operations.identity["can_be_followed"] = self._supervisor.is_there
        if not channel.set_read_ahead(self._mountpoint, int(self._settings.kernel_read_ahead)):
            log.info("the kernel's read-ahead stays as it is: root may raise it")


def _check(bucket: ObjectStore, address: Address) -> Page:
    page = bucket.check()
    if address.prefix and not page.objects and not page.prefixes:
        raise UsageError(f"there is nothing under {address}", f"see what is in {address.scheme}://{address.bucket}")
    return page


def log_to(handler: logging.Handler, level: str) -> None:
    """Send obsfs's own log there. Other libraries' debug output, which may hold headers, goes nowhere."""
    handler.setFormatter(VisibleFormatter())
    logger = logging.getLogger("obsfs")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def _read_request(request: dict[str, Any]) -> tuple[Settings, Takeover | None, list[str]]:
    """Of the supervisor's request: settings, what is taken over, and what was left out of the settings.

    Raises UsageError for a later format.
    """
    if request.get("format", 0) > FORMAT:
        raise UsageError("this mount is supervised by a later version of obsfs", "install that version, or mount again")
    if "takeover" not in request:
        return Settings.parse(request["settings"], request.get("places")), None, []
    settings, notes = Settings.adopt(request["settings"])
    return settings, Takeover.parse(request["takeover"]), notes


def _probe(source: str, mountpoint: Path) -> int:
    """Say whether this program could take over a mount, without touching it: exit status 0, or a line and 2."""
    from obsfs.fuse.kernel import server  # noqa: F401 - so that all of it was imported

    try:
        settings, _, notes = _read_request(json.loads(sys.stdin.buffer.readline()))
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


def main() -> int:
    """Run as a child of the supervisor. The exit status is 0, 2 after a reported error, or RETRY when it could not take
    over yet."""
    if sys.argv[1] == "--probe":
        return _probe(sys.argv[2], Path(sys.argv[3]))
    source, mountpoint = sys.argv[1], Path(sys.argv[2])
    request = json.loads(sys.stdin.buffer.readline())
    settings, takeover, notes = _read_request(request)
    request.pop("takeover", None)
    if takeover is not None:
        takeover.own()
    stop = Stop()
    stop.on_signals()
    os.chdir("/")
    os.umask(private.OTHERS)
    answer = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    def tell(**said: object) -> None:
        print(json.dumps(said), file=answer, flush=True)

    def on_ready() -> None:
        if takeover is not None:
            return
        log.info("serving %s on %s (pid %d, obsfs %s)", source, mountpoint, os.getpid(), __version__)
        tell(pid=os.getpid())
        answer.close()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if isinstance(message, WaitWarning):
            log.warning("%s", message)
            if not answer.closed:
                tell(note=str(message))

    warnings.showwarning = show

    try:
        path = state.file_path(mountpoint, "log")
        log_to(logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1), settings.log_level)
        for note in notes:
            log.warning("%s", note)
        serve(source, mountpoint, settings, on_ready, stop, takeover=takeover, log_file=path, request=request)
    except Exception as error:
        if isinstance(error, ObsfsError):
            message, remedy = error.message, error.remedy
            log.error("%s ended: %s", mountpoint, error)
        else:
            log.exception("the mount ended")
            message, remedy = (
                f"internal error: {type(error).__name__}: {error}",
                f"see {state.file_path(mountpoint, 'log')}",
            )
        if not answer.closed:
            tell(error=message, remedy=remedy)
        return 2
    log.info("unmounted %s", mountpoint)
    if request.get("is_temporary"):
        with suppress(OSError):
            mountpoint.rmdir()
    return 0
