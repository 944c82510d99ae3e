"""``obs://`` for fsspec, and so for pandas, pyarrow, datasets and the rest.

Names, sizes, listings and writes are s3fs's. Contents are read through the same block cache and the same engine as
the mount: what one of them has fetched, the other finds.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiobotocore.session import AioSession
from botocore.exceptions import ClientError
from fsspec.asyn import get_loop, sync_wrapper
from fsspec.caching import AllBytes
from fsspec.callbacks import DEFAULT_CALLBACK
from s3fs import S3FileSystem
from s3fs.core import S3File
from s3fs.utils import FileExpired

from obsfs.access.loaders import LoadTracker
from obsfs.errors import ObsfsError, UsageError, VersionChangedError
from obsfs.fetch.engine import Engine
from obsfs.fetch.reader import Reader
from obsfs.settings import Settings, is_setting, keywords, knobs
from obsfs.store import open_store
from obsfs.store.address import Address
from obsfs.store.aio import Connection, is_expired
from obsfs.store.credentials import Keys
from obsfs.store.types import ObjectVersion, version_tag
from obsfs.suggestions import did_you_mean

_T = TypeVar("_T")

_BUFFER = 128 << 10
"""Bytes that an open file reads ahead by itself; the engine behind it reads further ahead."""
_RENEW_SECONDS = 1.0
_TO_FSSPEC = ("use_listings_cache", "listings_expiry_time", "max_paths")
"""Options that s3fs hands to fsspec."""
_DEFAULT_REGION = "us-east-1"
"""The region for which Amazon refuses a LocationConstraint:
https://docs.aws.amazon.com/AmazonS3/latest/API/API_CreateBucket.html."""
_COPY = 8 << 20
_WAITING = 256
"""Requests, and reads, that may wait for the bucket at a time: objects that do not answer hold up no others. The
defaults of botocore and asyncio are 10 and a few."""
_Pins = dict[str, asyncio.Future[ObjectVersion]]
_living: weakref.WeakValueDictionary[int, OBSFileSystem | OBSFile] = weakref.WeakValueDictionary()
"""By their id(), as file systems with the same options are equal."""


def _after_fork() -> None:
    """In a forked child: no thread of the parent's is here, and any lock of its engines may be held for ever."""
    for one in list(_living.values()):
        one.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class StaleFileError(FileExpired):
    """The object was replaced after it was opened: s3fs's error for that, with the mount's errno (ESTALE)."""

    def __init__(self, error: VersionChangedError) -> None:
        OSError.__init__(self, error.errno, str(error))


