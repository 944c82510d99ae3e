"""Which uploads a publication has begun, kept on this machine so that the next try continues them."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from obsfs import private
from obsfs.errors import UsageError
from obsfs.paths import state_dir

_FORMAT = 1
"""Format number of the file. A file without a number has format 0, which is the same."""


class UploadResumeState:
    """The uploads in progress of one publication, by the keys of their objects, in a file.

    A file in a later format is ignored: its uploads start again.

    Args:
        path: The file. The caller holds its lock (:func:`resume_state_file`).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        try:
            document = json.loads(path.read_bytes() or b"{}")
        except (OSError, ValueError):
            document = {}
        if not isinstance(document, dict) or document.get("format", 0) not in (0, _FORMAT):
            document = {}
        uploads, nonce = document.get("uploads"), document.get("nonce")
        entries = uploads.items() if isinstance(uploads, dict) else ()
        self.uploads = {key: upload for key, upload in entries if isinstance(upload, str)}
        self.nonce = nonce if isinstance(nonce, str) and nonce else secrets.token_hex(8)
        """Names the publication, also after it was killed and runs again."""

    def record(self, key: str, upload: str | None) -> None:
        """Record that an upload has begun; with None, that it has ended."""
        with self._guard:
            if upload is None:
                self.uploads.pop(key, None)
            else:
                self.uploads[key] = upload
            self.save()

    def save(self) -> None:
        """Write the file."""
        document = {"format": _FORMAT, "uploads": self.uploads, "nonce": self.nonce}
        private.write_file(self._path, json.dumps(document).encode())

    def clear(self) -> None:
        """Forget all uploads, and remove the file."""
        self.uploads.clear()
        self._path.unlink(missing_ok=True)


@contextmanager
def resume_state_file(publication: str, shown: str) -> Iterator[Path]:
    """Lock the resume state of one publication.

    Args:
        publication: Identifies it: endpoint, model and where its files come from.
        shown: Its name in errors.

    Yields:
        The path for :class:`UploadResumeState`.

    Raises:
        UsageError: Another process has the lock.
    """
    directory = state_dir() / "push"
    private.make_level(directory)
    path = directory / f"{hashlib.sha256(publication.encode(errors='surrogatepass')).hexdigest()[:24]}.json"
    for stale in directory.glob("*.lock"):  # of processes that were killed
        with suppress(OSError):
            if (fd := private.try_lock(stale)) is not None:
                private.unlock(stale, fd)
    lock = path.with_suffix(".lock")
    fd = private.try_lock(lock)
    if fd is None:
        raise UsageError(f"{shown} is being pushed from here by another process", "wait for it")
    try:
        yield path
    finally:
        private.unlock(lock, fd)
