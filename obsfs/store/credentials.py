"""Where keys and tokens come from.

``OBSFS_ACCESS_KEY_ID``, ``OBSFS_SECRET_ACCESS_KEY`` and ``OBSFS_SESSION_TOKEN`` come first; then botocore's own
chain (environment, profile, container, instance role), which refreshes what expires; and Huawei's SDK names
``HUAWEICLOUD_SDK_AK``, ``HUAWEICLOUD_SDK_SK`` and ``HUAWEICLOUD_SDK_SECURITY_TOKEN``, before botocore's where the
endpoint is OBS and after it elsewhere. A profile that was asked for by name beats them all.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from botocore.exceptions import CredentialRetrievalError

from obsfs.errors import ForbiddenError, UsageError, WaitWarning
from obsfs.text import visible


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
_LOOK_SECONDS = 1.75
"""For all places together: each answers within a second, if at all. Who starts a command is told within three."""
_ASSISTED_SECONDS = 58.0
"""Where a program of the user's is run, or a code is asked for: these may need a person."""
_ASSISTED = ("credential_process", "mfa_serial")
_SILENT_SECONDS = 5.0
_silent: dict[tuple[str, int], float] = {}
"""When (monotonic seconds) which service did not answer: it is not waited for again soon."""
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
"""What botocore's providers are called in an error; the others read files."""


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


class _Chain:
    """botocore's providers in their order, without its long waits for what is not there."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._profile: str = session.get_config_variable("profile") or "default"
        self.providers: list[Any] = session.get_component("credential_provider").providers
        self.asking = ""
        self._metadata = "off"

    def places(self) -> str:
        """Where credentials are looked for, in words."""
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


class Look(NamedTuple):
    """Whether there are credentials, and where they were looked for, in words."""

    has_keys: bool
    places: str


def look(session: Any, *, fetch: bool = True) -> Look:
    """Find credentials by botocore's own chain, within two seconds for all of it.

    A program of the user's (``credential_process``), or a code that is asked for, gets a minute, and that is told.

    Args:
        session: A ``botocore.session.Session``. It keeps what was found, and refreshes it.
        fetch: Have a role's keys handed out now, and not when the first request is signed.

    Raises:
        ForbiddenError: What the configuration names as their source is broken, or does not answer in time.
    """
    chain = _Chain(session)
    session.register_component("credential_provider", chain)

    def ask() -> bool:
        credentials = session.get_credentials()
        if credentials is not None and fetch:
            credentials.get_frozen_credentials()
        return credentials is not None

    try:
        found = _within_bounds(ask, chain)
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
    return Look(found, chain.places())


def _within_bounds(ask: Callable[[], bool], chain: _Chain) -> bool:
    """What `ask` returns or raises; TimeoutError when it takes too long: it goes on in a thread of its own."""
    answer: Future[bool] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="obsfs-keys", daemon=True).start()
    if not wait([answer], _LOOK_SECONDS).done and chain.needs_a_person():
        warnings.warn(f"waiting for credentials ({chain.asking}), for a minute at most", WaitWarning, stacklevel=3)
        wait([answer], _ASSISTED_SECONDS)
    return answer.result(timeout=0)
