"""Whether a server copies objects correctly, so that files of another version need not be sent again.

A copy counts as correct if its ETag is the MD5 that it must have. Where ETags are not MD5s, it counts as correct if the
server refuses to copy a version that does not exist: then it does look at the version that it is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from obsfs.errors import NotFoundError, ObsfsError, UsageError, VersionChangedError
from obsfs.library.transfer import WorkerPool
from obsfs.library.upload import FileUpload, digest_kind
from obsfs.store.base import ObjectStore
from obsfs.store.types import ObjectVersion, PutResult

_NO_ETAG = '"00000000000000000000000000000000"'
"""An ETag that no object has."""
_PROBE_PART = 10_000
"""The greatest number of a part (S3). Only an upload of the largest size uses it, and that one is not probed."""
_T = TypeVar("_T")

log = logging.getLogger(__name__)


class ServerCopy:
    """Copies inside the server. The caller makes one call of :meth:`is_correct` and its kin at a time."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._checks_parts: bool | None = None
        self._checks_objects: bool | None = None

    def copy_part(self, pool: WorkerPool, item: FileUpload, number: int, span: range) -> str:
        """Copy bytes of the original as part `number` (from 1). Return its ETag, or "" if the server does not copy.

        Raises:
            UsageError: The original was replaced.
            NotFoundError: The upload is gone.
        """
        original = self._original(item)
        with _unreplaced(original):
            etag = _unless_refused(
                lambda: pool.retried(
                    lambda: self._store.upload_part_copy(item.key, item.upload, number, original, span),
                )
            )
        return etag or ""

    def copy(self, pool: WorkerPool, item: FileUpload) -> PutResult | None:
        """Copy a whole object. Return None if the server does not copy. Raises UsageError as :meth:`copy_part`."""
        original = self._original(item)
        with _unreplaced(original):
            return _unless_refused(lambda: pool.retried(lambda: self._store.copy(original, item.key)))

    def is_correct_part(self, pool: WorkerPool, item: FileUpload, etag: str, md5: str) -> bool:
        """Return whether a part is a copy of the right bytes, by its ETag and the MD5 (hex) of what it should be."""

        def checks_parts() -> bool:
            if self._checks_parts is None:
                wrong = replace(self._original(item), etag=_NO_ETAG)
                call = partial(self._store.upload_part_copy, item.key, item.upload, _PROBE_PART, wrong, range(1))
                self._checks_parts = _is_refused(pool, call)
            return self._checks_parts

        return _is_correct(item, etag, md5, checks_parts)

    def is_correct_object(self, pool: WorkerPool, item: FileUpload, etag: str, md5: str) -> bool:
        """Return the same of a whole object. A wrong one that is there then is overwritten by what is sent."""

        def checks_objects() -> bool:
            if self._checks_objects is None:
                wrong = replace(self._original(item), etag=_NO_ETAG)
                self._checks_objects = _is_refused(pool, partial(self._store.copy, wrong, item.key))
            return self._checks_objects

        return _is_correct(item, etag, md5, checks_objects)

    def _original(self, item: FileUpload) -> ObjectVersion:
        return item.original(self._store.endpoint)


def _is_correct(item: FileUpload, etag: str, md5: str, checks_versions: Callable[[], bool]) -> bool:
    if etag.strip('"') == md5:
        return True
    return bool(etag) and not (item.has_md5_etag and digest_kind(etag) == "md5") and checks_versions()


@contextmanager
def _unreplaced(version: ObjectVersion) -> Iterator[None]:
    try:
        yield
    except VersionChangedError:
        raise UsageError(f"{version.key} was replaced just now", "push again") from None


def _unless_refused(call: Callable[[], _T]) -> _T | None:
    """Return what `call` returns, or None if the server does not do it: the file can still be sent."""
    try:
        return call()
    except (VersionChangedError, NotFoundError):
        raise
    except ObsfsError as error:
        log.info("the server does not copy: %s", error)
        return None


def _is_refused(pool: WorkerPool, call: Callable[[], object]) -> bool:
    """Return whether the server refuses a copy since the version is another one."""
    try:
        pool.retried(call)
    except VersionChangedError:
        return True
    except ObsfsError:
        return False
    return False
