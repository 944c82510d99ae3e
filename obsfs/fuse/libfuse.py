"""The same operations through libfuse, by way of mfusepy: for systems where the native FUSE backend cannot run.

libfuse's high-level interface knows paths where :mod:`obsfs.vfs.operations` knows nodes, and one inode per path
where the native FUSE backend has one per version. So when a file is replaced while it is open, the open of the new
version bypasses the kernel's page cache (direct I/O), and reads of the old version's descriptors fail. A version whose
size the kernel does not have yet is not opened: the kernel looks up the path again first.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obsfs import mountinfo
from obsfs.errors import ObsfsError, UsageError, VersionChangedError
from obsfs.extras import remedy
from obsfs.fuse.kernel import channel
from obsfs.settings import Settings
from obsfs.store.types import ObjectVersion
from obsfs.vfs.frontend import FrontEnd
from obsfs.vfs.operations import ROOT, UNKNOWN_INO, Attributes, Operations

try:
    import mfusepy
except ImportError:
    raise UsageError("--fuse-backend libfuse needs mfusepy", remedy("libfuse")) from None
except OSError as error:
    raise UsageError(
        f"--fuse-backend libfuse needs libfuse ({error})", "install the package fuse3 (apt, dnf)"
    ) from None

_NAME_SECONDS = 1.0
_MAX_THREADS = 512
_LIMITS_THREADS_SINCE = 3, 12
"""The first libfuse that starts at most 10 threads by default. Earlier ones start as many as they need."""


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except ObsfsError as error:
        raise mfusepy.FuseOSError(error.errno) from None


class _Adapter(mfusepy.Operations):
    use_ns = True

    def __init__(self, operations: Operations, on_init: Callable[[], None], name_ttl: float) -> None:
        self._operations = operations
        self._on_init = on_init
        self._name_ttl = name_ttl
        self._guard = threading.Lock()
        # By path: the open versions with their number of opens, the version that was opened last at the end. Not by
        # handle: a path below a directory gets a new node with each open.
        self._open: dict[str, dict[ObjectVersion, int]] = {}
        # By path: the version that the kernel was told, and until when it believes that (monotonic seconds), the newest
        # last.
        self._told: OrderedDict[str, tuple[ObjectVersion | None, float]] = OrderedDict()

    def init_with_config(self, conn_info: Any, config_3: Any) -> None:
        if config_3 is not None:
            config_3.use_ino = 1
            config_3.entry_timeout = config_3.attr_timeout = config_3.negative_timeout = self._name_ttl
        self._on_init()

    @contextmanager
    def _found(self, path: str) -> Iterator[Attributes]:
        """Look up a path, and keep its nodes while the block runs."""
        with _errors():
            found = self._operations.getattr(ROOT)
            held: list[int] = []
            try:
                for name in filter(None, path.split("/")):
                    found = self._operations.lookup(found.node, name)
                    held.append(found.node)
                yield found
            finally:
                for node in held:
                    self._operations.forget([(node, 1)])

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        with self._found(path) as found:
            self._note_told(path, self._version(found))
            mtime = int(found.mtime * 1e9)
            return {
                "st_ino": found.ino,
                "st_mode": found.mode,
                "st_nlink": 1,
                "st_size": found.size,
                "st_blocks": -(-found.size // 512),
                "st_uid": found.uid,
                "st_gid": found.gid,
                "st_atime": mtime,
                "st_mtime": mtime,
                "st_ctime": mtime,
            }

    def _version(self, found: Attributes) -> ObjectVersion | None:
        return self._operations.version(found.node)

    def _note_told(self, path: str, version: ObjectVersion | None) -> None:
        with self._guard:
            now = time.monotonic()
            while self._told and next(iter(self._told.values()))[1] <= now:
                self._told.popitem(last=False)
            self._told[path] = version, now + self._name_ttl
            self._told.move_to_end(path)

    def opendir(self, path: str) -> int:
        with self._found(path) as found:
            return self._operations.opendir(found.node)

    def readdir_with_offset(self, path: str, offset: int, fh: int) -> Iterator[tuple[str, dict[str, int], int]]:
        with self._found(path) as found:
            for name, is_dir, following in self._operations.readdir(found.node, fh, offset):
                yield name, {"st_mode": stat.S_IFDIR if is_dir else stat.S_IFREG, "st_ino": UNKNOWN_INO}, following

    def releasedir(self, path: str, fh: int) -> int:
        self._operations.releasedir(fh)
        return 0

    def open(self, path: str, fi: Any) -> int:
        with self._found(path) as found, self._operations.at_hand(found.node, wait=True), self._guard:
            version = self._version(found)
            if version is not None and self._told.get(path, (version, 0))[0] != version:
                # The kernel has the size of the old version: a reader would take the new one to end there.
                raise VersionChangedError(f"{path} was replaced since it was looked up", "open it again")
            handle = self._operations.open(found.node, fi.flags).handle
            assert version is not None
            versions = self._open.setdefault(path, {})
            versions[version] = versions.pop(version, 0) + 1
            fi.fh = handle
            fi.direct_io = len(versions) > 1
            return 0

    def read(self, path: str, size: int, offset: int, fi: Any) -> bytes:
        with _errors():
            reader = self._operations.reader(fi.fh)
            if next(reversed(self._open[path])) != reader.version:
                self._operations.outdate(reader)
                raise VersionChangedError(f"{path} was replaced while it was open", "open it again")
            return reader.read(offset, size)

    def release(self, path: str, fi: Any) -> int:
        with self._guard, _errors():
            version = self._operations.reader(fi.fh).version
            versions = self._open[path]
            versions[version] -= 1
            if not versions[version]:
                del versions[version]
            if not versions:
                del self._open[path]
            self._operations.release(fi.fh)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = self._operations.statfs()
        return {
            "f_bsize": found.block_size,
            "f_frsize": found.block_size,
            "f_blocks": found.blocks,
            "f_bfree": found.free,
            "f_bavail": found.free,
            "f_namemax": found.name_max,
        }

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        with self._found(path) as found:
            return self._operations.getxattr(found.node, name)

    def listxattr(self, path: str) -> list[str]:
        with self._found(path) as found:
            return self._operations.listxattr(found.node)


def serve(
    operations: Operations,
    mountpoint: Path,
    settings: Settings,
    on_ready: Callable[[], None],
    wait_for_stop: Callable[[], object],
) -> None:
    """Mount, and serve until the mount is unmounted or `wait_for_stop` returns. Runs libfuse in this thread.

    Args:
        operations: answers the calls.
        mountpoint: an empty directory.
        settings: of the mount.
        on_ready: called once the directory answers.
        wait_for_stop: returns when the mount should end.

    Raises:
        UsageError: libfuse cannot mount there.
    """
    ready = threading.Event()
    operations.attach(FrontEnd())

    def watch() -> None:
        ready.wait()
        os.stat(mountpoint)  # noqa: PTH116 - waits until the directory answers
        channel.set_read_ahead(mountpoint, int(settings.kernel_read_ahead))
        on_ready()
        wait_for_stop()
        if mountinfo.mounted_at(mountpoint) is not None:
            channel.unmount(mountpoint, lazy=True)

    threading.Thread(target=watch, name="obsfs-watch", daemon=True).start()
    options: dict[str, Any] = {"allow_other": True} if settings.allow_other else {}
    if (mfusepy.fuse_version_major, mfusepy.fuse_version_minor) >= _LIMITS_THREADS_SINCE:
        # Each call holds a thread while it waits for the bucket.
        options["max_threads"] = _MAX_THREADS
    try:
        mfusepy.FUSE(
            _Adapter(operations, ready.set, min(settings.metadata_ttl, _NAME_SECONDS)),
            str(mountpoint),
            raw_fi=True,
            foreground=True,
            ro=True,
            nosuid=True,
            nodev=True,
            default_permissions=True,
            fsname=str(operations.identity["source"]).replace(",", "\\,"),
            subtype="obsfs",
            **options,
        )
    except RuntimeError as error:
        if ready.is_set():
            return  # libfuse reports the signal that ended it as an error
        raise UsageError(f"libfuse cannot mount on {mountpoint} (error {error})", "see fusermount3(1)") from None
