"""The loop between the kernel and the operations: four threads on cloned descriptors.

No thread waits for the network on behalf of a read: a read whose bytes are not there is remembered by its number
and answered by the thread that stored them. Calls that must ask the bucket for names go to a pool, in which those
about different directories do not wait for each other; so do opens of files whose cache file is not open, since its
disk may be slow. The kernel gets a file that is complete in the cache at open (passthrough), and reads it by itself.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable

from obsfs.errors import ObsfsError
from obsfs.fetch.reader import Reader
from obsfs.fuse.kernel import channel, wire
from obsfs.fuse.kernel.calls import Call, Calls
from obsfs.fuse.kernel.front import FdStore, KernelFront
from obsfs.fuse.kernel.pending import Pending
from obsfs.fuse.kernel.pool import WaitingPool
from obsfs.fuse.kernel.replies import ReadReplies, reply, reply_error
from obsfs.fuse.kernel.wire import Init, Opcode, Request
from obsfs.vfs.listings import WouldBlockError
from obsfs.vfs.operations import Operations

log = logging.getLogger(__name__)

_THREADS = 4
_BUFFER_BYTES = 64 << 10
_MAX_BACKGROUND = 128
_MIN_MINOR = 31
"""The oldest protocol that has all that is used, 7.31 (Linux 5.4)."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_FINISH_SECONDS = 10.0
_MAX_SINGLE_NAMES = 512
"""Threads that ask for one name each."""
_SHARED_SINGLE_NAMES = 384
"""For one directory 192 of them, for the next 96, and so on; the rest is left for one name of each later directory."""


