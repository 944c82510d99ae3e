"""The lease that lets one publisher at a time finish a model: an object, ``.obsfs/claim.json``, in its directory.

On servers with conditional writes (Amazon, MinIO, SeaweedFS) the lease is exact: only one client can create the object.
On other servers the publisher writes it, waits, and reads it again.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from obsfs.errors import ExistsError, NotFoundError, ObsfsError, UnsupportedError
from obsfs.library.names import LEASE, ModelName
from obsfs.store.base import ObjectStore

LEASE_SECONDS = 900.0
"""Age at which another publisher may take a lease over. Its holder stops at half of it."""
SETTLE_SECONDS = 2.0
"""Wait before a lease is read again on a server without conditional writes, for writes of others to become visible."""


class PublishLease:
    """The right to make the files of a model visible and to write its manifest. Use it as a context manager.

    Args:
        store: The bucket.
        name: The model.
        author: Shown to others who try to publish the same model.
        nonce: Names the publication. A publication that was killed and runs again has the same one, and takes its own
            lease over at once.

    Raises:
        ExistsError: On entry: somebody else holds the lease.
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
            if self._read() is None and self._create():
                self._until = time.monotonic() + LEASE_SECONDS / 2
                return self
            current = self._read()
            if current is None:
                continue
            holder, age = current
            if not holder or holder.get("nonce") == self._nonce or age > LEASE_SECONDS:
                # Torn, or ours from a run that was killed, or its holder was killed long ago.
                self._store.delete(self._key)
                continue
            raise ExistsError(
                f"{self._name} is being published by {holder.get('author') or 'somebody else'} since {age:.0f} s",
                f"try again; the lease of a killed publisher ends after {LEASE_SECONDS / 60:.0f} minutes",
            )
        raise ExistsError(f"{self._name} is being published by somebody else", "try again")

    def _create(self) -> bool:
        try:
            self._store.put(self._key, self._text, new=True)
        except ExistsError:
            return False
        except UnsupportedError:
            self._store.put(self._key, self._text)
        else:
            # A server that ignores the condition accepts the second one as well: then the lease is not exact.
            try:
                self._store.put(self._key, self._text, new=True)
            except ExistsError:
                return True
        time.sleep(SETTLE_SECONDS)
        current = self._read()
        return current is not None and current[0].get("nonce") == self._nonce

    def _read(self) -> tuple[dict[str, Any], float] | None:
        """Return what the lease says (empty if it is torn) and its age in seconds; None if there is no lease."""
        try:
            body = self._store.get(self._key)
        except NotFoundError:
            return None
        try:
            holder = json.loads(body.data)
        except ValueError:
            holder = {}
        return (holder if isinstance(holder, dict) else {}), body.age

    def check(self) -> None:
        """Raise ExistsError if the lease is so old that somebody else may soon take it over."""
        if time.monotonic() > self._until:
            raise ExistsError(f"publishing {self._name} took too long", "push again")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ObsfsError):
            current = self._read()
            if current and current[0].get("nonce") == self._nonce:
                self._store.delete(self._key)
