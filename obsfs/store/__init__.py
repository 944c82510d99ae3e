"""The bucket: the :class:`~obsfs.store.base.ObjectStore` protocol, its implementations, and what they stand on.

Packages above use :func:`open_store` and the types of this package. None of them imports ``obsfs.store.s3``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obsfs.settings import Settings
    from obsfs.store.address import Address
    from obsfs.store.base import ObjectStore
    from obsfs.store.credentials import Keys


def open_store(
    address: Address, settings: Settings, *, keys: Keys | None = None, is_known: bool = False
) -> ObjectStore:
    """Open a bucket.

    Asks no server but those that give out credentials.

    Args:
        address: The bucket, and the prefix that :meth:`~obsfs.store.base.ObjectStore.check` lists.
        settings: Endpoints, region, profile, timeouts, connections.
        keys: Credentials to use in place of those of the environment, the profile and the machine.
        is_known: The bucket was reached before, so that it is worth waiting for.

    Raises:
        UsageError: The endpoint, the region or the profile cannot be used.
        ForbiddenError: There are no credentials.
    """
    from obsfs.store.s3.store import S3Store  # botocore takes a tenth of a second to import

    return S3Store(address, settings, keys=keys, is_known=is_known)
