"""Publishing a model: its files, from wherever they are, into the bucket, and its manifest last.

Large files are sent in parts of an upload that nobody sees (*staged*), or copied in parts from another version that
has them; small ones wait. When everything is staged, the publisher takes the claim, an object that only one can
create, makes all files appear, writes the manifest and gives the claim back. So a version exists whole or not at all,
and of two who publish the same one, one wins whole.

What a server has copied is believed only if its ETag is the MD5 of what it should be, or if the server was seen to
refuse to copy another version; else the file is sent. What has appeared is looked at before the manifest says so.

What was staged outlives its process: the ids of its uploads are noted on this machine, and the parts that the server
has are compared, by their MD5, with what would be sent. What nobody goes on with any more is dropped when the model is
published.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from obsfs.errors import (
    ExistsError,
    NotFoundError,
    ObsfsError,
    RefusedError,
    UnsupportedError,
    UsageError,
    VersionChangedError,
)
from obsfs.library import catalog
from obsfs.library.catalog import Model
from obsfs.library.manifest import File, Manifest, ModelInfo, now, parse_manifest
from obsfs.library.names import LEASE, ModelName
from obsfs.library.transfer import Advance, OrderedHash, WorkerPool, tasks_for
from obsfs.store.base import ObjectStore
from obsfs.store.parts import COPY_PART, MAX_PUT, PART, part_size, parts_etag
from obsfs.store.types import ObjectInfo, ObjectVersion, Part, PutResult

_NOTES_FORMAT = 1
"""Of what is noted of uploads under way; without a number it is format 0, which is the same."""
_CLAIM_SECONDS = 900.0
_SETTLE_SECONDS = 2.0
_HASHERS = 4
_NOBODYS = '"00000000000000000000000000000000"'
"""An ETag that no object has."""
_PROBE_PART = 10_000
"""The number of a part that is never used: the last one (of an upload of the largest size, which is not probed)."""
_DIGEST = re.compile(r'"[0-9a-f]{32}(-\d+)?"')
_T = TypeVar("_T")

log = logging.getLogger(__name__)


class PublishSource(Protocol):
    """A file to publish. `sha256` is what it is said to have (hex), or empty."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises ObsfsError."""
        ...


@dataclass(frozen=True)
class Details:
    """What a manifest says besides its files."""

    author: str
    source: str
    revision: str
    model: ModelInfo


class UploadResumeState:
    """The uploads that are under way, by their keys, in a file: what a later run goes on with.

    `path` is locked by its owner already. What another version of obsfs has left there in a later format is not gone on
    with: those files are sent anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        try:
            found = json.loads(path.read_bytes() or b"{}")
        except (OSError, ValueError):
            found = {}
        if not isinstance(found, dict) or found.get("format", 0) not in (0, _NOTES_FORMAT):
            found = {}
        uploads, nonce = found.get("uploads"), found.get("nonce")
        known = uploads.items() if isinstance(uploads, dict) else ()
        self.uploads = {key: upload for key, upload in known if isinstance(upload, str)}
        self.nonce = nonce if isinstance(nonce, str) and nonce else secrets.token_hex(8)

    def note(self, key: str, upload: str | None) -> None:
        """An upload has begun; None: it is over."""
        with self._guard:
            if upload is None:
                self.uploads.pop(key, None)
            else:
                self.uploads[key] = upload
            self.save()

    def save(self) -> None:
        """Write it down."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"format": _NOTES_FORMAT, "uploads": self.uploads, "nonce": self.nonce}))
        new.replace(self._path)

    def clear(self) -> None:
        """Nothing is under way any more."""
        self.uploads.clear()
        self._path.unlink(missing_ok=True)