@contextmanager
def _as_oserror() -> Iterator[None]:
    """fsspec's callers expect OSError and its kin (FileNotFoundError, PermissionError)."""
    try:
        yield
    except VersionChangedError as error:
        raise StaleFileError(error) from None
    except ObsfsError as error:
        raise OSError(error.errno, str(error)) from None


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise UsageError for an option that neither s3fs, nor fsspec, nor a session of aiobotocore takes."""
    takers = S3FileSystem.__init__, AioSession.__init__
    taken = {*(name for taker in takers for name in inspect.signature(taker).parameters), *_TO_FSSPEC}
    for name in options:
        if name not in taken - {"self", "kwargs"}:
            hint = did_you_mean(name, [*taken, *knobs()]) or "see the arguments of s3fs.S3FileSystem and obsfs.Settings"
            raise UsageError(f"OBSFileSystem has no option {name!r}", hint)


class _KeyGivenTwiceError(UsageError, KeyError):
    """A key is given by two names, with two values: s3fs raises a KeyError for some of these."""


def _keys_of(options: dict[str, Any], client_kwargs: dict[str, Any]) -> Keys | None:
    """Take the keys from where s3fs takes them. Raises UsageError for half a pair, and for two values of one key."""
    names = (
        ("key", "username", "aws_access_key_id"),
        ("secret", "password", "aws_secret_access_key"),
        ("token", "aws_session_token"),
    )
    found: list[str | None] = []
    for meanings in names:
        given = {place.pop(name, None) for name in meanings for place in (options, client_kwargs)} - {None, ""}
        if len(given) > 1:
            raise _KeyGivenTwiceError(f"{meanings[0]} is given twice, with two values", "give it once")
        found.append(next(iter(given), None))
    key, secret, token = found
    if bool(key) != bool(secret):
        raise UsageError(f"{'secret' if key else 'key'} is not given", "key and secret go together")
    return Keys(key, secret, token) if key and secret else None


class OBSFileSystem(S3FileSystem):
    """An S3 file system whose contents are read through obsfs's block cache.

    Takes s3fs's arguments (``key``, ``secret``, ``token``, ``anon``, ``endpoint_url``, ``profile``, ``client_kwargs``)
    and the fields of :class:`~obsfs.settings.Settings` (``region``, ``cache_dir``, ``cache_size``, ``connections``).
    What the block cache cannot do (requester pays, objects encrypted with a key of the client's), s3fs reads.

    In a forked child (a DataLoader's worker) it starts again, with an engine and connections of its own.

    Raises:
        UsageError: An option is unknown, or does not fit.
    """

    protocol = ("obs", "s3", "s3a")
    """The first is ours; paths of the others name the same objects, as on the command line."""

    def __init__(self, **options: Any) -> None:
        client_kwargs = dict(options.pop("client_kwargs", None) or {})
        given = {name: options.pop(name) for name in list(options) if is_setting(name)}
        _check_options(options)
        given.setdefault("endpoint_url", client_kwargs.pop("endpoint_url", None))
        given.setdefault("region", client_kwargs.pop("region_name", None))
        given["no_sign_request"] = given.get("no_sign_request") or options.pop("anon", None)
        self.settings = Settings.load(**keywords(given))
        self._keys = _keys_of(options, client_kwargs)
        connection = Connection(self.settings, self._keys)
        keys = connection.keys
        options.setdefault("listings_expiry_time", self.settings.metadata_ttl)
        if self.settings.profile:
            options["profile"] = self.settings.profile
        self._region = connection.region
        self._connection = connection
        self._is_own_session = options.get("session") is None
        self._renewed = float("-inf")
        self._read_size: int = options.get("default_block_size") or _BUFFER
        self._engine_guard = threading.Lock()
        self._engine: Engine | None = None
        self._threads = ThreadPoolExecutor(_WAITING, thread_name_prefix="obsfs-read")
        self._loads = LoadTracker(lambda: 0, time.monotonic)
        self._is_forked = False
        super().__init__(
            anon=self.settings.no_sign_request,
            endpoint_url=connection.endpoint,
            key=keys.access_key if keys else None,
            secret=keys.secret_key if keys else None,
            token=keys.token if keys else None,
            client_kwargs={**({"verify": False} if self.settings.insecure_tls else {}), **client_kwargs},
            config_kwargs={
                "max_pool_connections": _WAITING,
                # Not in client_kwargs: s3fs would send the region as the place of every new bucket, also where it is
                # refused.
                **connection.client_options,
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
                store = open_store(Address("obs", ""), self.settings, keys=self._keys)
                self._engine = Engine(store, self.settings)
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
        """Connect, as s3fs does; with `refresh`, with the credentials that there are now."""
        if self._is_forked:
            self._begin_anew()
        if self._is_own_session and not self.anon:
            # s3fs would look for credentials by itself, for many seconds, and keep those that it was made with.
            if self._keys is None and (refresh or not self._connection.has_credentials):
                await asyncio.to_thread(self._find_keys)
            if refresh or self.session is None:
                self.session: AioSession | None = self._connection.new_session(self.kwargs)
        client = await super().set_session(refresh=refresh)
        self._connection.adapt(client)
        return client

    def _find_keys(self) -> None:
        """Sign with the credentials that there are now. Raises PermissionError if there are none."""
        with _as_oserror():
            connection = Connection(self.settings)
            connection.require_credentials()
        keys, self._connection = connection.keys, connection
        self.key = keys.access_key if keys else None
        self.secret = keys.secret_key if keys else None
        self.token = keys.token if keys else None

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await super()._call_s3(method, *arguments, **options)
        except (OSError, ClientError) as error:
            if self._keys is not None or self.anon or not is_expired(error):
                raise
        if time.monotonic() - self._renewed >= _RENEW_SECONDS:
            self._renewed = time.monotonic()
            await self.set_session(refresh=True)
        return await super()._call_s3(method, *arguments, **options)

    call_s3 = sync_wrapper(_call_s3)

    async def _mkdir(self, path: str, acl: Any = False, create_parents: bool = True, **options: Any) -> None:
        region = options.pop("region_name", None) or self._region
        if region != _DEFAULT_REGION:
            options["region_name"] = region
        await super()._mkdir(path, acl=acl, create_parents=create_parents, **options)

    mkdir = sync_wrapper(_mkdir)

    def expect_load(self, path: str, version: ObjectVersion) -> None:
        """Fetch what a loader that has opened a file opens next, of the files that a listing remembers."""
        directory, _, name = path.rpartition("/")
        self._loads.on_open(directory, name)
        listed = [entry for entry in self.dircache.get(directory) or () if entry["type"] == "file"]
        hints = self._loads.hints(
            directory, name, lambda: ((entry["name"].rpartition("/")[2], entry["size"]) for entry in listed)
        )
        if hints.starts or hints.shards:
            versions = {entry["name"]: partial(self._version, entry["name"], entry) for entry in listed}
            engine = self.engine
            if hints.starts:
                engine.fetch_starts([version, *(versions[f"{directory}/{other}"]() for other in hints.starts)])
            if hints.shards:
                engine.begin_load(versions[f"{directory}/{shard}"]() for shard in hints.shards)

    def _version(self, path: str, info: dict[str, Any]) -> ObjectVersion:
        bucket, key, _ = self.split_path(path)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        when = info.get("LastModified")
        modified = when.timestamp() if isinstance(when, datetime) else 0.0
        etag = version_tag(info.get("ETag"), modified)
        return ObjectVersion(self.endpoint_url, bucket, key, etag, info["size"], modified=modified)

    def _is_beyond_cache(self, path: str, version_id: str | None = None, **options: Any) -> bool:
        """Whether s3fs has to read this: an older version, a key that ends in ``/``, which stat and listings take for
        a directory, or with what the engine's requests do not carry."""
        _, key, path_version = self.split_path(path)
        return bool(
            version_id
            or self.version_aware
            or path_version
            or key.endswith("/")
            or self.requester_pays
            or options.get("requester_pays")
            or any(name.startswith("SSECustomer") for name in (*self.s3_additional_kwargs, *options))
        )

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, cache_type: str | None = None, **options: Any
    ) -> Any:
        if mode != "rb" or self._is_beyond_cache(path, **options):
            return super()._open(path, mode=mode, block_size=block_size, cache_type=cache_type, **options)
        taken = ("fill_cache", "size", "cache_options")
        chosen = {name: options[name] for name in taken if options.get(name) is not None}
        return OBSFile(
            self,
            path,
            block_size=block_size or self._read_size,
            cache_type=cache_type or self.default_cache_type,
            **{"fill_cache": self.default_fill_cache, **chosen},
        )

    async def _cat_file(
        self,
        path: str,
        version_id: str | None = None,
        start: int | None = None,
        end: int | None = None,
        *,
        pins: _Pins | None = None,
        **options: Any,
    ) -> bytes:
        if self._is_beyond_cache(path, version_id, **options):
            data: bytes = await super()._cat_file(path, version_id=version_id, start=start, end=end, **options)
            return data

        async def read(version: ObjectVersion) -> bytes:
            first, last, _ = slice(start, end).indices(version.size)
            return await self._in_thread(self._read, version, first, last)

        if pins is None:
            return await self._read_newest(path, read)
        if path not in pins:
            pins[path] = asyncio.ensure_future(self._current(path))
        return await read(await pins[path])

    async def _cat_ranges(self, paths: list[str], *arguments: Any, **options: Any) -> Any:
        # All ranges of a file are of one version, as somebody puts them together.
        return await super()._cat_ranges(paths, *arguments, pins={}, **options)

    async def _current(self, path: str) -> ObjectVersion:
        """The version of an object that a listing remembers, or the one that is there now."""
        return self._version(path, await self._info(path))

    async def _read_newest(self, path: str, read: Callable[[ObjectVersion], Awaitable[_T]]) -> _T:
        """What `read` makes of an object, as a whole: of what is there now, if a listing remembers what is gone."""
        try:
            return await read(await self._current(path))
        except StaleFileError:
            self.invalidate_cache(path)
            return await read(await self._current(path))

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
        if self._is_beyond_cache(rpath, version_id, **options):
            await super()._get_file(rpath, lpath, callback=callback, version_id=version_id, **options)
            return
        if Path(lpath).is_dir():
            return
        info = await self._info(rpath)
        if info["type"] == "directory":
            Path(lpath).mkdir(parents=True, exist_ok=True)
            return
        await self._read_newest(rpath, lambda version: self._in_thread(self._download, version, Path(lpath), callback))

    def _download(self, version: ObjectVersion, target: Path, callback: Any) -> None:
        callback.set_size(version.size)
        callback.absolute_update(0)
        with _as_oserror(), self._reader(version) as reader, target.open("wb") as file:
            for start in range(0, version.size, _COPY):
                data = reader.read(start, _COPY)
                file.write(data)
                callback.relative_update(len(data))


class OBSFile(S3File):
    """An object open for reading, pinned to the version (ETag) it had when it was opened.

    Reads raise OSError with ESTALE when the object was replaced and the bytes are not in the cache. A forked child may
    read on with an engine of its own, and so may who unpickles it: the same version, from the same place on.
    """

    cache: Any

    def __init__(
        self,
        fs: OBSFileSystem,
        path: str,
        *,
        version: ObjectVersion | None = None,
        position: int = 0,
        size: int | None = None,
        **options: Any,
    ) -> None:
        self._release: Any = None
        self._options = options
        self._version = version
        self._guard = threading.Lock()
        self._reader: Reader | None = None
        # Some caches begin to read here.
        super().__init__(fs, path, "rb", size=version.size if version and size is None else size, **options)
        self.loc = position
        self._hold()
        _living[id(self)] = self

    def __reduce__(self) -> tuple[Any, ...]:
        again = partial(OBSFile, version=self._version, position=self.loc, size=self.size, **self._options)
        return again, (self.fs, self.path)

    def _hold(self) -> Reader:
        with self._guard:
            if self._reader is None:
                engine = self.fs.engine
                self._version = self._version or self.fs._version(self.path, self.details)
                with _as_oserror():
                    self._reader = engine.open(self._version)
                self._release = partial(engine.release, self._reader)
                # In another thread: that opens the cache files of others.
                engine.background.run_in_background(partial(self.fs.expect_load, self.path, self._version))
            return self._reader

    def after_fork(self) -> None:
        """In a forked child: forget the parent's reader, and a buffer that it was perhaps just changing."""
        self._guard = threading.Lock()
        self._reader = self._release = None
        if not isinstance(self.cache, AllBytes):  # which has the whole file, never changes, and would read here
            options = self._options.get("cache_options") or {}
            self.cache = type(self.cache)(self.blocksize, self._fetch_range, self.size, **options)

    def _fetch_range(self, start: int, end: int) -> bytes:
        try:
            with _as_oserror():
                return self._hold().read(start, end - start)
        except StaleFileError:
            self.fs.invalidate_cache(self.path)  # so that who opens it again gets what is there now
            raise

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
