"""A mount that says it is obsfs, as any user may make one: it answers what it likes, or never."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from obsfs import mountinfo
from obsfs.fuse.kernel import channel, wire
from obsfs.fuse.kernel.wire import Opcode

_libc = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
_MNT_DETACH = 2  # <sys/mount.h>


class Impostor:
    """A FUSE mount of type fuse.obsfs, made as the user `user`.

    `status` is what it answers to every question for an extended attribute; with None it takes the question, and
    never answers. `asked` counts the questions. `gate`, if given, is waited on before an answer.
    """

    def __init__(
        self,
        path: Path,
        *,
        user: int = 0,
        status: dict[str, Any] | None = None,
        source: str = "obs://impostors",
        gate: threading.Barrier | None = None,
    ) -> None:
        self.path = path
        self.asked = 0
        self._status = status
        self._gate = gate
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id={user},group_id=0,allow_other".encode()
        failed = _libc.mount(source.encode(), os.fsencode(path), mountinfo.FS_TYPE.encode(), ctypes.c_ulong(1), options)
        assert failed == 0, os.strerror(ctypes.get_errno())
        self._number = next(one.number for one in reversed(mountinfo.mounts()) if one.mountpoint == path)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError, threading.BrokenBarrierError):
            while True:
                data = os.read(self._fd, 1 << 20)
                request = wire.parse_request(data, len(data))
                if request.opcode == Opcode.INIT:
                    body = wire.init_out(minor=31, flags=wire.Init(0), max_pages=1, max_background=8)
                    self._answer(request.unique, 0, body)
                elif request.opcode == Opcode.GETXATTR:
                    self.asked += 1
                    if self._status is not None:
                        self._tell(request, data)
                elif request.opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
                    self._answer(request.unique, errno.EIO, b"")

    def _tell(self, request: wire.Request, data: bytes) -> None:
        size, _ = wire.GETXATTR_IN.unpack_from(data, request.body)
        text = json.dumps(self._status).encode()
        if self._gate is not None:
            self._gate.wait(20)
        if size and size < len(text):
            self._answer(request.unique, errno.ERANGE, b"")
        else:
            self._answer(request.unique, 0, text if size else wire.GETXATTR_OUT.pack(len(text), 0))

    def _answer(self, unique: int, error: int, body: bytes) -> None:
        os.write(self._fd, wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(body), -error, unique) + body)

    def die(self) -> None:
        """End the connection, and leave the mount: whoever asks, or waits for an answer, gets an error."""
        channel.Connection(self.entry).abort()
        self._thread.join(10)
        os.close(self._fd)
        self._fd = -1

    @property
    def entry(self) -> mountinfo.MountEntry:
        """What the kernel says of it."""
        return next(entry for entry in mountinfo.mounts() if entry.number == self._number)

    def close(self) -> None:
        """Unmount."""
        if self._fd >= 0:
            self.die()
        _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