@dataclass
class FileUpload:
    """A file on its way. `done` is set once its object is there; then `etag` and `version_id` are the object's."""

    source: PublishSource
    key: str
    sha256: str = ""
    upload: str = ""
    part: int = PART
    had: dict[int, Part] = field(default_factory=dict)
    etags: dict[int, str] = field(default_factory=dict)
    digest: OrderedHash | None = None
    kept: PutResult | None = None
    copied: tuple[Model, File] | None = None
    copy_md5s: list[str] = field(default_factory=list)
    """What each part (of `part` bytes) that is to be copied must have as its ETag."""
    has_md5_etag: bool = False
    """Whether the ETag of what is to be copied is known to be of MD5s."""
    written: PutResult | None = None

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def size(self) -> int:
        return self.source.size

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Number (from 0), offset and size of each part."""
        for index, offset in enumerate(range(0, self.size, self.part)):
            yield index, offset, min(self.part, self.size - offset)


class Publication:
    """One model being published. `notes` is the file of :class:`UploadResumeState`.

    Raises UsageError and ExistsError for what cannot be published, and what the server says; then nothing is
    published, and what was staged stays for the next try.
    """

    def __init__(
        self,
        store: ObjectStore,
        name: ModelName,
        sources: Sequence[PublishSource],
        details: Details,
        notes: Path,
        *,
        connections: int,
        retry_timeout: float,
        advance: Advance = lambda size: None,
    ) -> None:
        self._store = store
        self._name = name
        self._details = details
        self._notes = UploadResumeState(notes)
        self._connections = connections
        self._retry_timeout = retry_timeout
        self._advance = advance
        self._items = [
            FileUpload(source, f"{name.prefix}{source.path}", part=part_size(source.size)) for source in sources
        ]
        self.sent_bytes = 0
        self._guard = threading.Lock()
        self._parts_refused: bool | None = None
        self._copies_refused: bool | None = None

    def run(self) -> Manifest:
        """Publish. Returns the manifest: the one that is there, if it says the same files already."""
        self._notes.save()
        before, there = self._snapshot_remote()
        if before and self._name.version and not self._may_be(before.manifest):
            self._refuse()
        self._compare(catalog.published_under(self._store, self._name), there)
        if before and self._is_same(before.manifest):
            self._abort()
            return before.manifest
        if before and self._name.version:
            self._refuse()
        try:
            self._stage()
            with PublishLease(self._store, self._name, self._details.author, self._notes.nonce) as claim:
                return self._publish(claim, before, there)
        except ExistsError:
            self._abort()
            raise

    def _pool(self) -> WorkerPool:
        return WorkerPool(self._connections, self._retry_timeout)

    def _refuse(self) -> None:
        self._abort()
        raise ExistsError(
            f"{self._name} is published already, with other files", "a version never changes: choose another"
        )

    def _snapshot_remote(self) -> tuple[Model | None, dict[str, ObjectInfo]]:
        """What is published under the name now, and the objects that are there, by their keys."""
        bucket = self._store
        return catalog.read_model(bucket, self._name), {info.key: info for info in bucket.walk(self._name.prefix)}

    def _may_be(self, manifest: Manifest) -> bool:
        wanted = {(item.path, item.size) for item in self._items}
        return wanted == {(file.path, file.size) for file in manifest.files}

    def _is_same(self, manifest: Manifest) -> bool:
        return self._may_be(manifest) and all(item.kept for item in self._items)

    # what is there already

    def _compare(self, known: Sequence[Model], there: dict[str, ObjectInfo]) -> None:
        """Find out which files need not be sent. Reads those that there is something like, by the size."""
        of_size: dict[int, list[tuple[Model, File]]] = {}
        for model in known:
            for file in model.manifest.files:
                of_size.setdefault(file.size, []).append((model, file))

        def compare(item: FileUpload) -> None:
            found = there.get(item.key)
            candidates = [(model, file) for model, file in of_size.get(item.size, ()) if file.sha256]
            if not candidates and (found is None or found.size != item.size):
                return
            hashes = _hashes(item, pool)
            item.sha256, etag = hashes.sha256, hashes.etag
            if found and found.size == item.size and found.etag.strip('"') == etag:
                item.kept = PutResult(found.etag, "")
            for model, file in candidates:
                if file.sha256 == item.sha256:
                    key = f"{model.name.prefix}{file.path}"
                    if found and key == item.key and self._is_there(pool, found, file):
                        item.kept = PutResult(file.etag, file.version_id)
                    else:
                        item.copied = item.copied or (model, file)
            if item.kept:
                self._advance(item.size)
            elif item.copied:
                item.part, item.copy_md5s = hashes.copy_part, hashes.copy_md5s
                item.has_md5_etag = item.copied[1].etag.strip('"') == etag

        pool = WorkerPool(_HASHERS, self._retry_timeout)
        pool.run(tasks_for(self._items, compare))

    def _is_there(self, pool: WorkerPool, found: ObjectInfo, file: File) -> bool:
        """Whether an object in a listing is the one of a manifest; a server that lists no ETags is asked for it."""
        return found.etag == file.etag or pool.retried(lambda: self._store.head(found.key)).etag == file.etag

    # staging

    def _stage(self) -> None:
        pool = self._pool()
        large = [item for item in self._items if item.size > PART and not item.kept]

        def begin(item: FileUpload) -> None:
            upload = self._notes.uploads.get(item.key, "")
            if upload:
                try:
                    item.had = pool.retried(lambda: self._store.list_parts(item.key, upload))
                except NotFoundError:
                    upload = ""
            if upload:
                item.upload = upload
            else:
                begin_anew(item)

        def begin_anew(item: FileUpload) -> None:
            if item.upload:
                with suppress(ObsfsError):
                    self._store.abort_upload(item.key, item.upload)
            item.upload = pool.retried(lambda: self._store.create_upload(item.key))
            item.had = {}
            self._notes.note(item.key, item.upload)

        try:
            pool.run(tasks_for(large, begin))
        except UnsupportedError:
            # Without uploads in parts: they are sent whole, when all appear.
            for item in large:
                item.upload = ""
                if item.size > MAX_PUT:
                    raise
            return

        def tasks(items: list[FileUpload], bring: Callable[..., None]) -> Iterator[Callable[[], None]]:
            for item in items:
                for index, offset, size in item.pieces():
                    yield partial(bring, pool, item, index, offset, size)

        copied = [item for item in large if item.copied]
        pool.run(tasks(copied, self._copy))
        # Not in the same upload: rclone takes no part twice.
        pool.run(tasks_for([item for item in copied if not item.copied], begin_anew))
        sent = [item for item in large if not item.copied]
        for item in sent:
            item.digest = OrderedHash(pool)
        pool.run(tasks(sent, self._send))
        for item in sent:
            assert item.digest is not None
            self._check(item, item.digest.hexdigest())

    def _send(self, pool: WorkerPool, item: FileUpload, index: int, offset: int, size: int) -> None:
        data = pool.retried(lambda: item.source.read(offset, size))
        assert item.digest is not None
        item.digest.update(index, data)
        had = item.had.get(index + 1)
        if had and had.size == size and had.etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest():
            item.etags[index + 1] = had.etag
        else:
            with self._gone(item):
                etag = pool.retried(lambda: self._store.upload_part(item.key, item.upload, index + 1, data))
            item.etags[index + 1] = etag
            self._count(size)
        self._advance(size)

    def _copy(self, pool: WorkerPool, item: FileUpload, index: int, offset: int, size: int) -> None:
        if not item.copied:
            return  # another part of it could not be copied
        version = self._original(item)
        number, span = index + 1, range(offset, offset + size)
        with _replaced(version), self._gone(item):
            etag = _unless_refused(
                lambda: pool.retried(lambda: self._store.upload_part_copy(item.key, item.upload, number, version, span))
            )
        with self._guard:
            if not item.copied:
                return
            if self._is_copy(item, etag or "", item.copy_md5s[index], partial(self._refuses_parts, pool, item)):
                item.etags[number] = etag or ""
                self._advance(size)
            else:
                self._send_instead(item)

    def _is_copy(self, item: FileUpload, etag: str, md5: str, refuses: Callable[[], bool]) -> bool:
        """Whether what was copied is what it should be: by its MD5, or, where ETags are no MD5, since the server
        `refuses` other versions."""
        if etag.strip('"') == md5:
            return True
        return bool(etag) and not (item.has_md5_etag and _digest_kind(etag) == "md5") and refuses()

    def _refuses_parts(self, pool: WorkerPool, item: FileUpload) -> bool:
        """Whether the server looks at the version that it is to copy a part of: asked once, with a wrong one."""
        if self._parts_refused is None:
            wrong = replace(self._original(item), etag=_NOBODYS)
            call = partial(self._store.upload_part_copy, item.key, item.upload, _PROBE_PART, wrong, range(1))
            self._parts_refused = _is_refused(pool, call)
        return self._parts_refused

    def _refuses_copies(self, pool: WorkerPool, item: FileUpload) -> bool:
        """As `_refuses_parts`, of whole objects. What is copied all the same is overwritten by what is sent then."""
        if self._copies_refused is None:
            wrong = replace(self._original(item), etag=_NOBODYS)
            self._copies_refused = _is_refused(pool, partial(self._store.copy, wrong, item.key))
        return self._copies_refused

    def _send_instead(self, item: FileUpload) -> None:
        """Forget the parts of an item that were copied: it is sent instead."""
        log.info("%s: the server does not copy %s as it should: it is sent instead", self._name, item.path)
        undone = sum(size for index, _, size in item.pieces() if index + 1 in item.etags)
        if undone:
            self._advance(-undone)
        item.copied = None
        item.etags.clear()
        item.part = part_size(item.size)

    def _original(self, item: FileUpload) -> ObjectVersion:
        """What an item is to be a copy of."""
        assert item.copied is not None
        model, file = item.copied
        return model.version_of(file, self._store.endpoint)

    @contextmanager
    def _gone(self, item: FileUpload) -> Iterator[None]:
        # An ExistsError, after which nothing stays staged: who was first has seen some uploads of ours, and ended them
        # before its manifest is there; of those that it has not seen, nobody would ever be told.
        try:
            yield
        except NotFoundError:
            raise ExistsError(
                f"the upload of {item.path} of {self._name} is gone: "
                "somebody else published it just now, or a rule of the bucket ended it",
                "push again",
            ) from None

    def _check(self, item: FileUpload, sha256: str) -> None:
        said = item.sha256 or item.source.sha256
        if said and said != sha256:
            raise UsageError(f"{item.path} changed while it was read", "publish it again")
        item.sha256 = sha256

    def _count(self, size: int) -> None:
        with self._guard:
            self.sent_bytes += size

    def _abort(self) -> None:
        """Drop what is still noted, and forget about it."""
        for key, upload in list(self._notes.uploads.items()):
            with suppress(ObsfsError):
                self._store.abort_upload(key, upload)
        self._notes.clear()

    # publishing

    def _publish(self, claim: PublishLease, before: Model | None, there: dict[str, ObjectInfo]) -> Manifest:
        try:
            return self._make_appear(claim, before, there)
        except RefusedError:
            if not there:
                # Another push would meet the same refusal; until then they would look like a model without a manifest.
                with suppress(ObsfsError):
                    self._store.delete(*(item.key for item in self._items))
            raise

    def _make_appear(self, claim: PublishLease, before: Model | None, there: dict[str, ObjectInfo]) -> Manifest:
        after, again = self._snapshot_remote()
        if (after.etag if after else "") != (before.etag if before else ""):
            raise ExistsError(f"{self._name} was published by somebody else just now", "look at it, then push again")
        for item in self._items:
            if item.kept and (item.key not in again or again[item.key].etag != there[item.key].etag):
                raise ExistsError(f"{item.path} of {self._name} was replaced just now", "push again")

        pool = self._pool()

        def appear(item: FileUpload) -> None:
            claim.check()
            item.written = self._finalize_object(pool, item)

        pool.run(tasks_for(self._items, appear))
        claim.check()
        pool.run(tasks_for([item for item in self._items if not item.kept], partial(self._confirm, pool)))
        claim.check()
        self._abort_stale_uploads()
        manifest = self._manifest()
        self._put_manifest(pool, manifest)
        if before:
            gone = {file.path for file in before.manifest.files} - {file.path for file in manifest.files}
            pool.run(tasks_for(sorted(gone), lambda path: self._store.delete(f"{self._name.prefix}{path}")))
        self._abort()
        return manifest

    def _abort_stale_uploads(self) -> None:
        """Drop the uploads of others, and of runs that were killed before they could note them: who staged before this
        manifest is refused after it. Where the server does not let us look, they stay."""
        with suppress(ObsfsError):
            wanted = {item.key for item in self._items}
            for key, upload in self._store.list_uploads(self._name.prefix):
                if key in wanted:
                    self._store.abort_upload(key, upload)

    def _put_manifest(self, pool: WorkerPool, manifest: Manifest) -> None:
        text, is_new = manifest.to_json(), bool(self._name.version)
        try:
            try:
                pool.retried(lambda: self._store.put(self._name.manifest_key, text, new=is_new))
            except UnsupportedError:
                if not is_new or catalog.read_model(self._store, self._name):
                    raise
                pool.retried(lambda: self._store.put(self._name.manifest_key, text))
        except ExistsError:
            # It may be our own, the answer to which was lost.
            if self._store.get(self._name.manifest_key).data != text:
                raise

    def _finalize_object(self, pool: WorkerPool, item: FileUpload) -> PutResult:
        if item.kept:
            return item.kept
        if item.upload:
            return self._complete(pool, item)
        if item.size > PART:
            return self._send_whole(pool, item)
        if item.copied and (written := self._copy_small(pool, item)):
            self._advance(item.size)
            return written
        data = pool.retried(lambda: item.source.read(0, item.size))
        self._check(item, hashlib.sha256(data).hexdigest())
        written = pool.retried(lambda: self._store.put(item.key, data))
        self._count(item.size)
        self._advance(item.size)
        return written

    def _send_whole(self, pool: WorkerPool, item: FileUpload) -> PutResult:
        """Send a large file in one request, to a server without uploads in parts. It is read twice."""
        sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        for _, offset, size in item.pieces():
            data = pool.retried(lambda offset=offset, size=size: item.source.read(offset, size))  # type: ignore[misc]
            sha.update(data)
            md5.update(data)
        self._check(item, sha.hexdigest())
        written = pool.retried(lambda: self._store.put_file(item.key, item.size, item.source.read, md5.digest()))
        self._count(item.size)
        self._advance(item.size)
        return written

    def _copy_small(self, pool: WorkerPool, item: FileUpload) -> PutResult | None:
        """A copy inside the server, if it is what it should be."""
        version = self._original(item)
        with _replaced(version):
            written = _unless_refused(lambda: pool.retried(lambda: self._store.copy(version, item.key)))
        if written is None:
            return None
        etag = written.etag or self._head(pool, item).etag
        with self._guard:
            is_right = self._is_copy(item, etag, item.copy_md5s[0], partial(self._refuses_copies, pool, item))
        return written if is_right else None

    def _head(self, pool: WorkerPool, item: FileUpload) -> ObjectInfo:
        return pool.retried(lambda: self._store.head(item.key))

    def _confirm(self, pool: WorkerPool, item: FileUpload) -> None:
        """Look at an object that has appeared: the manifest says of it what the server does, to whom pulls it."""
        assert item.written is not None
        found, said = self._head(pool, item), item.written.etag
        if found.size != item.size:
            raise RefusedError(
                f"the server has {found.size} bytes of {item.path} of {self._name}, and was sent {item.size}",
                "nothing was published; see the server's own log",
            )
        # Servers have one ETag for what was just completed, and another later; of one kind, they are comparable.
        if _digest_kind(said) and _digest_kind(said) == _digest_kind(found.etag) and said != found.etag:
            raise ExistsError(f"{item.path} of {self._name} was replaced just now", "push again")
        item.written = item.written._replace(etag=found.etag)

    def _complete(self, pool: WorkerPool, item: FileUpload) -> PutResult:
        with self._gone(item):
            try:
                written = pool.retried(lambda: self._store.complete_upload(item.key, item.upload, item.etags))
            except NotFoundError:
                # Done already, if the answer to it was lost.
                written = PutResult(self._store.head(item.key).etag, "")
                digests = (bytes.fromhex(item.etags[n].strip('"')) for n in sorted(item.etags))
                if written.etag.strip('"') != parts_etag(digests):
                    raise
        self._notes.note(item.key, None)
        return written

    def _manifest(self) -> Manifest:
        files = []
        for item in sorted(self._items, key=lambda item: item.path):
            assert item.written is not None
            etag, version_id = item.written
            files.append(File(path=item.path, size=item.size, etag=etag, sha256=item.sha256, version_id=version_id))
        details = self._details
        manifest = Manifest(
            name=self._name.name,
            version=self._name.version,
            created=now(),
            author=details.author,
            source=details.source,
            revision=details.revision,
            model=details.model,
            files=tuple(files),
        )
        return parse_manifest(manifest.to_json(), str(self._name))


@contextmanager
def _replaced(version: ObjectVersion) -> Iterator[None]:
    try:
        yield
    except VersionChangedError:
        raise UsageError(f"{version.key} was replaced just now", "push again") from None


def _unless_refused(call: Callable[[], _T]) -> _T | None:
    """What `call` returns, None when the server will not do it: there is another way."""
    try:
        return call()
    except (VersionChangedError, NotFoundError):
        raise
    except ObsfsError as error:
        log.info("the server does not copy: %s", error)
        return None


def _is_refused(pool: WorkerPool, call: Callable[[], object]) -> bool:
    try:
        pool.retried(call)
    except VersionChangedError:
        return True
    except ObsfsError:
        return False
    return False


def _digest_kind(etag: str) -> str:
    """Which kind of digest an ETag is: of one piece, or of so many parts; empty for others."""
    found = _DIGEST.fullmatch(etag)
    return f"md5{found[1] or ''}" if found else ""


class _Hashes(NamedTuple):
    sha256: str
    etag: str
    """That it has when we upload it."""
    copy_part: int
    """Bytes in a part that is copied inside the server."""
    copy_md5s: list[str]
    """Of each of those parts."""


def _hashes(item: FileUpload, pool: WorkerPool) -> _Hashes:
    sha, copied = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    parts, copies = [], []
    size = item.part if item.size > PART else max(item.size, 1)
    copy_part = size * max(1, COPY_PART // size)
    for offset in range(0, max(item.size, 1), size):
        data = pool.retried(lambda offset=offset: item.source.read(offset, min(size, item.size - offset)))  # type: ignore[misc]
        sha.update(data)
        parts.append(hashlib.md5(data, usedforsecurity=False).digest())
        copied.update(data)
        if (offset + size) % copy_part == 0 or offset + size >= item.size:
            copies.append(copied.hexdigest())
            copied = hashlib.md5(usedforsecurity=False)
    return _Hashes(sha.hexdigest(), parts_etag(parts), copy_part, copies)


class PublishLease:
    """The right to make a model's files appear; one publisher has it at a time, for a quarter of an hour at most.

    On servers that know conditional writes (Amazon, MinIO, SeaweedFS) the claim is exact. On others it is written,
    and looked at again after two seconds.
    """

    def __init__(self, store: ObjectStore, name: ModelName, author: str, nonce: str) -> None:
        self._store = store
        self._name = name
        self._key = f"{name.prefix}{LEASE}"
        self._nonce = nonce
        self._text = json.dumps({"author": author, "nonce": nonce}).encode()
        self._until = 0.0

    def __enter__(self) -> PublishLease:
        for _ in range(2):
            if self._read() is None and self._take():
                self._until = time.monotonic() + _CLAIM_SECONDS / 2
                return self
            found = self._read()
            if found is None:
                continue
            said, age = found
            if not said or said.get("nonce") == self._nonce or age > _CLAIM_SECONDS:
                # Torn; ours, from a run that was killed; or of one that was killed long ago.
                self._store.delete(self._key)
                continue
            raise ExistsError(
                f"{self._name} is being published by {said.get('author') or 'somebody else'} since {age:.0f} s",
                f"try again; a claim of one that was killed ends after {_CLAIM_SECONDS / 60:.0f} minutes",
            )
        raise ExistsError(f"{self._name} is being published by somebody else", "try again")

    def _take(self) -> bool:
        try:
            self._store.put(self._key, self._text, new=True)
        except ExistsError:
            return False
        except UnsupportedError:
            self._store.put(self._key, self._text)
        else:
            try:
                self._store.put(self._key, self._text, new=True)
            except ExistsError:
                return True
        time.sleep(_SETTLE_SECONDS)
        found = self._read()
        return found is not None and found[0].get("nonce") == self._nonce

    def _read(self) -> tuple[dict[str, Any], float] | None:
        try:
            content = self._store.get(self._key)
        except NotFoundError:
            return None
        try:
            said = json.loads(content.data)
        except ValueError:
            said = {}
        return (said if isinstance(said, dict) else {}), content.age

    def check(self) -> None:
        """Raises ExistsError when it has lasted so long that somebody else may have it by now."""
        if time.monotonic() > self._until:
            raise ExistsError(f"publishing {self._name} took too long", "push again")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ObsfsError):
            found = self._read()
            if found and found[0].get("nonce") == self._nonce:
                self._store.delete(self._key)
