"""Publishing a model: its files, from anywhere, into the bucket, and its manifest last.

A publication has these steps:

1. *Compare*: find files that the bucket has already, at this or another version of the name.
2. *Stage*: send large files as the parts of multipart uploads, which nobody can see, or copy them inside the server.
   Small files wait.
3. *Lease*: take the lease (:mod:`obsfs.library.lease`). One publisher has it at a time.
4. *Finalize*: complete the uploads and send the small files. Then check every object.
5. *Manifest*: abort stale uploads, write the manifest, give the lease back.

So a version exists whole or not at all. Of two publishers of the same version, one wins whole.

Uploads outlive the process. Their ids are kept on this machine (:mod:`obsfs.library.resume`). The next try compares
the parts that the server has, by MD5, with what it would send. Unfinished uploads are aborted when the version is
published.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from obsfs.errors import ExistsError, NotFoundError, ObsfsError, RefusedError, UnsupportedError, UsageError
from obsfs.library import catalog
from obsfs.library.catalog import Model
from obsfs.library.lease import PublishLease
from obsfs.library.manifest import File, Manifest, ModelInfo, now, parse_manifest
from obsfs.library.names import ModelName
from obsfs.library.resume import UploadResumeState
from obsfs.library.server_copy import ServerCopy
from obsfs.library.transfer import Advance, OrderedHash, WorkerPool, tasks_for
from obsfs.library.upload import FileUpload, PublishSource, digest_kind, hash_file
from obsfs.store.base import ObjectStore
from obsfs.store.parts import MAX_PUT, PART, part_size, parts_etag
from obsfs.store.types import ObjectInfo, PutResult

_HASHERS = 4
"""Threads that read and hash local files."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Details:
    """What a manifest says besides its files: see :class:`~obsfs.library.manifest.Manifest`."""

    author: str
    source: str
    revision: str
    model: ModelInfo


