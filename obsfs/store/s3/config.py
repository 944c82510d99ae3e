"""How to reach an endpoint: its URL, region, credentials and dialect, from settings, environment and profile."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ProfileNotFound

from obsfs.errors import UsageError
from obsfs.settings import Settings
from obsfs.store import address as addresses
from obsfs.store.base import Capabilities
from obsfs.store.credentials import (
    ChainResult,
    CredentialProvider,
    Keys,
    SessionCredentials,
    StaticCredentials,
    explicit_keys,
    load_chain,
)
from obsfs.store.s3.failures import map_errors
from obsfs.store.session import new_session


@dataclass(frozen=True)
class EndpointConfig:
    """What a client of one endpoint is made with; see :func:`load_config`."""

    session: Any
    """A ``botocore.session.Session``."""
    url: str
    region: str
    keys: Keys | None
    """Keys to hand to clients, or None: botocore's own chain finds (and refreshes) them."""
    credentials: CredentialProvider | None
    """Signs requests; None to sign nothing, or where there are no credentials."""
    has_credentials: bool
    """Whether requests can be signed."""
    searched: str
    """Where botocore's chain looked for credentials, for an error; empty if it was not asked."""
    options: dict[str, Any]
    """Keyword arguments of ``botocore.config.Config``: signing, checksums, addressing style."""
    capabilities: Capabilities


def load_config(
    settings: Settings,
    scheme: str = "obs",
    keys: Keys | None = None,
    endpoint_url: str | None = None,
    *,
    is_known: bool = False,
) -> EndpointConfig:
    """Find out how to reach an endpoint. Asks no server but those that give out credentials.

    Args:
        settings: What the user chose.
        scheme: ``obs`` or ``s3``, of the bucket's address: which cloud a region belongs to.
        keys: Credentials; None to look for them.
        endpoint_url: The endpoint; None for the first of the settings, or the default one.
        is_known: The bucket was reached before: do not fetch a role's credentials before the first request.

    Raises:
        UsageError: A profile that does not exist, half a key pair, or no known endpoint.
        ForbiddenError: A source of credentials is broken, or does not answer within two seconds.
    """
    with map_errors("the configuration"):
        try:
            session = new_session(settings.profile)
            session.get_scoped_config()
        except ProfileNotFound:
            source = settings.place("profile") if settings.profile else "AWS_PROFILE="
            raise UsageError(
                f"{source}{session.profile}: profile {session.profile!r} not found", "see `aws configure list-profiles`"
            ) from None
        region, source = _region(settings, session)
        if given := endpoint_url or next(iter(settings.endpoint_urls), None):
            url = addresses.check_endpoint(given, settings.place("endpoint_url"))
        else:
            url = _default_endpoint(session, scheme, region, source)
        chain = ChainResult(has_credentials=False, searched="")
        if keys is None and not settings.no_sign_request:
            find = partial(explicit_keys, profile=settings.profile, on_obs=addresses.is_obs(url))
            keys = find(chain_has_keys=True)
            if keys is None:
                chain = load_chain(session, fetch=not is_known)
                keys = find(chain_has_keys=chain.has_credentials)
        credentials: CredentialProvider | None = None
        if not settings.no_sign_request and keys is not None:
            credentials = StaticCredentials(keys)
        elif not settings.no_sign_request and chain.has_credentials:
            credentials = SessionCredentials(session.get_credentials())
        return EndpointConfig(
            session,
            url,
            region or "us-east-1",
            keys,
            credentials,
            keys is not None or chain.has_credentials,
            chain.searched,
            _client_options(settings, url),
            capabilities_of(url),
        )


def capabilities_of(url: str) -> Capabilities:
    """Return what is known of the servers behind an endpoint."""
    if not addresses.is_obs(url):
        return Capabilities()
    # OBS documents no conditional PUT, ignores the checksum mode of S3, and refuses botocore's other checksums.
    return Capabilities(conditional_put=False, append=True, checksums=False)


def _client_options(settings: Settings, url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"signature_version": UNSIGNED} if settings.no_sign_request else {}
    if not addresses.is_aws(url):
        # botocore's newer default checksums are refused by OBS and others (docs/credentials.md).
        options["request_checksum_calculation"] = "when_required"
        options["response_checksum_validation"] = "when_required"
    style = settings.addressing_style
    options["s3"] = {"addressing_style": addresses.addressing_style(url) if style == "auto" else style}
    return options


def _region(settings: Settings, session: Any) -> tuple[str | None, str]:
    """Return the region, and what the user wrote before it, for an error. Raises UsageError if it cannot be one."""
    region: str | None
    if settings.region:
        region, place = settings.region, settings.place("region")
    elif region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        place = f"{'AWS_REGION' if os.environ.get('AWS_REGION') else 'AWS_DEFAULT_REGION'}="
    else:
        region, place = session.get_config_variable("region"), _in_profile(session, "region")
    if region and not re.fullmatch(r"[!-~]+", region):
        raise UsageError(f"{place}{region}: that is no region", "write for example --region cn-south-1")
    return region, place


def _in_profile(session: Any, key: str) -> str:
    """Return what stands before a value of a profile, for an error."""
    return f"profile {session.profile or 'default'} in {session.get_config_variable('config_file')}: {key} = "


def _default_endpoint(session: Any, scheme: str, region: str | None, place: str) -> str:
    configured = _configured_endpoint(session, region)
    if configured and not addresses.is_aws(configured):
        return configured
    if scheme == "s3" and (region is None or region in session.get_available_regions("s3")):
        return _clients_endpoint(session, region)
    if region is None:
        raise UsageError(
            "the endpoint of the bucket is not known",
            "give --region cn-south-1 (OBS), or --endpoint-url URL (any other S3 server)",
        )
    return addresses.obs_endpoint(region, place)


def _configured_endpoint(session: Any, region: str | None) -> str | None:
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    # https://docs.aws.amazon.com/sdkref/latest/guide/feature-ss-endpoints.html. Read here, because a client
    # that is made only to ask where it would go takes a tenth of a second.
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if given := os.environ.get(name):
            return addresses.check_endpoint(given, f"{name}=")
    profile = session.get_scoped_config()
    if not {"endpoint_url", "services"} & set(profile):
        return None
    try:
        return addresses.check_endpoint(_clients_endpoint(session, region), _in_profile(session, "endpoint_url"))
    except ValueError:  # botocore's message may hold a secret
        shown = addresses.hide_secrets(profile.get("endpoint_url", "..."))
        raise UsageError(
            f"{_in_profile(session, 'endpoint_url')}{shown}: that is no http:// or https:// URL",
            "write for example https://HOST:PORT",
        ) from None


def _clients_endpoint(session: Any, region: str | None) -> str:
    probe = session.create_client("s3", region_name=region or "us-east-1", config=Config(signature_version=UNSIGNED))
    return str(probe.meta.endpoint_url)
