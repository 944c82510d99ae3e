"""Serves a mountpoint through /dev/fuse: from a new mount, or from the connection of a server that died."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obsfs import mountinfo
from obsfs.errors import UsageError
from obsfs.fuse.kernel import channel
from obsfs.fuse.kernel.server import Server
from obsfs.service import program_copy, state
from obsfs.service.stop import Stop
from obsfs.service.supervisor_client import SupervisorClient, appoint
from obsfs.service.takeover import Takeover
from obsfs.service.takeover_log import TakeoverLog
from obsfs.settings import Settings
from obsfs.version import __version__
from obsfs.vfs.operations import Operations

log = logging.getLogger(__name__)

_LINGER_SECONDS = 5.0
"""For which files that are open are still served when a mount is told to end."""
_APPOINT_AGAIN_SECONDS = 30.0
"""Between two attempts to start a supervisor in place of one that was killed."""
_APPOINTED_PAUSE_SECONDS = 1.0


def note_lost_supervisor(identity: dict[str, object], lock: int, request: dict[str, Any], stop: Stop) -> bool:
    """Note that the supervisor was killed. Returns whether its server goes on; else the mount ends."""
    lost, identity["supervisor"] = identity["supervisor"], None
    state.record_supervisor(lock, os.getpid())
    if request.get("lifeline"):
        log.error("the supervisor (pid %s) was killed: the mount ends, since a program has made it", lost)
        stop()
        return False
    log.error("the supervisor (pid %s) was killed", lost)
    return True


class NativeServing:
    """Serves one mountpoint, and stores with the supervisor what a successor needs."""

    def __init__(
        self,
        operations: Operations,
        mountpoint: Path,
        settings: Settings,
        *,
        supervisor: SupervisorClient,
        lock: int,
        takeover_log: TakeoverLog,
        request: dict[str, Any],
        stop: Stop,
    ) -> None:
        """Prepare to serve.

        Args:
            operations: the file system.
            mountpoint: where.
            settings: of the mount.
            supervisor: of this process.
            lock: the descriptor of the mount's lock.
            takeover_log: where the operations record what the kernel is told.
            request: what the supervisor asked this process for, for the supervisor that follows one that was killed.
            stop: called when the mount ends; asks for that, too.
        """
        self._operations, self._mountpoint, self._settings = operations, mountpoint, settings
        self._supervisor, self._lock = supervisor, lock
        self._takeover_log = takeover_log
        self._request = request
        self._stop = stop
        self._server: Server | None = None
        self._fds: list[int] = []
        self._server_number = 0
        self._program_copy = -1
        self._appointed: subprocess.Popen[bytes] | None = None
        takeover_log.on_whole = self._note_whole

    def refresh(self, node: int) -> None:
        """Ask the bucket again for what is shown under a node, and tell the kernel."""
        if self._server is not None:
            self._server.refresh(node)

    def serve(self, on_ready: Callable[[], None], takeover: Takeover | None, is_serving: threading.Event) -> None:
        """Serve until the mount is unmounted, or told to stop.

        Args:
            on_ready: called once the directory answers.
            takeover: what a predecessor left; None mounts.
            is_serving: set once a takeover cannot fail any more.
        """
        operations = self._operations
        if takeover is None:
            source = str(operations.identity["source"])
            fd = channel.mount(source, self._mountpoint, allow_other=self._settings.allow_other)
        else:
            fd = takeover.fds[0]
        server = self._server = Server(
            fd, operations, passthrough=self._settings.passthrough, on_end=self._stop, fd_store=self._supervisor
        )
        if takeover is not None:
            self._take_over(server, takeover)
        is_serving.set()
        try:
            if takeover is None:
                self._begin(server)
            self._supervisor.listen(self._on_refused, lambda: self._on_lost(server))
            on_ready()
            if operations.identity["can_be_followed"]:
                steps = program_copy.copy_in_steps(program_copy.process_start(), self._store_program)
                operations.run_in_background(steps)
            self._stop.wait()
        finally:
            self._end(server)

    def _take_over(self, server: Server, takeover: Takeover) -> None:
        self._fds, self._server_number = takeover.fds, takeover.server
        self._operations.inherit()
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

    def _begin(self, server: Server) -> None:
        """Serve a new mount."""
        try:
            self._fds = server.start()
        except OSError as error:
            raise UsageError(
                f"this kernel cannot serve {self._mountpoint} ({error.strerror})", "try --fuse-backend libfuse"
            ) from None
        if server.can_be_followed:
            self._supervisor.store_fds("connection", [self._lock, *self._fds], self._state)
            self._operations.identity["can_be_followed"] = self._supervisor.is_there
        if not channel.set_read_ahead(self._mountpoint, int(self._settings.kernel_read_ahead)):
            log.info("the kernel's read-ahead stays as it is: root may raise it")

    def _end(self, server: Server) -> None:
        """Unmount, unless that has happened; serve open files for a moment, and close the connection."""
        entry = mountinfo.mounted_at(self._mountpoint)
        if entry is not None and not server.ended.is_set():
            connection = channel.Connection(entry)
            channel.unmount(self._mountpoint, lazy=True)
            # After that, readers get ENOTCONN. Not because this process ends: one of its threads may be waiting in the
            # kernel for a reader that waits for us.
            server.ended.wait(_LINGER_SECONDS)
            connection.abort()
        server.join()

    @property
    def _state(self) -> dict[str, object]:
        """What a successor is told."""
        return {
            "direct": self._operations.can_pass_through,
            "is_whole": self._takeover_log.is_whole,
            "log": self._operations.identity["log"],
        }

    def _note_whole(self, is_whole: bool) -> None:
        """The takeover log has lost records, or has all of them again."""
        if self._operations.identity["can_be_followed"]:
            self._supervisor.update_state(self._state)

    def _store_program(self, fd: int) -> None:
        self._program_copy = fd
        self._supervisor.store_fds("program", [fd])

    def _on_refused(self, refused: dict[str, Any]) -> None:
        """The supervisor does not replace this server."""
        log.error("no other server follows this one: %s", refused.get("reason"))
        self._operations.identity["upgrade_refused"] = refused

    def _on_lost(self, server: Server) -> None:
        """The supervisor was killed: readers notice nothing, and another supervisor takes its place."""
        identity = self._operations.identity
        if server.ended.is_set() or not note_lost_supervisor(identity, self._lock, self._request, self._stop):
            return
        if not identity["can_be_followed"]:
            return
        identity["can_be_followed"] = False
        if self._appointed is not None:
            self._appointed.wait()
            server.ended.wait(_APPOINTED_PAUSE_SECONDS)
        while not server.ended.is_set():
            failure = self._appoint(server)
            if failure is None:
                return
            identity["no_supervisor"] = failure
            server.ended.wait(_APPOINT_AGAIN_SECONDS)

    def _appoint(self, server: Server) -> str | None:
        """Start another supervisor, and store everything with it. Returns why there is none."""
        identity = self._operations.identity
        counts = {name: int(str(identity[name])) for name in ("restarts", "upgrades")}
        appointed = appoint(
            [str(identity["source"]), str(self._mountpoint)],
            self._request,
            {**counts, "servers": self._server_number},
            self._program_copy,
        )
        if isinstance(appointed, str):
            return appointed
        self._appointed, connection = appointed
        self._supervisor.adopt(connection)
        self._supervisor.store_fds("connection", [self._lock, *self._fds], self._state)
        server.store_fds_again()
        if self._program_copy >= 0:
            self._supervisor.store_fds("program", [self._program_copy])
        state.record_supervisor(self._lock, self._appointed.pid)
        identity.pop("no_supervisor", None)
        identity.update(supervisor=self._appointed.pid, can_be_followed=True)
        log.warning("another supervisor is there (pid %d)", self._appointed.pid)
        return None
