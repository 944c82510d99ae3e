"""``obs://`` for fsspec, and so for pandas, pyarrow, datasets and the rest.

Names, sizes, listings and writes are s3fs's. Contents are read through the same block cache and the same engine as
the mount: what one of them has fetched, the other finds.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import get_loop
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.spec import AbstractBufferedFile
from s3fs import S3FileSystem

from obsfs.blocks.reader import Engine, Reader
from obsfs.errors import ObsfsError
from obsfs.remote.address import Address
from obsfs.remote.client import Bucket, connect
from obsfs.remote.credentials import Keys
from obsfs.remote.objects import ObjectVersion, tag
from obsfs.settings import Settings, knobs

_T = TypeVar("_T")

_BUFFER = 128 << 10
_COPY = 8 << 20
_WAITING = 256
"""Requests, and reads, that may wait for the bucket at a time: objects that do not answer hold up no others. The
defaults of botocore and asyncio are 10 and a few."""
_living: weakref.WeakValueDictionary[int, OBSFileSystem | OBSFile] = weakref.WeakValueDictionary()
"""By their id(), as file systems with the same options are equal."""


def _after_fork() -> None:
    """In a forked child: no thread of the parent's is here, and any lock of its engines may be held for ever."""
    for one in list(_living.values()):
        one.after_fork()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _as_oserror() -> Iterator[None]:
    """fsspec's callers expect OSError and its kin (FileNotFoundError, PermissionError)."""
    try:
        yield
    except ObsfsError as error:
        raise OSError(error.errno, str(error)) from None