class Publication:
    """One model being published.

    Args:
        store: The bucket.
        name: The model, and its version.
        sources: Its files.
        details: For the manifest.
        resume_path: The file of :class:`~obsfs.library.resume.UploadResumeState`, which the caller has locked.
        connections: Most requests at a time.
        retry_timeout: Seconds for which a request is tried again.
        advance: Is told of the bytes of each piece that is done.
    """

    def __init__(
        self,
        store: ObjectStore,
        name: ModelName,
        sources: Sequence[PublishSource],
        details: Details,
        resume_path: Path,
        *,
        connections: int,
        retry_timeout: float,
        advance: Advance = lambda size: None,
    ) -> None:
        self._store = store
        self._name = name
        self._details = details
        self._resume = UploadResumeState(resume_path)
        self._connections = connections
        self._retry_timeout = retry_timeout
        self._advance = advance
        self._items = [
            FileUpload(source, f"{name.prefix}{source.path}", part=part_size(source.size)) for source in sources
        ]
        self.sent_bytes = 0
        self._guard = threading.Lock()
        self._server_copy = ServerCopy(store)

    def run(self) -> Manifest:
        """Publish the model, and return its manifest. If it is published with the same files, return that manifest.

        Raises:
            ExistsError: It is published with other files, or somebody else publishes it.
            ObsfsError: It cannot be published. Nothing is visible then, and the next try resumes.
        """
        self._resume.save()
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
            with PublishLease(self._store, self._name, self._details.author, self._resume.nonce) as lease:
                return self._publish(lease, before, there)
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
        """Return what is published under the name now, and the objects that are there, by their keys."""
        bucket = self._store
        return catalog.read_model(bucket, self._name), {info.key: info for info in bucket.walk(self._name.prefix)}

    def _may_be(self, manifest: Manifest) -> bool:
        wanted = {(item.path, item.size) for item in self._items}
        return wanted == {(file.path, file.size) for file in manifest.files}

    def _is_same(self, manifest: Manifest) -> bool:
        return self._may_be(manifest) and all(item.kept for item in self._items)

    # what is there already

    def _compare(self, known: Sequence[Model], there: dict[str, ObjectInfo]) -> None:
        """Find out which files need not be sent. Reads only files of which the bucket has one of the same size."""
        of_size: dict[int, list[tuple[Model, File]]] = {}
        for model in known:
            for file in model.manifest.files:
                of_size.setdefault(file.size, []).append((model, file))

        def compare(item: FileUpload) -> None:
            found = there.get(item.key)
            candidates = [(model, file) for model, file in of_size.get(item.size, ()) if file.sha256]
            if not candidates and (found is None or found.size != item.size):
                return
            hashes = hash_file(item, pool)
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
        """Return whether a listed object is the one of a manifest. Asks for the ETag if the listing has none."""
        return found.etag == file.etag or pool.retried(lambda: self._store.head(found.key)).etag == file.etag

    # staging

    def _stage(self) -> None:
        pool = self._pool()
        large = [item for item in self._items if item.size > PART and not item.kept]

        def begin(item: FileUpload) -> None:
            upload = self._resume.uploads.get(item.key, "")
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
            self._resume.record(item.key, item.upload)

        try:
            pool.run(tasks_for(large, begin))
        except UnsupportedError:
            # Without multipart uploads, large files are sent whole when all are finalized.
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
        # In a new upload: rclone does not accept a part twice.
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
            with self._existing_upload(item):
                etag = pool.retried(lambda: self._store.upload_part(item.key, item.upload, index + 1, data))
            item.etags[index + 1] = etag
            self._count(size)
        self._advance(size)

    def _copy(self, pool: WorkerPool, item: FileUpload, index: int, offset: int, size: int) -> None:
        if not item.copied:
            return  # another part of it could not be copied
        number, span = index + 1, range(offset, offset + size)
        with self._existing_upload(item):
            etag = self._server_copy.copy_part(pool, item, number, span)
        with self._guard:
            if not item.copied:
                return
            if self._server_copy.is_correct_part(pool, item, etag, item.copy_md5s[index]):
                item.etags[number] = etag
                self._advance(size)
            else:
                self._send_instead(item)

    def _send_instead(self, item: FileUpload) -> None:
        """Discard the copied parts of a file, so that it is sent instead."""
        log.info("%s: the server does not copy %s correctly: it is sent instead", self._name, item.path)
        undone = sum(size for index, _, size in item.pieces() if index + 1 in item.etags)
        if undone:
            self._advance(-undone)
        item.copied = None
        item.etags.clear()
        item.part = part_size(item.size)

    @contextmanager
    def _existing_upload(self, item: FileUpload) -> Iterator[None]:
        # An ExistsError, so that all uploads are aborted: the publisher that won has aborted those of ours that it saw,
        # before its manifest. Nobody would abort the others.
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
        """Abort the recorded uploads, and forget them."""
        for key, upload in list(self._resume.uploads.items()):
            with suppress(ObsfsError):
                self._store.abort_upload(key, upload)
        self._resume.clear()

    # publishing

    def _publish(self, lease: PublishLease, before: Model | None, there: dict[str, ObjectInfo]) -> Manifest:
        try:
            return self._finalize(lease, before, there)
        except RefusedError:
            if not there:
                # The next push would be refused too. Until then the files would look like a model without a manifest.
                with suppress(ObsfsError):
                    self._store.delete(*(item.key for item in self._items))
            raise

    def _finalize(self, lease: PublishLease, before: Model | None, there: dict[str, ObjectInfo]) -> Manifest:
        after, again = self._snapshot_remote()
        if (after.etag if after else "") != (before.etag if before else ""):
            raise ExistsError(f"{self._name} was published by somebody else just now", "look at it, then push again")
        for item in self._items:
            if item.kept and (item.key not in again or again[item.key].etag != there[item.key].etag):
                raise ExistsError(f"{item.path} of {self._name} was replaced just now", "push again")

        pool = self._pool()

        def finalize(item: FileUpload) -> None:
            lease.check()
            item.written = self._finalize_object(pool, item)

        pool.run(tasks_for(self._items, finalize))
        lease.check()
        pool.run(tasks_for([item for item in self._items if not item.kept], partial(self._confirm, pool)))
        lease.check()
        self._abort_stale_uploads()
        manifest = self._manifest()
        self._put_manifest(pool, manifest)
        if before:
            gone = {file.path for file in before.manifest.files} - {file.path for file in manifest.files}
            pool.run(tasks_for(sorted(gone), lambda path: self._store.delete(f"{self._name.prefix}{path}")))
        self._abort()
        return manifest

    def _abort_stale_uploads(self) -> None:
        """Abort the uploads of other publishers, and of runs that were killed before they recorded them.

        A publisher that staged before this manifest is refused after it, so its uploads are of no use. If the server
        does not list uploads, they stay.
        """
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
            # It may be ours, if the answer to the first try was lost.
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
        """Send a large file in one request, to a server without multipart uploads. The file is read twice."""
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
        """Copy a whole object inside the server. Return None if the server does not, or not correctly."""
        written = self._server_copy.copy(pool, item)
        if written is None:
            return None
        etag = written.etag or self._head(pool, item).etag
        with self._guard:
            is_right = self._server_copy.is_correct_object(pool, item, etag, item.copy_md5s[0])
        return written if is_right else None

    def _head(self, pool: WorkerPool, item: FileUpload) -> ObjectInfo:
        return pool.retried(lambda: self._store.head(item.key))

    def _confirm(self, pool: WorkerPool, item: FileUpload) -> None:
        """Check a new object, and take its ETag from the server: pulls compare with that one."""
        assert item.written is not None
        found, said = self._head(pool, item), item.written.etag
        if found.size != item.size:
            raise RefusedError(
                f"the server has {found.size} bytes of {item.path} of {self._name}, and was sent {item.size}",
                "nothing was published; see the server's own log",
            )
        # Some servers give a completed upload one ETag at first and another later. Those of one kind are comparable.
        if digest_kind(said) and digest_kind(said) == digest_kind(found.etag) and said != found.etag:
            raise ExistsError(f"{item.path} of {self._name} was replaced just now", "push again")
        item.written = item.written._replace(etag=found.etag)

    def _complete(self, pool: WorkerPool, item: FileUpload) -> PutResult:
        with self._existing_upload(item):
            try:
                written = pool.retried(lambda: self._store.complete_upload(item.key, item.upload, item.etags))
            except NotFoundError:
                # It is complete already, if the answer to the first try was lost.
                written = PutResult(self._store.head(item.key).etag, "")
                digests = (bytes.fromhex(item.etags[n].strip('"')) for n in sorted(item.etags))
                if written.etag.strip('"') != parts_etag(digests):
                    raise
        self._resume.record(item.key, None)
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
