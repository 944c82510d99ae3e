"""Bytes of a file in memory, shared with every process that maps it, without a descriptor.

:class:`mmap.mmap` duplicates the descriptor and keeps it for as long as the map. A mount has thousands of maps, and
descriptors are scarce. The kernel keeps the open file description itself while it is mapped, with its locks.
"""

from __future__ import annotations

import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """The first `size` bytes of a file, readable and writable as `view`. Raises OSError.

    Whoever slices or casts the view releases that before :meth:`close`: afterwards its memory is not there.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._size = size
        self._at = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if self._at in (None, _FAILED):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.view = memoryview((ctypes.c_ubyte * size).from_address(self._at)).cast("B")

    def close(self) -> None:
        """Unmap it; the locks of the open file end here unless a descriptor has them as well."""
        self.view.release()
        _libc.munmap(self._at, self._size)
