"""What the operations mean to a front end, without a kernel: passthrough, and requests that come again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from obsfs.errors import ObsfsError, VersionChangedError
from obsfs.fetch.engine import Engine
from obsfs.settings import Settings
from obsfs.store.address import Address
from obsfs.store.s3.store import S3Store
from obsfs.vfs.frontend import FrontEnd
from obsfs.vfs.handles import BadHandleError, Mode
from obsfs.vfs.operations import ROOT, Operations
from obsfs.vfs.tree import Tree
from tests.conftest import Store, random_bytes

_SIZE = 100_000


class Kernel(FrontEnd):
    """Takes cache files, unless it is told not to, and notes which."""

    def __init__(self) -> None:
        self.refuses = False
        self.backings: dict[int, str] = {}
        self.locks: set[int] = set()
        self.told: list[tuple[int, str]] = []

    def open_backing(self, fd: int) -> int:
        if self.refuses:
            raise OSError(errno.EPERM, "not here")
        backing = max(self.backings, default=0) + 1
        self.backings[backing] = str(Path(f"/proc/self/fd/{fd}").readlink())
        return backing

    def close_backing(self, backing: int) -> None:
        del self.backings[backing]

    def keep_lock(self, node: int, fd: int) -> None:
        os.fstat(fd)
        self.locks.add(node)

    def drop_lock(self, node: int) -> None:
        self.locks.remove(node)


class Served(NamedTuple):
    operations: Operations
    tree: Tree
    kernel: Kernel
    node: int


@pytest.fixture
def records() -> list[list[object]]:
    return []


@pytest.fixture
def engine(bucket: Store, tmp_path: Path) -> Iterator[Engine]:
    bucket.put("file", random_bytes(_SIZE))
    settings = Settings.load(cache_dir=tmp_path / "cache", endpoint_url=bucket.server.endpoint)
    engine = Engine(S3Store(Address("obs", bucket.name), settings), settings)
    yield engine
    engine.close()


def serve(engine: Engine, bucket: Store, records: list[list[object]], *, take_over: bool = False) -> Served:
    settings = Settings.load(endpoint_url=bucket.server.endpoint)
    source = S3Store(Address("obs", bucket.name), settings)
    tree = Tree(source, "", 60, lambda *changes: records.extend(changes))
    if take_over:
        assert tree.restore(list(records)) == 0
    operations, kernel = Operations(tree, engine, settings, {}), Kernel()
    operations.attach(kernel)
    assert operations.try_passthrough()
    assert not kernel.backings
    if take_over:
        operations.inherit()
        (file,) = tree.handles.files()
        return Served(operations, tree, kernel, file.node)
    return Served(operations, tree, kernel, operations.lookup(ROOT, "file").node)


def read_whole(served: Served) -> None:
    """Have the file complete in the cache, and looked up again."""
    handle = served.operations.open(served.node, os.O_RDONLY).handle
    assert len(served.operations.reader(handle).read(0, _SIZE)) == _SIZE
    served.operations.release(handle)


def test_a_whole_file_is_registered_once_for_all_who_open_it(
    engine: Engine, bucket: Store, records: list[list[object]]
) -> None:
    served = serve(engine, bucket, records)
    assert served.operations.open(served.node, os.O_RDONLY).backing == 0, "it is not in the cache yet"
    served.operations.release(served.tree.handles.handle_of(served.node, Mode.BUFFERED))
    read_whole(served)
    first, second = (served.operations.open(served.node, os.O_RDONLY) for _ in range(2))
    assert first == second
    assert set(served.kernel.backings) == {first.backing}
    assert served.kernel.backings[first.backing].endswith(".data")
    assert served.kernel.locks == {served.node}
    served.operations.release(first.handle)
    assert set(served.kernel.backings) == {first.backing}
    served.operations.release(second.handle)
    assert (served.kernel.backings, served.kernel.locks) == ({}, set())
    with pytest.raises(BadHandleError):
        served.operations.release(second.handle)


def test_what_the_kernel_does_not_take_is_read_through_us(
    engine: Engine, bucket: Store, records: list[list[object]], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(engine, bucket, records)
    read_whole(served)
    served.kernel.refuses = True
    opened = served.operations.open(served.node, os.O_RDONLY, 2)
    assert (opened.backing, served.kernel.backings) == (0, {})
    assert "passthrough failed: not here" in caplog.text
    assert len(served.operations.reader(opened.handle).read(0, _SIZE)) == _SIZE
    served.kernel.refuses = False
    assert served.operations.open(served.node, os.O_RDONLY, 4).backing == 0, "an inode is in one mode at a time"
    served.operations.release(opened.handle)
    served.operations.release(opened.handle)
    assert served.operations.open(served.node, os.O_RDONLY, 6).backing > 0


@pytest.mark.parametrize("is_whole", [False, True])
def test_an_open_that_comes_again_to_a_successor_counts_once(
    engine: Engine, bucket: Store, records: list[list[object]], is_whole: bool
) -> None:
    served = serve(engine, bucket, records)
    if is_whole:
        read_whole(served)
    opened = served.operations.open(served.node, os.O_RDONLY, 8)
    assert (opened.backing > 0) is is_whole
    successor = serve(engine, bucket, records, take_over=True)
    assert successor.node == served.node
    again = successor.operations.open(successor.node, os.O_RDONLY, 8)
    assert again == opened
    (file,) = successor.tree.handles.files()
    assert file.handle_count == 1
    # The release, which comes again to the next one, too.
    successor.kernel.backings = dict.fromkeys([opened.backing] if is_whole else [], "")
    successor.kernel.locks = {successor.node} if is_whole else set()
    successor.operations.release(opened.handle, 10)
    assert not successor.tree.handles.files()
    assert not successor.kernel.backings
    successor.operations.release(opened.handle, 10)


def test_an_open_of_which_the_kernel_was_not_told_the_backing_gets_one(
    engine: Engine, bucket: Store, records: list[list[object]]
) -> None:
    """The predecessor died between counting it and registering the file."""
    served = serve(engine, bucket, records)
    read_whole(served)
    opened = served.operations.open(served.node, os.O_RDONLY, 8)
    records[:] = [record for record in records if record[0] != "backing"]
    successor = serve(engine, bucket, records, take_over=True)
    again = successor.operations.open(successor.node, os.O_RDONLY, 8)
    assert again.handle == opened.handle
    assert set(successor.kernel.backings) == {again.backing}
    successor.operations.release(again.handle, 10)
    assert not successor.kernel.backings


def test_handles_and_nodes_that_nobody_knows(engine: Engine, bucket: Store, records: list[list[object]]) -> None:
    served = serve(engine, bucket, records)
    opened = served.operations.open(served.node, os.O_RDONLY)
    served.operations.release(opened.handle)
    with pytest.raises(BadHandleError):
        served.operations.reader(opened.handle)
    with pytest.raises(VersionChangedError):  # ESTALE: a successor did not hear of it
        served.operations.reader(999 << 1)
    for flags, number in ((os.O_WRONLY, errno.EROFS), (os.O_RDWR, errno.EROFS)):
        with pytest.raises(ObsfsError) as caught:
            served.operations.open(served.node, flags)
        assert caught.value.errno == number
    with pytest.raises(ObsfsError) as caught:
        served.operations.open(ROOT, os.O_RDONLY)
    assert caught.value.errno == errno.EISDIR
