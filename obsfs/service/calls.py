"""What each call on the control socket does (:mod:`obsfs.service.control`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from obsfs.errors import ObsfsError, UsageError
from obsfs.service import state
from obsfs.service.control import Call
from obsfs.vfs.inodes import ROOT
from obsfs.vfs.operations import Operations

_WALK_SECONDS = 1.5
"""For looking up the names of a path: clients wait for 5 s, and the kernel may take 2 s to be told of a refresh."""


class MountCalls:
    """The calls on one mount, which its server answers."""

    def __init__(self, operations: Operations, mountpoint: Path, refresh: Callable[[int], object]) -> None:
        """Answer for one mount.

        Args:
            operations: the file system that is mounted.
            mountpoint: where.
            refresh: asks the bucket again for what is shown under a node, and tells the kernel.
        """
        self._operations = operations
        self.mountpoint = mountpoint
        self._refresh_node = refresh

    @property
    def table(self) -> dict[str, Call]:
        """Each call by its name."""
        return {"status": self.status, "refresh": self.refresh, "upgrade": self.upgrade, "stop": self.stop}

    def status(self, _: str) -> dict[str, Any]:
        """Return what ``obsfs status`` shows of this mount."""
        return self._operations.status()

    def refresh(self, path: str) -> dict[str, Any]:
        """Refresh a path, or the nearest directory above it that is there.

        A bucket that does not answer holds nothing up: after 1.5 s the directory above counts, whose refresh includes
        the rest.
        """
        names = PurePosixPath(path).parts
        if any(name in ("/", "..") for name in names):
            raise UsageError("the path to refresh is not below the mount", "give it relative to the mount")
        walk = _Walk(self._operations, names)
        try:
            nodes = walk.nodes()
            self._refresh_node(nodes[-1])
        finally:
            walk.end()
        return {"path": "/".join(names[: len(nodes) - 1])}

    def upgrade(self, _: str) -> dict[str, Any]:
        """Ask the supervisor to replace this server. The status shows whether it did, or why not."""
        if not self._operations.identity["can_be_followed"]:
            raise UsageError(f"the server of {self.mountpoint} cannot be replaced")
        state.request_replacement(self.mountpoint)
        return {}

    def stop(self, _: str) -> dict[str, Any]:
        """Nothing: the mount ends once this was answered."""
        return {}


class _Walk:
    """Looks up the names of a path in a thread, since that may ask the bucket; keeps the nodes until :meth:`end`."""

    def __init__(self, operations: Operations, names: tuple[str, ...]) -> None:
        self._operations = operations
        self._nodes = [ROOT]
        self._arrived = threading.Event()
        self._ended = threading.Event()
        if names:
            threading.Thread(target=self._walk, args=(names,), name="obsfs-walk", daemon=True).start()
        else:
            self._arrived.set()

    def _walk(self, names: tuple[str, ...]) -> None:
        counted: list[int] = []
        try:
            with suppress(ObsfsError, ValueError):  # not there, or no name that the bucket can have
                for name in names:
                    counted.append(self._operations.lookup(self._nodes[-1], name).node)
                    self._nodes.append(counted[-1])
                    if self._ended.is_set():
                        break
        finally:
            self._arrived.set()
            self._ended.wait()
            self._operations.forget((node, 1) for node in counted)

    def nodes(self) -> list[int]:
        """Return the nodes that were found in time: the root, and one for each name."""
        self._arrived.wait(_WALK_SECONDS)
        return list(self._nodes)

    def end(self) -> None:
        """Give the nodes back."""
        self._ended.set()
