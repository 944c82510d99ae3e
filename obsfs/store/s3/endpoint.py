"""One endpoint of a bucket: botocore's client for it, and a short way for reads; and the pool of all endpoints."""

from __future__ import annotations

import difflib
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from botocore.config import Config
from botocore.utils import get_environ_proxies

from obsfs.errors import ForbiddenError, MovedError, NoBucketError, ObsfsError, UnavailableError, UsageError
from obsfs.settings import Settings
from obsfs.store import address as addresses
from obsfs.store.address import Address
from obsfs.store.credentials import Keys
from obsfs.store.deadline import call_within
from obsfs.store.s3.config import EndpointConfig, load_config
from obsfs.store.s3.failures import explain_silence, map_errors, no_credentials
from obsfs.store.s3.http import new_http_session
from obsfs.store.s3.parsers import install_bounds
from obsfs.store.s3.pins import Pin
from obsfs.store.s3.ranges import RangeAnswer, RangeSender
from obsfs.text import visible

log = logging.getLogger(__name__)

_NO_PIN = Pin()
_SPARE_CONNECTIONS = 8
"""Connections for names and small objects, in addition to those for ranges."""
_RENEW_SECONDS = 1.0
"""Credentials are looked for again once in so many seconds, however many requests are refused."""
_MAX_NEAR = 3
"""Names of buckets that an error suggests."""
_RESOLVE_SECONDS = 6.0
"""A resolver repeats a lost query after 5 s (resolv.conf(5))."""
_ACCESS_DENIED = "(AccessDenied)"
_CHECKSUM_MODE = "x-amz-checksum-mode"


def disable_redirects(context: dict[str, Any], **_: Any) -> None:
    """Tell botocore that a request was redirected already, so that it does not follow another server's word."""
    context.setdefault("s3_redirect", {})["redirected"] = True


class Endpoint:
    """One endpoint: botocore's client for it, and its short way for reads."""

    def __init__(self, number: int, settings: Settings, config: EndpointConfig) -> None:
        """Make a client.

        Args:
            number: The place in the pool.
            settings: Timeouts, connections, trust.
            config: How to reach it.

        Raises:
            ForbiddenError: There are no credentials.
            UsageError: The endpoint cannot be used.
        """
        if not (config.has_credentials or settings.no_sign_request):
            # Here, and not at the first request: botocore would look everywhere once more for each of them.
            raise no_credentials(config.searched)
        keys = config.keys
        connections = settings.connections + _SPARE_CONNECTIONS
        try:
            self.client = config.session.create_client(
                "s3",
                endpoint_url=config.url,
                region_name=config.region,
                config=Config(
                    connect_timeout=settings.request_timeout,
                    read_timeout=settings.request_timeout,
                    max_pool_connections=connections,
                    retries={"total_max_attempts": 1},
                    **config.options,
                ),
                # None: botocore's own choice, which honours AWS_CA_BUNDLE.
                verify=False if settings.insecure_tls else None,
                aws_access_key_id=keys.access_key if keys else None,
                aws_secret_access_key=keys.secret_key if keys else None,
                aws_session_token=keys.token if keys else None,
            )
        except ValueError as error:
            raise UsageError(f"endpoint {config.url!r} cannot be used", str(error)) from None
        # We follow redirects ourselves, to known places: botocore's own way ends in a RecursionError, or anywhere.
        self.client.meta.events.register_last("before-parameter-build.s3", disable_redirects)
        self.number = number
        self.url = config.url
        self.capabilities = config.capabilities
        self.checksum_options: dict[str, str] = {"ChecksumMode": "ENABLED"} if self.capabilities.checksums else {}
        """Arguments of botocore's methods that ask for the checksum of a whole object."""
        self._checksum_headers = {_CHECKSUM_MODE: "ENABLED"} if self.capabilities.checksums else {}
        http = new_http_session(
            config.session,
            self.url,
            is_insecure=settings.insecure_tls,
            timeout=settings.request_timeout,
            connections=connections,
        )
        self._sender = RangeSender(self.client, config.credentials, http)
        install_bounds(self.client, http)

    def resolve(self, what: str) -> None:
        """Look up the name of the server, or of the proxy before it, as the first request to it will.

        A resolver waits for 10 s and more for each of its servers (resolv.conf(5)), which no timeout of a request ends.

        Args:
            what: What is wanted, for the error.

        Raises:
            UnavailableError: The resolver does not answer in time. A name that it does not know is no error here: the
                first request reports it.
        """
        proxy = get_environ_proxies(self.url).get(urlsplit(self.url).scheme)
        host = urlsplit(proxy or self.url).hostname

        def look_up() -> None:
            with suppress(OSError, UnicodeError):
                socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)

        try:
            call_within(look_up, _RESOLVE_SECONDS, name="obsfs-resolve")
        except TimeoutError:
            raise UnavailableError(
                f"cannot reach {host} for {what}: the name server does not answer",
                "check the network and the name servers in /etc/resolv.conf",
            ) from None

    def get(self, bucket: str, key: str, span: str = "", pin: Pin = _NO_PIN) -> RangeAnswer:
        """Ask for an object.

        Args:
            bucket: Any bucket of the endpoint.
            key: The object.
            span: A Range header; empty for the whole object.
            pin: The version; by default, whichever is there now.

        Raises:
            Exception: Those of botocore; see :func:`~obsfs.store.s3.failures.map_errors`.
        """
        headers = {"Range": span} if span else self._checksum_headers
        answer = self._sender.send(bucket, key, {**headers, **pin.headers}, pin.version_id)
        if answer is None:
            options = pin.options | ({"Range": span} if span else self.checksum_options)
            got = self.client.get_object(Bucket=bucket, Key=key, **options)
            answer = RangeAnswer(got["ResponseMetadata"]["HTTPHeaders"], got["Body"]._raw_stream)
        return answer


