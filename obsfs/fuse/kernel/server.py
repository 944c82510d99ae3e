"""The loop between the kernel and the operations: four threads on cloned descriptors, replies by splice.

No thread waits for the network on behalf of a read: a read whose bytes are not there is remembered by its number
and answered by the thread that stored them. Calls that must ask the bucket for names go to a pool, in which those
about different directories do not wait for each other; so do opens of files whose cache file is not open, since its
disk may be slow. A file that is complete in the cache is handed to the kernel at open (passthrough) and never seen here
again.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from itertools import takewhile
from queue import Empty, SimpleQueue

from obsfs.cache.layout import BLOCK, block_count
from obsfs.errors import NotFoundError, ObsfsError
from obsfs.fetch.reader import Reader
from obsfs.fuse.kernel import channel, wire
from obsfs.fuse.kernel.notifier import Notifier
from obsfs.fuse.kernel.pool import WaitingPool
from obsfs.fuse.kernel.splice import GONE, Pipe
from obsfs.fuse.kernel.wire import FileOpen, Init, Opcode, Request
from obsfs.service.supervisor_client import SupervisorClient
from obsfs.vfs.operations import REFRESH, UNKNOWN_INO, Attributes, Operations
from obsfs.vfs.tree import WouldBlockError

log = logging.getLogger(__name__)

_THREADS = 4
_BUFFER = 64 << 10
_MAX_BACKGROUND = 128
_SPLICE_FROM = 32 << 10
_PAGE = os.sysconf("SC_PAGE_SIZE")
_FINISH_SECONDS = 10.0
_TRIM_SECONDS = 0.5
_TELL_SECONDS = 2.0
_MOST_INTERRUPTED = 64
_NOTICES = 64
_MOST_ALONE = 512
_FEW_ALONE = 384
"""For one directory 192, for the next 96, and so on; the rest is left for one name of each that comes then."""
_HOLD_SECONDS = 0.25
"""Between two looks whether the kernel can be told something without delay."""

_Call = Callable[[Request, memoryview, bool], bytes | list[bytes] | None]


class Server:
    """Serves one connection until it is unmounted, then calls `on_end`.

    `fd` is the mount's own descriptor, not yet initialised. What `supervisor` stores lets another server take over.
    """

    def __init__(
        self,
        fd: int,
        operations: Operations,
        *,
        passthrough: bool,
        on_end: Callable[[], None],
        supervisor: SupervisorClient,
    ) -> None:
        self._fd = fd
        self._supervisor = supervisor
        self.can_be_followed = False
        self._operations = operations
        self._passthrough = passthrough
        self._names = WaitingPool("obsfs-names")
        # Names that are asked for one by one, in directories that are too long for a page: none waits for another,
        # unless very many are silent.
        self._single_names = WaitingPool("obsfs-name", most=_MOST_ALONE, most_of_one=_FEW_ALONE, few=_FEW_ALONE)
        self._local = threading.local()
        # By the number of a request: the descriptor that it came over, and the node whose names it waits for, or 0.
        self._pending: dict[int, tuple[int, int]] = {}
        self._interrupted: deque[int] = deque(maxlen=_MOST_INTERRUPTED)
        self._guard = threading.Lock()
        # Its own, since whoever opens a file notes down more than a read may wait for.
        self._opening = threading.Lock()
        self._backings: dict[int, tuple[int, int]] = {}
        self._threads: list[threading.Thread] = []
        self._fds: list[int] = []
        self._pages = Notifier(fd)
        self._crowded = threading.Event()
        # What the kernel is told: a message, or the parent and name of what it may be told once nobody is held up.
        self._notices: SimpleQueue[bytes | tuple[int, str] | threading.Event | None] = SimpleQueue()
        self.ended = threading.Event()
        self._on_end = on_end
        self._calls: dict[int, _Call] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
        }

    def start(self) -> list[int]:
        """Answer INIT and start serving in threads. Returns all descriptors of the connection.

        Raises OSError when the kernel is too old to talk to.
        """
        self._initialise()
        fds = [self._fd, *(channel.clone(self._fd) for _ in range(_THREADS - 1))]
        self._begin(fds)
        return fds

    def take_over(self, fds: list[int], *, direct: bool) -> None:
        """Go on where a predecessor ended, on its descriptors; `direct` is what it found out about passthrough.

        The operations have inherited already.
        """
        self._operations.can_be_direct = direct
        self.can_be_followed = True
        for node in self._operations.tree.opened():
            if node.backing and node.direct_opens:
                self._backings[node.id] = node.backing, node.direct_opens
        # Before anything is read: what is read and not answered would come twice.
        os.write(self._fd, wire.resend())
        self._begin(fds)

    def _begin(self, fds: list[int]) -> None:
        self._operations.engine.on_complete = self._on_complete
        self._operations.engine.on_changed = self._on_changed
        self._operations.engine.on_prefetched = self._store
        self._operations.tree.is_awaited = self._is_awaited
        self._fds = fds
        for number, fd in enumerate(self._fds):
            thread = threading.Thread(target=self._serve, args=(fd,), name=f"obsfs-fuse-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        threading.Thread(target=self._trim, name="obsfs-trim", daemon=True).start()
        threading.Thread(target=self._tell, name="obsfs-notices", daemon=True).start()

    def join(self) -> None:
        """After an unmount: wait for the threads, then close the connection."""
        deadline = time.monotonic() + _FINISH_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(0.1, deadline - time.monotonic()))
        self._names.close()
        self._single_names.close()
        with self._guard:
            # What is answered from here on is told nobody: its descriptor's number may be another file's by then.
            self._pending.clear()
        self._notices.put(None)
        self._pages.close()
        for fd in self._fds:
            os.close(fd)

    def _initialise(self) -> None:
        buffer = bytearray(_BUFFER)
        length = os.readv(self._fd, [buffer])
        request = wire.parse_request(buffer, length)
        if request.opcode != Opcode.INIT:
            raise OSError(errno.EPROTO, "the kernel did not begin with INIT")
        body = bytes(buffer[request.body : length]).ljust(wire.INIT_IN.size, b"\0")
        major, minor, _, low, high = wire.INIT_IN.unpack_from(body)
        if major != wire.MAJOR or minor < 31:
            raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}; obsfs needs 7.31 (Linux 5.4)")
        offered = low | high << 32 if low & Init.INIT_EXT else low
        wanted = (
            Init.ASYNC_READ | Init.SPLICE_WRITE | Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO | Init.ASYNC_DIO
            | Init.PARALLEL_DIROPS | Init.MAX_PAGES | Init.INIT_EXT | Init.HAS_EXPIRE_ONLY | Init.HAS_RESEND
        )  # fmt: skip
        if self._passthrough:
            wanted |= Init.PASSTHROUGH
        flags = Init(int(wanted) & offered)
        max_pages = self._pipe().room // _PAGE
        out = wire.init_out(
            minor=min(minor, wire.MINOR), flags=flags, max_pages=max_pages, max_background=_MAX_BACKGROUND
        )
        self._reply(self._fd, request.unique, out)
        self.can_be_followed = Init.HAS_RESEND in flags
        if Init.PASSTHROUGH in flags:
            self._operations.can_be_direct = self._try_passthrough()

    def _try_passthrough(self) -> bool:
        """Whether a file of the cache can be registered: privileges and the cache's file system decide."""
        try:
            channel.close_backing(
                self._fd, channel.open_backing(self._fd, self._operations.engine.cache.directory_lock.fd)
            )
        except OSError as error:
            log.info("no passthrough: %s", error.strerror)
            return False
        return True

    # the loop

    def _serve(self, fd: int) -> None:
        # Written to, so that its pages are there: the kernel fails a request with EIO when it has to find a page for it
        # and this process is killed meanwhile.
        buffer = bytearray(b"\xff" * _BUFFER)
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
                self._crowded.set()
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
            self._forget(request, view)
        elif opcode == Opcode.INTERRUPT:
            self._interrupt(*wire.INTERRUPT_IN.unpack_from(view, request.body))
        elif (call := self._calls.get(opcode)) is not None:
            try:
                self._call(fd, request, view, call, wait=False)
            except WouldBlockError as error:
                pool = self._single_names if error.is_alone else self._names
                self._call_later(pool, fd, request, memoryview(bytes(view[: request.end])), call)
        elif opcode == Opcode.DESTROY:
            self._reply(fd, request.unique)
        else:
            self._reply_error(fd, request.unique, errno.ENOSYS)

    def _call_later(self, pool: WaitingPool, fd: int, request: Request, body: memoryview, call: _Call) -> None:
        def ask() -> None:
            # Whoever was interrupted in the queue has his answer.
            if request.unique in self._pending:
                self._call(fd, request, body, call, wait=True)

        if self._expect(fd, request.unique, request.node):
            # All that wait for names are about the directory that the request names, an open about its file. A refresh
            # asks nobody.
            is_refresh = request.opcode == Opcode.GETXATTR
            try:
                pool.submit((request.node, is_refresh), ask)
            except RuntimeError as error:
                log.error("no thread to ask for a name: %s", error)
                self._answer_error(fd, request, errno.EAGAIN, deferred=True)

    def _call(self, fd: int, request: Request, view: memoryview, call: _Call, *, wait: bool) -> None:
        try:
            parts = call(request, view, wait)
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
            if parts is not None and wait and not self._claim(request.unique):
                self._take_back(request, parts)
            elif parts is not None:
                self._reply(fd, request.unique, *([parts] if isinstance(parts, bytes) else parts))

    def _take_back(self, request: Request, parts: bytes | list[bytes]) -> None:
        """Undo what a call counted whose request was interrupted meanwhile: the kernel never gives it back."""
        if request.opcode == Opcode.OPENDIR and isinstance(parts, bytes):
            self._operations.unopened_dir(request.node, wire.OPEN_OUT.unpack(parts)[0])
        elif request.opcode == Opcode.OPEN and isinstance(parts, bytes):
            with self._opening:
                self._close(request.node, wire.OPEN_OUT.unpack(parts)[0])
        self._operations.unanswered(_number(request))

    def _answer_error(self, fd: int, request: Request, number: int, deferred: bool) -> None:
        if not deferred or self._claim(request.unique):
            self._reply_error(fd, request.unique, number)

    # a request that is not answered at once can be interrupted: whoever claims its number answers it

    def _expect(self, fd: int, unique: int, names_of: int = 0) -> bool:
        """Note a request that came over `fd`; False when its interrupt came before it, and it is answered.

        `names_of` is the node of the directory whose names it waits for, if it does.
        """
        with self._guard:
            if unique not in self._interrupted:
                self._pending[unique] = fd, names_of
                return True
        self._reply_error(fd, unique, errno.EINTR)
        return False

    def _claim(self, unique: int) -> bool:
        with self._guard:
            return self._pending.pop(unique, None) is not None

    def _is_awaited(self, directory: int) -> bool:
        """Whether a request waits for names of this directory that was not interrupted."""
        with self._guard:
            return any(node == directory for _, node in self._pending.values())

    def _interrupt(self, unique: int) -> None:
        # It comes over any of the clones, but the request's own takes the answer.
        with self._guard:
            found = self._pending.pop(unique, None)
            if found is None:
                # Answered already, or another thread is just reading it.
                self._interrupted.append(unique)
        if found is not None:
            self._reply_error(found[0], unique, errno.EINTR)

    # replies

    def _reply(self, fd: int, unique: int, *parts: bytes) -> None:
        size = wire.OUT_HEADER.size + sum(map(len, parts))
        self._send(fd, [wire.OUT_HEADER.pack(size, 0, unique), *parts])

    def _reply_error(self, fd: int, unique: int, number: int) -> None:
        self._send(fd, [wire.OUT_HEADER.pack(wire.OUT_HEADER.size, -number, unique)])

    def _send(self, fd: int, parts: list[bytes]) -> None:
        try:
            os.writev(fd, parts)
        except OSError as error:
            if error.errno not in GONE:
                raise

    # reading

    def _read(self, fd: int, request: Request, view: memoryview) -> None:
        handle, offset, size, *_ = wire.READ_IN.unpack_from(view, request.body)
        unique = request.unique
        try:
            reader = self._operations.reader(handle)
        except ObsfsError as error:
            self._reply_error(fd, unique, error.errno)
            return
        size = max(0, min(size, reader.size - offset))
        if not size:
            self._reply(fd, unique)
            return
        if self._expect(fd, unique):
            self._try_read(fd, unique, reader, offset, size)

    def _try_read(self, fd: int, unique: int, reader: Reader, offset: int, size: int, *, again: bool = False) -> None:
        def done(error: ObsfsError | None) -> None:
            if error is None:
                self._try_read(fd, unique, reader, offset, size, again=True)
            elif self._claim(unique):
                self._reply_error(fd, unique, error.errno)

        try:
            # Blocks may be evicted between the two steps; then they are asked for again.
            while reader.ready(offset, size, done, again=again):
                if self._send_bytes(fd, unique, reader, offset, size):
                    return
                again = True
        except Exception:
            log.exception("a read of %s failed", reader.version.key)
            if self._claim(unique):
                self._reply_error(fd, unique, errno.EIO)

    def _send_bytes(self, fd: int, unique: int, reader: Reader, offset: int, size: int) -> bool:
        """Answer a read from the cache; False when the bytes are no longer there."""
        cached = reader.cached
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + size, 0, unique)
        blocks = range(offset // BLOCK, block_count(offset + size))
        if size < _SPLICE_FROM or not cached.are_verified(blocks):
            data = cached.read(offset, size)
            if data is None:
                return False
            if self._claim(unique):
                self._send(fd, [header, data])
            return True
        pipe = self._pipe()
        is_empty = False
        try:
            is_filled = pipe.fill(header, cached.data_fd, offset, size)
            if not cached.are_verified(blocks):
                return False
            if not is_filled:
                cached.mark_lost(blocks)
                return False
            is_empty = self._claim(unique) and pipe.send(fd, len(header) + size)
            return True
        finally:
            # Whatever went wrong: what is left in it must not become part of the next reply.
            if not is_empty:
                self._drop_pipe(pipe)

    def _pipe(self) -> Pipe:
        pipe: Pipe | None = getattr(self._local, "pipe", None)
        if pipe is None:
            pipe = self._local.pipe = Pipe()
        return pipe

    def _drop_pipe(self, pipe: Pipe) -> None:
        pipe.close()
        self._local.pipe = None

    # names and attributes

    def _lookup(self, request: Request, view: memoryview, wait: bool) -> bytes:
        name = wire.text(view, request.body, request.end)
        try:
            found = self._operations.lookup(request.node, name, wait=wait, unique=self._counted_once(request))
        except NotFoundError:
            return wire.entry_out(0, self._operations.negative_ttl(request.node, name), bytes(wire.ATTR.size))
        self._check_room()
        return _entry(found)

    def _counted_once(self, request: Request) -> int:
        """The number of a request that counts lookups. What a predecessor has counted, and not answered, is none."""
        unique = _number(request)
        if unique != request.unique:
            self._operations.unanswered(unique)
        return unique

    def _check_room(self) -> None:
        if self._operations.tree.over_limit:
            self._crowded.set()

    def _getattr(self, request: Request, view: memoryview, wait: bool) -> bytes:
        return wire.attr_out(_attr(self._operations.getattr(request.node)))

    def _forget(self, request: Request, view: memoryview) -> None:
        if request.opcode == Opcode.FORGET:
            self._operations.forget([(request.node, *wire.FORGET_IN.unpack_from(view, request.body))])
            return
        count, _ = wire.BATCH_FORGET_IN.unpack_from(view, request.body)
        start = request.body + wire.BATCH_FORGET_IN.size
        count = min(count, max(0, request.end - start) // wire.FORGET_ONE.size)
        self._operations.forget(wire.FORGET_ONE.iter_unpack(view[start : start + count * wire.FORGET_ONE.size]))

    def _statfs(self, request: Request, view: memoryview, wait: bool) -> bytes:
        found = self._operations.statfs()
        return wire.STATFS_OUT.pack(
            found.blocks, found.free, found.free, 0, 0, found.block_size, found.name_max, found.block_size, 0
        )

    def _getxattr(self, request: Request, view: memoryview, wait: bool) -> bytes:
        size, _ = wire.GETXATTR_IN.unpack_from(view, request.body)
        name = wire.text(view, request.body + wire.GETXATTR_IN.size, request.end)
        if name == REFRESH:
            if not wait:
                raise WouldBlockError
            self._refresh(request.node)
            return _sized(b"", size)
        return _sized(self._operations.getxattr(request.node, name), size)

    def _refresh(self, node: int) -> None:
        for parent, name in self._operations.refresh(node):
            self._notices.put(wire.inval_entry(parent, name.encode()))
        told = threading.Event()
        self._notices.put(told)
        # Whoever asked may look at once, unless the kernel waits for a reader that waits for the bucket.
        told.wait(_TELL_SECONDS)

    def _listxattr(self, request: Request, view: memoryview, wait: bool) -> bytes:
        size, _ = wire.GETXATTR_IN.unpack_from(view, request.body)
        return _sized(b"".join(b"%s\0" % name.encode() for name in self._operations.listxattr(request.node)), size)

    # files

    def _open(self, request: Request, view: memoryview, wait: bool) -> bytes:
        flags, _ = wire.OPEN_IN.unpack_from(view, request.body)
        with self._operations.at_hand(request.node, wait=wait), self._opening:
            unique = _number(request)
            before = self._operations.tree.counted(unique)
            if before is None:
                opened = self._operations.open(request.node, flags, unique)
            else:
                opened = self._operations.opened_before(request.node, unique, direct=before)
            backing = 0
            if opened.handle & 1:
                try:
                    backing = self._hold_backing(request.node, opened.direct_fd, 1 if before is None else 0)
                except OSError as error:
                    log.warning("passthrough failed: %s", error.strerror)
                    opened = self._operations.reopen_indirect(opened.handle, unique)
        flags_out = FileOpen.KEEP_CACHE | FileOpen.NOFLUSH
        if opened.handle & 1:
            flags_out = FileOpen.PASSTHROUGH | FileOpen.NOFLUSH
            if flags & os.O_DIRECT:
                # The cache's file system wants offsets, sizes and buffers aligned; we do not, and a reader must not
                # notice that the file has become complete. With this flag reads come here, on an inode that others
                # read directly (fs/fuse/file.c: "FOPEN_DIRECT_IO overrides FOPEN_PASSTHROUGH").
                flags_out |= FileOpen.DIRECT_IO
        return wire.OPEN_OUT.pack(opened.handle, flags_out, backing)

    def _hold_backing(self, number: int, file_fd: int | None, more: int) -> int:
        """The id of a node's file for passthrough, with so many users more."""
        backing, users = self._backings.get(number, (0, 0))
        if not backing:
            assert file_fd is not None
            node = self._operations.tree.node(number)
            self._keep_lock(number)
            backing = channel.open_backing(self._fd, file_fd)
            self._operations.tree.set_backing(node, backing)
            users = node.direct_opens - more
        self._backings[number] = backing, users + more
        return backing

    def _keep_lock(self, number: int) -> None:
        # It stays open when this process does not: the successor finds the file that the kernel reads at its name.
        lock = self._operations.open_lock(number)
        if lock >= 0:
            self._supervisor.store_fds(f"node {number}", [lock])
            os.close(lock)

    def store_fds_again(self) -> None:
        """Give another supervisor what the last one had of the files that the kernel reads by itself."""
        with self._opening:
            for number in self._backings:
                self._keep_lock(number)

    def _release(self, request: Request, view: memoryview, wait: bool) -> bytes:
        handle, *_ = wire.RELEASE_IN.unpack_from(view, request.body)
        with self._opening:
            unique = _number(request)
            if self._operations.tree.counted(unique) is not None:
                return b""
            self._close(request.node, handle, unique)
        return b""

    def _close(self, number: int, handle: int, unique: int = 0) -> None:
        """End one open of a file. The caller holds the lock of opens."""
        if handle & 1:
            backing, users = self._backings.pop(number, (0, 0))
            if users > 1:
                self._backings[number] = backing, users - 1
            elif users:
                self._operations.tree.set_backing(self._operations.tree.node(number), 0)
                channel.close_backing(self._fd, backing)
                self._supervisor.remove_fds(f"node {number}")
        self._operations.release(handle, unique)

    def _on_complete(self, reader: Reader) -> None:
        """End the lifetime of names whose file is open through us, and could be opened in passthrough from now on."""
        if self._operations.can_be_direct:
            for node in self._operations.open_nodes(reader):
                if place := self._operations.tree.current_name(node):
                    self._notices.put(place)

    def _on_changed(self, reader: Reader) -> None:
        """End the lifetime of names that stand for a version which the bucket no longer has."""
        for place in self._operations.outdate(reader):
            self._notices.put(place)

    def _store(self, reader: Reader, block: int) -> None:
        """Put a block into the page cache of the files that are open, before anybody asks for it.

        Page faults of a memory map come one after the other, each with a wait for an answer; on pages that are there
        they cost a tenth.
        """
        cached = reader.cached
        state_word_ref = cached.state_word_ref(block)
        if state_word_ref is None:
            return
        try:
            for node in self._operations.open_nodes(reader):
                if not self._pages.store(node, cached.data_fd, block * BLOCK, cached.length_of(block), state_word_ref):
                    log.debug("block %d of %s is not stored: too many are waiting", block, reader.version.key)
        finally:
            os.close(state_word_ref[0])

    def _tell(self) -> None:
        """Send what is to be told. On its own thread: the kernel may wait for whoever looks up a name beside it.

        While it waits, it lets nobody else look up a name in that directory. So what can wait is held back until nobody
        looks one up who waits for the bucket.
        """
        held: deque[tuple[int, str]] = deque()
        with closing(Notifier(self._fd)) as notifier:
            while True:
                try:
                    notice = self._notices.get(timeout=_HOLD_SECONDS if held else None)
                except Empty:
                    self._tell_held(notifier, held)
                    continue
                if notice is None:
                    return
                if isinstance(notice, bytes):
                    _notify(notifier, [notice])
                elif isinstance(notice, tuple):
                    held.append(notice)
                    self._tell_held(notifier, held)
                else:
                    notice.set()

    def _tell_held(self, notifier: Notifier, held: deque[tuple[int, str]]) -> None:
        for _ in range(len(held)):
            parent, name = held.popleft()
            if self._is_awaited(parent):
                held.append((parent, name))
            else:
                _notify(notifier, [wire.inval_entry(parent, name.encode())])

    def _trim(self) -> None:
        """Have the kernel forget names beyond the bound. On a thread of its own: it waits for whoever lists them."""
        with closing(Notifier(self._fd)) as notifier:
            while self._crowded.wait() and not self.ended.is_set():
                self._crowded.clear()
                candidates = [
                    place for place in self._operations.tree.eviction_candidates() if not self._is_awaited(place[0])
                ]
                notices = [wire.inval_entry(parent, name.encode(), drop=True) for parent, name in candidates]
                for start in range(0, len(notices), _NOTICES):
                    _notify(notifier, notices[start : start + _NOTICES])
                self.ended.wait(_TRIM_SECONDS)

    # directories

    def _opendir(self, request: Request, view: memoryview, wait: bool) -> bytes:
        handle = self._operations.opendir(request.node, wait=wait)
        flags = FileOpen.CACHE_DIR
        if self._operations.note_shown(request.node, handle):
            flags |= FileOpen.KEEP_CACHE
        return wire.OPEN_OUT.pack(handle, flags, 0)

    def _readdir(self, request: Request, view: memoryview, wait: bool) -> list[bytes]:
        handle, offset, size, *_ = wire.READ_IN.unpack_from(view, request.body)
        operations, plus = self._operations, request.opcode == Opcode.READDIRPLUS
        parts: list[bytes] = []
        left = size
        fixed = wire.DIRENT.size + (wire.ENTRY_OUT.size + wire.ATTR.size if plus else 0)

        def fits(entry: tuple[str, bool, int]) -> bool:
            nonlocal left
            length = len(entry[0].encode())
            left -= fixed + length + -length % 8
            return bool(left >= 0)

        shown = list(takewhile(fits, operations.readdir(request.node, handle, offset, wait=wait)))
        found: list[Attributes] = []
        if plus:
            names = [name for name, *_ in shown]
            found = operations.enter(request.node, handle, names, self._counted_once(request))
        for index, (name, is_dir, following) in enumerate(shown):
            kind = wire.DT_DIR if is_dir else wire.DT_REG
            ino = UNKNOWN_INO
            if plus:
                # Without a node the kernel is told the name, and looks it up by itself (fs/fuse/readdir.c).
                parts.append(_entry(found[index]) if found else wire.entry_out(0, 0, bytes(wire.ATTR.size)))
                ino = found[index].ino if found else UNKNOWN_INO
            parts.append(wire.dirent(ino, following, kind, name.encode()))
        self._check_room()
        return [b"".join(parts)]

    def _releasedir(self, request: Request, view: memoryview, wait: bool) -> bytes:
        handle, *_ = wire.RELEASE_IN.unpack_from(view, request.body)
        self._operations.releasedir(handle)
        return b""


def _number(request: Request) -> int:
    """The number of a request, also of one that is sent again."""
    return request.unique & ~wire.UNIQUE_RESEND


def _notify(notifier: Notifier, messages: list[bytes]) -> None:
    try:
        notifier.write(messages)
    except OSError as error:
        # ENOENT: the kernel does not hold that name.
        log.debug("notification: %s", error)


def _entry(found: Attributes) -> bytes:
    return wire.entry_out(found.node, found.ttl, _attr(found))


def _attr(found: Attributes) -> bytes:
    return wire.attr(ino=found.ino, mode=found.mode, size=found.size, mtime=found.mtime, uid=found.uid, gid=found.gid)


def _sized(value: bytes, size: int) -> bytes:
    """The two-step protocol of xattr calls: size 0 asks how long the value is."""
    if not size:
        return wire.GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise _RangeError("the buffer is too small for the attribute")
    return value


class _RangeError(ObsfsError):
    errno = errno.ERANGE
