"""Where credentials come from, and how they are refreshed.

The order: a profile that was asked for by name; ``OBSFS_ACCESS_KEY_ID``, ``OBSFS_SECRET_ACCESS_KEY`` and
``OBSFS_SESSION_TOKEN``; botocore's own chain (environment, profile, container, instance role), which refreshes what
expires. The names of Huawei's SDK (``HUAWEICLOUD_SDK_AK``, ``HUAWEICLOUD_SDK_SK`` and
``HUAWEICLOUD_SDK_SECURITY_TOKEN``) come before botocore's chain on OBS, and after it elsewhere.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from botocore.exceptions import CredentialRetrievalError

from obsfs.errors import ForbiddenError, UsageError, WaitWarning
from obsfs.store.deadline import call_within
from obsfs.text import visible


class Keys(NamedTuple):
    """A key pair with its session token, if it has one. Never shown."""

    access_key: str
    secret_key: str
    token: str | None

    def __repr__(self) -> str:
        return "Keys(...)"


class SigningKeys(Protocol):
    """What a signer of botocore reads: :class:`Keys`, and botocore's own frozen credentials."""

    @property
    def access_key(self) -> str: ...

    @property
    def secret_key(self) -> str: ...

    @property
    def token(self) -> str | None: ...


class CredentialProvider(Protocol):
    """A source of credentials that refreshes those that expire."""

    def current(self) -> SigningKeys:
        """Return the keys to sign a request with now. May wait for a service; raises botocore's exceptions."""


class StaticCredentials:
    """Keys that never change."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def current(self) -> Keys:
        """Return the keys."""
        return self._keys


class SessionCredentials:
    """What botocore's chain found, which refreshes itself."""

    def __init__(self, credentials: Any) -> None:
        """Take ``botocore.credentials.Credentials``."""
        self._credentials = credentials

    def current(self) -> SigningKeys:
        """Return the keys of now; asks the service that gave them out when they expire soon."""
        keys: SigningKeys = self._credentials.get_frozen_credentials()
        return keys


_OBSFS = ("OBSFS_ACCESS_KEY_ID", "OBSFS_SECRET_ACCESS_KEY", "OBSFS_SESSION_TOKEN")
_HUAWEI = ("HUAWEICLOUD_SDK_AK", "HUAWEICLOUD_SDK_SK", "HUAWEICLOUD_SDK_SECURITY_TOKEN")
KEY_VARIABLES = (*_OBSFS, *_HUAWEI)
"""The variables that hold keys, besides those of the AWS SDKs."""


def _keys(names: tuple[str, str, str], environ: Mapping[str, str]) -> Keys | None:
    access, secret, token = (environ.get(name) for name in names)
    if bool(access) != bool(secret):
        missing = names[1] if access else names[0]
        raise UsageError(f"{missing} is not set", f"{names[0]} and {names[1]} go together")
    return Keys(access, secret, token or None) if access and secret else None


def explicit_keys(
    *, profile: str | None, on_obs: bool, chain_has_keys: bool, environ: Mapping[str, str] = os.environ
) -> Keys | None:
    """Return the keys to hand to botocore, or None to leave it to botocore's own chain.

    Args:
        profile: A profile that was asked for by name.
        on_obs: The endpoint is OBS.
        chain_has_keys: botocore's chain has credentials.
        environ: The variables to read.

    Raises:
        UsageError: One half of a pair is missing.
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
_LOOK_SECONDS = 1.75
"""For all sources together: each answers within a second, if at all. A command reports an error within three."""
_ASSISTED_SECONDS = 58.0
"""Where a program of the user's runs, or a code is asked for: a person may have to act."""
_ASSISTED = ("credential_process", "mfa_serial")
_SILENT_SECONDS = 5.0
_silent: dict[tuple[str, int], float] = {}
"""Services that did not answer, and when (monotonic seconds): they are not waited for again soon."""
_NAMES = {
    "env": "environment",
    "assume-role": "the role of profile {}",
    "assume-role-with-web-identity": "web identity (STS)",
    "sso": "single sign-on of profile {}",
    "login": "sign-in of profile {}",
    "custom-process": "credential_process of profile {}",
    "container-role": "container's agent",
    "iam-role": "instance's metadata service",
}
"""Names of botocore's providers for an error; the others read files."""