class Server:
    """Serves one connection until it is unmounted, then calls `on_end`.

    Args:
        fd: the mount's own descriptor, not yet initialised.
        operations: answers the calls.
        passthrough: whether to ask the kernel for it.
        on_end: called from a thread of the server.
        fd_store: keeps what a successor needs.
    """

    def __init__(
        self, fd: int, operations: Operations, *, passthrough: bool, on_end: Callable[[], None], fd_store: FdStore
    ) -> None:
        self.can_be_followed = False
        """Whether another server can take over: the kernel sends requests again."""
        self.ended = threading.Event()
        self._fd = fd
        self._operations = operations
        self._passthrough = passthrough
        self._on_end = on_end
        self._names = WaitingPool("obsfs-names")
        # Names that are asked for one by one, in directories that are too long for a page: none waits for another,
        # unless very many get no answer.
        self._single_names = WaitingPool(
            "obsfs-name", max_threads=_MAX_SINGLE_NAMES, max_per_group=_SHARED_SINGLE_NAMES, shared=_SHARED_SINGLE_NAMES
        )
        self._pending = Pending()
        self._replies = ReadReplies(self._pending)
        self._front = KernelFront(fd, self._pending, fd_store)
        self._calls = Calls(operations, self._front)
        self._threads: list[threading.Thread] = []
        self._fds: list[int] = []

    def start(self) -> list[int]:
        """Answer INIT and start serving in threads. Returns all descriptors of the connection.

        Raises OSError when the kernel is too old to talk to.
        """
        self._operations.attach(self._front)
        self._initialise()
        fds = [self._fd, *(channel.clone(self._fd) for _ in range(_THREADS - 1))]
        self._begin(fds)
        return fds

    def take_over(self, fds: list[int], *, direct: bool) -> None:
        """Go on where a predecessor ended. The operations have inherited already.

        Args:
            fds: its descriptors of the connection.
            direct: whether it found that the kernel takes cache files (passthrough).
        """
        self._operations.attach(self._front)
        self._operations.can_pass_through = direct
        self.can_be_followed = True
        # Before the first read: a request that is read and not yet answered would come twice.
        os.write(self._fd, wire.resend())
        self._begin(fds)

    def refresh(self, node: int) -> None:
        """Ask the bucket again for all that is shown under a node, and tell the kernel, which may take 2 s."""
        self._front.forget_names_now(self._operations.refresh(node))

    def store_fds_again(self) -> None:
        """Give another supervisor the locks of the cache files that the kernel reads by itself."""
        self._operations.keep_locks_again()

    def _begin(self, fds: list[int]) -> None:
        self._fds = fds
        for number, fd in enumerate(self._fds):
            thread = threading.Thread(target=self._serve, args=(fd,), name=f"obsfs-fuse-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._front.start(self._operations.eviction_candidates)

    def join(self) -> None:
        """After an unmount: wait for the threads, then close the connection."""
        deadline = time.monotonic() + _FINISH_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(0.1, deadline - time.monotonic()))
        self._names.close()
        self._single_names.close()
        # An answer from now on goes nowhere: its descriptor's number may be another file's by then.
        self._pending.clear()
        self._front.close()
        for fd in self._fds:
            os.close(fd)

    def _initialise(self) -> None:
        buffer = bytearray(_BUFFER_BYTES)
        length = os.readv(self._fd, [buffer])
        request = wire.parse_request(buffer, length)
        if request.opcode != Opcode.INIT:
            raise OSError(errno.EPROTO, "the kernel did not begin with INIT")
        body = bytes(buffer[request.body : length]).ljust(wire.INIT_IN.size, b"\0")
        major, minor, _, low, high = wire.INIT_IN.unpack_from(body)
        if major != wire.MAJOR or minor < _MIN_MINOR:
            raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}; obsfs needs 7.31 (Linux 5.4)")
        offered = low | high << 32 if low & Init.INIT_EXT else low
        wanted = (
            Init.ASYNC_READ | Init.SPLICE_WRITE | Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO | Init.ASYNC_DIO
            | Init.PARALLEL_DIROPS | Init.MAX_PAGES | Init.INIT_EXT | Init.HAS_EXPIRE_ONLY | Init.HAS_RESEND
        )  # fmt: skip
        if self._passthrough:
            wanted |= Init.PASSTHROUGH
        flags = Init(int(wanted) & offered)
        max_pages = self._replies.max_bytes // _PAGE
        out = wire.init_out(
            minor=min(minor, wire.MINOR), flags=flags, max_pages=max_pages, max_background=_MAX_BACKGROUND
        )
        reply(self._fd, request.unique, out)
        self.can_be_followed = Init.HAS_RESEND in flags
        if Init.PASSTHROUGH in flags:
            self._operations.try_passthrough()

    # the loop

    def _serve(self, fd: int) -> None:
        # Written to, so that its pages are there: the kernel fails a request with EIO when it has to find a page for it
        # and this process is killed at that moment.
        buffer = bytearray(b"\xff" * _BUFFER_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                length = os.readv(fd, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                    log.error("reading from /dev/fuse: %s", error)
                self.ended.set()
                self._front.stop_trimming()
                self._on_end()
                return
            try:
                request = wire.parse_request(buffer, length)
                self._dispatch(fd, request, view)
            except Exception:
                log.exception("a request could not be served")

    def _dispatch(self, fd: int, request: Request, view: memoryview) -> None:
        opcode = request.opcode
        if opcode == Opcode.READ:
            self._read(fd, request, view)
        elif opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
            self._calls.forget(request, view)
        elif opcode == Opcode.INTERRUPT:
            self._interrupt(*wire.INTERRUPT_IN.unpack_from(view, request.body))
        elif (call := self._calls.by_opcode.get(opcode)) is not None:
            try:
                self._call(fd, request, view, call, wait=False)
            except WouldBlockError as error:
                pool = self._single_names if error.is_alone else self._names
                self._call_later(pool, fd, request, memoryview(bytes(view[: request.end])), call)
        elif opcode == Opcode.DESTROY:
            reply(fd, request.unique)
        else:
            reply_error(fd, request.unique, errno.ENOSYS)

    def _call_later(self, pool: WaitingPool, fd: int, request: Request, body: memoryview, call: Call) -> None:
        def ask() -> None:
            # A request that was interrupted in the queue has its answer.
            if request.unique in self._pending:
                self._call(fd, request, body, call, wait=True)

        if not self._pending.add(fd, request.unique, request.node):
            reply_error(fd, request.unique, errno.EINTR)
            return
        # Calls that wait for names are about the directory that the request names, an open about its file. A refresh
        # does not ask the bucket.
        is_refresh = request.opcode == Opcode.GETXATTR
        try:
            pool.submit((request.node, is_refresh), ask)
        except RuntimeError as error:
            log.error("no thread to ask for a name: %s", error)
            self._answer_error(fd, request, errno.EAGAIN, is_pending=True)

    def _call(self, fd: int, request: Request, view: memoryview, call: Call, *, wait: bool) -> None:
        """Answer a request. One that may `wait` is pending, and answered only if it was not interrupted."""
        try:
            answer = call(request, view, wait)
        except ObsfsError as error:
            self._answer_error(fd, request, error.errno, wait)
        except WouldBlockError:
            raise
        except (ValueError, UnicodeError):
            self._answer_error(fd, request, errno.ENOENT, wait)
        except Exception:
            log.exception("opcode %d failed", request.opcode)
            self._answer_error(fd, request, errno.EIO, wait)
        else:
            if wait and not self._pending.claim(request.unique):
                self._calls.take_back(request, answer)
            else:
                reply(fd, request.unique, answer)

    def _answer_error(self, fd: int, request: Request, number: int, is_pending: bool) -> None:
        if not is_pending or self._pending.claim(request.unique):
            reply_error(fd, request.unique, number)

    def _interrupt(self, unique: int) -> None:
        # It comes over any of the clones, but the request's own takes the answer.
        fd = self._pending.interrupt(unique)
        if fd is not None:
            reply_error(fd, unique, errno.EINTR)

    # reading

    def _read(self, fd: int, request: Request, view: memoryview) -> None:
        handle, offset, size, *_ = wire.READ_IN.unpack_from(view, request.body)
        unique = request.unique
        try:
            reader = self._operations.reader(handle)
        except ObsfsError as error:
            reply_error(fd, unique, error.errno)
            return
        size = max(0, min(size, reader.size - offset))
        if not size:
            reply(fd, unique)
        elif self._pending.add(fd, unique):
            self._try_read(fd, unique, reader, offset, size)
        else:
            reply_error(fd, unique, errno.EINTR)

    def _try_read(self, fd: int, unique: int, reader: Reader, offset: int, size: int, *, again: bool = False) -> None:
        def done(error: ObsfsError | None) -> None:
            if error is None:
                self._try_read(fd, unique, reader, offset, size, again=True)
            elif self._pending.claim(unique):
                reply_error(fd, unique, error.errno)

        try:
            # Blocks may be evicted between the two steps; then they are asked for again.
            while reader.ready(offset, size, done, again=again):
                if self._replies.send(fd, unique, reader, offset, size):
                    return
                again = True
        except Exception:
            log.exception("a read of %s failed", reader.version.key)
            if self._pending.claim(unique):
                reply_error(fd, unique, errno.EIO)
