"""Where keys and tokens come from.

``OBSFS_ACCESS_KEY_ID``, ``OBSFS_SECRET_ACCESS_KEY`` and ``OBSFS_SESSION_TOKEN`` come first; then botocore's own
chain (environment, profile, container, instance role), which refreshes what expires; and Huawei's SDK names
``HUAWEICLOUD_SDK_AK``, ``HUAWEICLOUD_SDK_SK`` and ``HUAWEICLOUD_SDK_SECURITY_TOKEN``, before botocore's where the
endpoint is OBS and after it elsewhere. A profile that was asked for by name beats them all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from obsfs.errors import UsageError


class Keys(NamedTuple):
    """A key pair with its token, if it has one."""

    access_key: str
    secret_key: str
    token: str | None

    def __repr__(self) -> str:
        return "Keys(...)"


_OBSFS = ("OBSFS_ACCESS_KEY_ID", "OBSFS_SECRET_ACCESS_KEY", "OBSFS_SESSION_TOKEN")
_HUAWEI = ("HUAWEICLOUD_SDK_AK", "HUAWEICLOUD_SDK_SK", "HUAWEICLOUD_SDK_SECURITY_TOKEN")


def _keys(names: tuple[str, str, str], environ: Mapping[str, str]) -> Keys | None:
    access, secret, token = (environ.get(name) for name in names)
    if bool(access) != bool(secret):
        missing = names[1] if access else names[0]
        raise UsageError(f"{missing} is not set", f"{names[0]} and {names[1]} go together")
    return Keys(access, secret, token or None) if access and secret else None


def explicit_keys(
    *, profile: str | None, on_obs: bool, chain_has_keys: bool, environ: Mapping[str, str] = os.environ
) -> Keys | None:
    """The keys to hand to botocore, or None to leave it to botocore's own chain.

    Raises UsageError when one half of a pair is missing.
    """
    if profile:
        return None
    if keys := _keys(_OBSFS, environ):
        return keys
    if on_obs or not chain_has_keys:
        return _keys(_HUAWEI, environ)
    return None