def _is_silent(endpoint: str) -> bool:
    """Return whether nothing accepts a connection there within half a second."""
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


class _Chain:
    """botocore's providers in their order, without its long waits for what is not there."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._profile: str = session.get_config_variable("profile") or "default"
        self.providers: list[Any] = session.get_component("credential_provider").providers
        self.asking = ""
        self._metadata = "off"

    def searched(self) -> str:
        """Return where credentials are looked for, in words."""
        profile = visible(self._profile, 60)
        return f"environment, profile {profile}, container's agent, instance's metadata service ({self._metadata})"

    def load_credentials(self) -> Any:
        """Return the first credentials there are, or None; botocore calls it."""
        for provider in self.providers:
            self.asking = _NAMES.get(provider.METHOD, "files of profile {}").format(visible(self._profile, 60))
            if provider.METHOD == _METADATA_PROVIDER and self._has_no_metadata():
                continue
            if provider.METHOD == _CONTAINER_PROVIDER:
                _check_agent()
            if found := provider.load():
                return found
        return None

    def _has_no_metadata(self) -> bool:
        """Whether the metadata service is not there. botocore would wait for it for twice a second."""
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            return False  # it asks nobody then
        endpoint = self._session.get_config_variable("ec2_metadata_service_endpoint")
        if not endpoint:
            is_v6 = str(self._session.get_config_variable("ec2_metadata_service_endpoint_mode")).lower() == "ipv6"
            endpoint = _METADATA_V6 if is_v6 else _METADATA
        is_silent = _is_silent(endpoint)
        self._metadata = "no answer" if is_silent else "no role"
        return is_silent

    def needs_a_person(self) -> bool:
        """Whether the profile, or one that its role is taken with, runs a program or asks for a code."""
        profiles = self._session.full_config.get("profiles", {})
        name, seen = self._profile, set[str]()
        while name in profiles and name not in seen:
            seen.add(name)
            if any(key in profiles[name] for key in _ASSISTED):
                return True
            name = profiles[name].get("source_profile", "")
        return False


def _check_agent() -> None:
    """Raise CredentialRetrievalError when a container's agent is named and is not there: botocore waits ten seconds."""
    relative = os.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    endpoint = _CONTAINER if relative else os.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if endpoint and _is_silent(endpoint):
        parts = urlsplit(endpoint)
        raise CredentialRetrievalError(provider="container", error_msg=f"{parts.hostname} does not answer")


class ChainResult(NamedTuple):
    """Whether botocore's chain has credentials, and where it looked for them, in words."""

    has_credentials: bool
    searched: str


def load_chain(session: Any, *, fetch: bool = True) -> ChainResult:
    """Find credentials by botocore's own chain, within two seconds for all of it.

    A program of the user's (``credential_process``), or a code that is asked for, gets a minute, and a warning says so.

    Args:
        session: A ``botocore.session.Session``. It keeps what was found, and refreshes it.
        fetch: Fetch a role's keys now, and not when the first request is signed.

    Raises:
        ForbiddenError: A source that the configuration names is broken, or does not answer in time.
    """
    chain = _Chain(session)
    session.register_component("credential_provider", chain)

    def ask() -> bool:
        credentials = session.get_credentials()
        if credentials is not None and fetch:
            credentials.get_frozen_credentials()
        return credentials is not None

    def extend() -> float:
        if not chain.needs_a_person():
            return 0.0
        warnings.warn(f"waiting for credentials ({chain.asking}), for a minute at most", WaitWarning, stacklevel=4)
        return _ASSISTED_SECONDS

    try:
        has_credentials = call_within(ask, _LOOK_SECONDS, name="obsfs-keys", extend=extend)
    except TimeoutError:
        raise ForbiddenError(
            f"no credentials in time: {chain.asking} does not answer",
            "see to it and to the network, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:  # of credential_process, a token file and the like
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ForbiddenError(
            f"no credentials: {chain.asking} cannot be used ({reason})",
            "see to credential_process or the token file of the profile",
        ) from None
    return ChainResult(has_credentials, chain.searched())