class EndpointPool:
    """The endpoints of one bucket. Replaces those whose credentials expire, or that redirect."""

    def __init__(self, address: Address, settings: Settings, keys: Keys | None, *, is_known: bool) -> None:
        self._address = address
        self._settings, self._keys = settings, keys
        self._urls = settings.endpoint_urls or (None,)
        self._endpoints = [self._new(number, url, is_known=is_known) for number, url in enumerate(self._urls)]
        self._guard = threading.Lock()
        self._renewed = float("-inf")
        self._moved: dict[int, str] = {}
        self._near: str | None = None
        self._first_url = self._endpoints[0].url

    def _new(self, number: int, url: str | None, region: str = "", *, is_known: bool = True) -> Endpoint:
        settings = replace(self._settings, region=region) if region else self._settings
        config = load_config(settings, self._address.scheme, self._keys, url, is_known=is_known)
        return Endpoint(number, settings, config)

    def __len__(self) -> int:
        return len(self._endpoints)

    def __getitem__(self, number: int) -> Endpoint:
        return self._endpoints[number]

    def prepare(self, number: int) -> None:
        """Look up the name of a server that has never answered. Raises UnavailableError."""
        address = self._address
        self._endpoints[number].resolve(f"{address.scheme}://{address.bucket}/{address.prefix}")

    def follow(self, number: int, moved: MovedError) -> bool:
        """Replace an endpoint by the one it redirects to, if that is of the same cloud; once, and for good."""
        endpoint = self._endpoints[number]
        target = addresses.endpoint_at(endpoint.url, self._address.bucket, region=moved.region, host=moved.host)
        with self._guard:
            if target is None or self._moved.setdefault(number, target) != target or endpoint is not self[number]:
                return self._endpoints[number] is not endpoint
            self._endpoints[number] = self._new(number, target, addresses.region_of(urlsplit(target).hostname or ""))
        log.warning("%s: the bucket %s is at %s", endpoint.url, self._address.bucket, target)
        return True

    def renew(self, number: int) -> None:
        """Look for credentials again, as a program that starts now would: somebody may have written newer ones."""
        with self._guard:
            if time.monotonic() - self._renewed >= _RENEW_SECONDS:
                moved_to = self._moved.get(number, "")
                region = addresses.region_of(urlsplit(moved_to).hostname or "")
                self._endpoints[number] = self._new(number, moved_to or self._urls[number], region)
                self._renewed = time.monotonic()
                log.info("the credentials were refused as expired: looked for others")

    def explain(self, error: ObsfsError) -> ObsfsError:
        """Return an error with the remedy that this bucket's settings and neighbours suggest."""
        if isinstance(error, ForbiddenError):
            if not self._settings.no_sign_request or _ACCESS_DENIED not in error.message:
                return error
            remedy = "no credentials were sent: leave out --no-sign-request, the bucket is not public"
            return ForbiddenError(error.message, remedy)
        if isinstance(error, NoBucketError):
            path = urlsplit(self._first_url).path.strip("/")
            hint = f"leave {visible(path)} out of the endpoint URL; " if path else self._nearest_buckets()
            return NoBucketError(error.message, f"{hint}{error.remedy}")
        return explain_silence(error, self._first_url)

    def _nearest_buckets(self) -> str:
        """Name the buckets most like this one, for an error; empty where they may not be listed."""
        if self._near is None:
            self._near = ""
            with suppress(ObsfsError), map_errors("the buckets"):
                answer = self._endpoints[0].client.list_buckets()
                names = [str(bucket["Name"]) for bucket in answer.get("Buckets", ())]
                near = difflib.get_close_matches(self._address.bucket, names, _MAX_NEAR)
                if near:
                    self._near = f"there is {', '.join(f'{self._address.scheme}://{name}' for name in near)}; "
        return self._near
