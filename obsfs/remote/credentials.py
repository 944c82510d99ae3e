"""Where keys and tokens come from.

``OBSFS_ACCESS_KEY_ID``, ``OBSFS_SECRET_ACCESS_KEY`` and ``OBSFS_SESSION_TOKEN`` come first; then botocore's own
chain (environment, profile, container, instance role), which refreshes what expires; and Huawei's SDK names
``HUAWEICLOUD_SDK_AK``, ``HUAWEICLOUD_SDK_SK`` and ``HUAWEICLOUD_SDK_SECURITY_TOKEN``, before botocore's where the
endpoint is OBS and after it elsewhere. A profile that was asked for by name beats them all.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from botocore.exceptions import CredentialRetrievalError, UnknownCredentialError

from obsfs.errors import ForbiddenError, UsageError


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


_METADATA, _METADATA_V6 = "http://169.254.169.254/", "http://[fd00:ec2::254]/"
"""https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html."""
_METADATA_PROVIDER = "iam-role"
_METADATA_SECONDS = 0.5
"""The metadata service answers within a millisecond, from the machine's own host."""
_CONTAINER = "http://169.254.170.2"
"""https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html."""
_CONTAINER_PROVIDER = "container-role"
_SILENT_SECONDS = 5.0
_silent: dict[tuple[str, int], float] = {}
"""When (monotonic seconds) which service did not answer: it is not waited for again soon."""


def _is_silent(endpoint: str) -> bool:
    """Whether nobody accepts a connection there within half a second."""
    try:
        parts = urlsplit(endpoint)
        address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return True
    if time.monotonic() - _silent.get(address, float("-inf")) < _SILENT_SECONDS:
        return True
    try:
        socket.create_connection(address, timeout=_METADATA_SECONDS).close()
    except OSError:
        _silent[address] = time.monotonic()
        return True
    return False


class _MetadataGate:
    """Stands before botocore's provider for instance roles, and takes it away where nobody answers.

    By itself it waits for two timeouts of a second, each time that anybody asks for credentials.
    """

    METHOD = "obsfs-metadata-gate"
    CANONICAL_NAME = None

    def __init__(self, resolver: Any, endpoint: str) -> None:
        self._resolver = resolver
        self._endpoint = endpoint

    def load(self) -> None:
        """Give no credentials: the next provider is asked, if it is still there."""
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            return  # it asks nobody then
        if _is_silent(self._endpoint):
            self._resolver.remove(_METADATA_PROVIDER)


class _ContainerGate:
    """Stands before botocore's provider for a container's role, which by itself waits for an agent for ten seconds."""

    METHOD = "obsfs-container-gate"
    CANONICAL_NAME = None

    def load(self) -> None:
        """Give no credentials. Raises CredentialRetrievalError when the agent is named and is not there."""
        relative = os.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        endpoint = _CONTAINER if relative else os.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
        if endpoint and _is_silent(endpoint):
            parts = urlsplit(endpoint)
            raise CredentialRetrievalError(provider="container", error_msg=f"{parts.hostname} does not answer")


def has_keys(session: Any) -> bool:
    """Return whether botocore's own chain finds credentials, without long waits where there is no instance role.

    Args:
        session: A ``botocore.session.Session``.

    Raises:
        ForbiddenError: What the configuration names as their source is broken.
    """
    resolver = session.get_component("credential_provider")
    endpoint = session.get_config_variable("ec2_metadata_service_endpoint")
    if not endpoint:
        is_v6 = str(session.get_config_variable("ec2_metadata_service_endpoint_mode")).lower() == "ipv6"
        endpoint = _METADATA_V6 if is_v6 else _METADATA
    with suppress(UnknownCredentialError):
        resolver.insert_before(_METADATA_PROVIDER, _MetadataGate(resolver, endpoint))
    with suppress(UnknownCredentialError):
        resolver.insert_before(_CONTAINER_PROVIDER, _ContainerGate())
    try:
        return session.get_credentials() is not None
    except (OSError, ValueError, LookupError, TypeError) as error:  # of credential_process, a token file and the like
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ForbiddenError(
            f"no credentials: what the AWS configuration takes them from failed ({reason})",
            "see to credential_process or the token file of the profile",
        ) from None