class OBSFileSystem(S3FileSystem):
    """An S3 file system whose contents are read through obsfs's block cache.

    Takes s3fs's arguments (``key``, ``secret``, ``token``, ``anon``, ``endpoint_url``, ``profile``, ``client_kwargs``)
    and the fields of :class:`~obsfs.settings.Settings` (``region``, ``cache_dir``, ``cache_size``, ``connections``).
    Raises UsageError when they do not fit.

    In a forked child (a DataLoader's worker) it begins anew, with an engine and connections of its own.
    """

    protocol = ("obs",)

    def __init__(self, **options: Any) -> None:
        client_kwargs = dict(options.pop("client_kwargs", None) or {})
        given = {name: options.pop(name) for name in list(options) if name in knobs()}
        given.setdefault("endpoint_url", client_kwargs.pop("endpoint_url", None))
        given.setdefault("region", client_kwargs.pop("region_name", None))
        given["no_sign_request"] = given.get("no_sign_request") or options.pop("anon", None)
        self.settings = Settings.load(**given)
        key, secret, token = (options.pop(name, None) for name in ("key", "secret", "token"))
        self._keys = Keys(key, secret, token) if key and secret else None
        connection = connect(self.settings, keys=self._keys)
        keys = connection.keys
        config = {name: value for name, value in connection.config.items() if name != "signature_version"}
        options.setdefault("listings_expiry_time", self.settings.metadata_ttl)
        if self.settings.profile:
            options["profile"] = self.settings.profile
        self._engine_guard = threading.Lock()
        self._engine: Engine | None = None
        self._threads = ThreadPoolExecutor(_WAITING, thread_name_prefix="obsfs-read")
        self._is_forked = False
        super().__init__(
            anon=self.settings.no_sign_request,
            endpoint_url=connection.endpoint,
            key=keys.access_key if keys else None,
            secret=keys.secret_key if keys else None,
            token=keys.token if keys else None,
            client_kwargs={
                "region_name": connection.region,
                **({"verify": False} if self.settings.insecure_tls else {}),
                **client_kwargs,
            },
            config_kwargs={
                "max_pool_connections": _WAITING,
                **config,
                **(options.pop("config_kwargs", None) or {}),
            },
            **options,
        )
        _living[id(self)] = self

    @property
    def engine(self) -> Engine:
        """The engine of this process; made when first needed."""
        with self._engine_guard:
            if self._engine is None:
                bucket = Bucket(Address("obs", ""), self.settings, keys=self._keys)
                self._engine = Engine(bucket, self.settings)
            return self._engine

    def after_fork(self) -> None:
        """In a forked child: have the next use begin anew. Takes no lock."""
        engine, self._engine = self._engine, None
        self._engine_guard = threading.Lock()
        self._threads = ThreadPoolExecutor(_WAITING, thread_name_prefix="obsfs-read")
        self._is_forked = True
        if engine is not None:
            engine.abandon()

    def _begin_anew(self) -> None:
        """After a fork: forget the parent's event loop, sessions and listings."""
        guard = self._engine_guard
        with guard:
            if self._is_forked:
                engine = self._engine
                fresh = type(self)(*self.storage_args, skip_instance_cache=True, **self.storage_options)
                self.__dict__.update(fresh.__dict__)
                self._engine_guard, self._engine = guard, engine

    @property
    def loop(self) -> Any:
        """The event loop that requests are made in."""
        if self._is_forked:
            self._begin_anew()
        return super().loop

    async def set_session(self, refresh: bool = False, kwargs: Any = None) -> Any:
        """As s3fs's, which every request begins with."""
        if self._is_forked:
            self._begin_anew()
        return await super().set_session(refresh=refresh, kwargs=kwargs or {})

    def _version(self, path: str, info: dict[str, Any]) -> ObjectVersion:
        bucket, key, _ = self.split_path(path)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        when = info.get("LastModified")
        modified = when.timestamp() if isinstance(when, datetime) else 0.0
        etag = tag(info.get("ETag"), modified)
        return ObjectVersion(self.endpoint_url, bucket, key, etag, info["size"], modified=modified)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode != "rb" or options.get("version_id") or self.split_path(path)[2]:
            return super()._open(path, mode=mode, block_size=block_size, **options)
        return OBSFile(self, path, block_size=block_size or _BUFFER)

    async def _cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        if version_id or self.split_path(path)[2]:
            data: bytes = await super()._cat_file(path, version_id=version_id, start=start, end=end, **options)
            return data
        version = self._version(path, await self._info(path))
        first, last, _ = slice(start, end).indices(version.size)
        return await self._in_thread(self._read, version, first, last)

    async def _in_thread(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Run what waits for blocks in a thread, of which there are enough for some to wait for long."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *arguments))

    def _read(self, version: ObjectVersion, start: int, stop: int) -> bytes:
        with _as_oserror(), self._reader(version) as reader:
            return reader.read(start, max(0, stop - start))

    @contextmanager
    def _reader(self, version: ObjectVersion) -> Iterator[Reader]:
        engine = self.engine
        reader = engine.open(version)
        try:
            yield reader
        finally:
            engine.release(reader)

    async def _get_file(
        self, rpath: str, lpath: str, callback: Any = DEFAULT_CALLBACK, version_id: str | None = None, **options: Any
    ) -> None:
        if version_id or self.split_path(rpath)[2]:
            await super()._get_file(rpath, lpath, callback=callback, version_id=version_id, **options)
            return
        if Path(lpath).is_dir():
            return
        info = await self._info(rpath)
        if info["type"] == "directory":
            Path(lpath).mkdir(parents=True, exist_ok=True)
            return
        await self._in_thread(self._copy, self._version(rpath, info), Path(lpath), callback)

    def _copy(self, version: ObjectVersion, target: Path, callback: Any) -> None:
        callback.set_size(version.size)
        with _as_oserror(), self._reader(version) as reader, target.open("wb") as file:
            for start in range(0, version.size, _COPY):
                data = reader.read(start, _COPY)
                file.write(data)
                callback.relative_update(len(data))


class OBSFile(AbstractBufferedFile):
    """An object open for reading, pinned to the version (ETag) it had when it was opened.

    Reads raise OSError with ESTALE when the object was replaced and the bytes are not in the cache. A forked child may
    read on with an engine of its own, and so may who unpickles it: the same version, from the same place on.
    """

    cache: Any

    def __init__(
        self, fs: OBSFileSystem, path: str, *, block_size: int, version: ObjectVersion | None = None, position: int = 0
    ) -> None:
        self._release: Any = None
        info = None
        if version is None:
            info = fs.info(path)
            version = fs._version(path, info)
        super().__init__(fs, path, mode="rb", block_size=block_size, cache_type="readahead", size=version.size)
        if info is not None:
            self.details = info
        self.loc = position
        self._version = version
        self._guard = threading.Lock()
        self._reader: Reader | None = None
        self._hold()
        _living[id(self)] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.fs, self.path, self.blocksize, self._version, self.loc)

    def _hold(self) -> Reader:
        with self._guard:
            if self._reader is None:
                engine = self.fs.engine
                with _as_oserror():
                    self._reader = engine.open(self._version)
                self._release = partial(engine.release, self._reader)
            return self._reader

    def after_fork(self) -> None:
        """In a forked child: forget the parent's reader, and a buffer that it was perhaps just changing."""
        self._guard = threading.Lock()
        self._reader = self._release = None
        self.cache = type(self.cache)(self.blocksize, self._fetch_range, self.size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        with _as_oserror():
            return self._hold().read(start, end - start)

    def close(self) -> None:
        """Give the reader back."""
        super().close()
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        # Garbage is collected in any thread, at any point: also in one that holds a lock which giving back takes.
        release, self._release = self._release, None
        if release is not None:
            with suppress(RuntimeError):  # Python is about to end
                get_loop().call_soon_threadsafe(release)


def _reopen(fs: OBSFileSystem, path: str, block_size: int, version: ObjectVersion, position: int) -> OBSFile:
    return OBSFile(fs, path, block_size=block_size, version=version, position=position)
