"""The requests we make to a bucket, through botocore: list, head, and ranges read into buffers that we own.

Every failure becomes one of :mod:`obsfs.errors`, so that nobody above knows botocore. Names and small objects are
asked for again here while the server is away (:mod:`obsfs.store.retry`); ranges are not: the fetch engine decides
that, because it knows who is waiting.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ProfileNotFound
from botocore.utils import get_environ_proxies

from obsfs.errors import (
    BrokenOffError,
    BusyError,
    CorruptError,
    ExpiredError,
    ForbiddenError,
    MovedError,
    NoBucketError,
    NotFoundError,
    ObsfsError,
    RefusedError,
    UnavailableError,
    UsageError,
    VersionChangedError,
)
from obsfs.settings import Settings
from obsfs.store import address as addresses
from obsfs.store.address import Address
from obsfs.store.bounds import MAX_SIZE, parse_count, read_at_most
from obsfs.store.checksums import Checksum, checksum_from_headers
from obsfs.store.credentials import Keys, Look, explicit_keys, look
from obsfs.store.replicas import Replicas
from obsfs.store.retry import Retries
from obsfs.store.s3.failures import explained, map_errors, no_credentials
from obsfs.store.s3.listing import pages
from obsfs.store.s3.parsers import bound
from obsfs.store.s3.pins import Pin
from obsfs.store.s3.ranges import CheckedBody, RangeAnswer, RangeBody, RangeSender, wrong_bytes
from obsfs.store.s3.session import new_http_session, new_session
from obsfs.store.types import WHOLE_BYTES, ObjectBody, ObjectInfo, ObjectVersion, Page, epoch, tag
from obsfs.text import visible

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_NO_PIN = Pin()
_RENEW_SECONDS = 1.0
_NEAREST = 3
_RESOLVE_SECONDS = 6.0
"""A resolver repeats a question that was lost after 5 s (resolv.conf(5))."""
_IS_DENIED = "(AccessDenied)"
_CHECKSUM_MODE = "x-amz-checksum-mode"
MAX_SMALL = 64 << 20
"""Bytes of an object that is read whole, such as a manifest: one of 100,000 files has 40 MiB."""


@dataclass(frozen=True)
class Connection:
    """How a bucket is spoken to, resolved from settings, environment and profile; see :func:`connect`."""

    session: Any
    endpoint: str
    region: str
    keys: Keys | None
    """Keys to hand over, or None: botocore's own chain finds (and refreshes) them."""
    has_keys: bool
    """Whether requests can be signed."""
    looked: str
    """Where botocore's chain looked for credentials, in words; empty where it was not asked."""
    config: dict[str, Any]
    """Keyword arguments of ``botocore.config.Config`` for this endpoint: signing, checksums, addressing style."""


def connect(
    settings: Settings,
    scheme: str = "obs",
    keys: Keys | None = None,
    endpoint_url: str | None = None,
    *,
    is_known: bool = False,
) -> Connection:
    """Find endpoint (unless given; the first of several), region, credentials (unless `keys` are given), addressing.

    Asks no server but those that hand out keys, and a bucket that `is_known` not even these, if it can wait. Raises
    UsageError for a profile that does not exist, half a key pair, or an endpoint that cannot be known; ForbiddenError
    for a place of keys that is broken, or does not answer within two seconds.
    """
    with map_errors("the configuration"):
        try:
            session = new_session(settings.profile)
            session.get_scoped_config()
        except ProfileNotFound:
            place = settings.place("profile") if settings.profile else "AWS_PROFILE="
            raise UsageError(
                f"{place}{session.profile}: profile {session.profile!r} not found", "see `aws configure list-profiles`"
            ) from None
        region, place = _region(settings, session)
        if given := endpoint_url or next(iter(settings.endpoint_urls), None):
            endpoint = addresses.check_endpoint(given, settings.place("endpoint_url"))
        else:
            endpoint = _default_endpoint(session, scheme, region, place)
        config: dict[str, Any] = {}
        looked = Look(has_keys=False, places="")
        if settings.no_sign_request:
            config["signature_version"] = UNSIGNED
        elif keys is None:
            find = partial(explicit_keys, profile=settings.profile, on_obs=addresses.is_obs(endpoint))
            keys = find(chain_has_keys=True)
            if keys is None:
                looked = look(session, fetch=not is_known)
                keys = find(chain_has_keys=looked.has_keys)
        if not addresses.is_aws(endpoint):
            # botocore's newer default checksums are refused by OBS and others (README, "Endpoints").
            config["request_checksum_calculation"] = "when_required"
            config["response_checksum_validation"] = "when_required"
        style = settings.addressing_style
        config["s3"] = {"addressing_style": addresses.addressing_style(endpoint) if style == "auto" else style}
        can_sign = keys is not None or looked.has_keys
        return Connection(session, endpoint, region or "us-east-1", keys, can_sign, looked.places, config)


def _region(settings: Settings, session: Any) -> tuple[str | None, str]:
    """The region, and what was written before it where it was found. Raises UsageError when it cannot be one."""
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
    """What stands before a value of a profile, for an error."""
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
    # https://docs.aws.amazon.com/sdkref/latest/guide/feature-ss-endpoints.html. Here, because to make a client only to
    # ask where it would go takes a tenth of a second.
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if given := os.environ.get(name):
            return addresses.check_endpoint(given, f"{name}=")
    profile = session.get_scoped_config()
    if not {"endpoint_url", "services"} & set(profile):
        return None
    try:
        return addresses.check_endpoint(_clients_endpoint(session, region), _in_profile(session, "endpoint_url"))
    except ValueError:  # botocore says of it what may hold a secret
        shown = addresses.hide_secrets(profile.get("endpoint_url", "..."))
        raise UsageError(
            f"{_in_profile(session, 'endpoint_url')}{shown}: that is no http:// or https:// URL",
            "write for example https://HOST:PORT",
        ) from None


def _clients_endpoint(session: Any, region: str | None) -> str:
    probe = session.create_client("s3", region_name=region or "us-east-1", config=Config(signature_version=UNSIGNED))
    return str(probe.meta.endpoint_url)


def stay(context: dict[str, Any], **_: Any) -> None:
    """Tell botocore that a request was redirected already, so that it does not follow another server's word."""
    context.setdefault("s3_redirect", {})["redirected"] = True


class Endpoint:
    """One endpoint: a client for it, and its way for ranges."""

    def __init__(self, settings: Settings, connection: Connection) -> None:
        keys = connection.keys
        if not (connection.has_keys or settings.no_sign_request):
            # Here, and not at the first request: botocore would look everywhere once more for each of them.
            raise no_credentials(connection.looked)
        config = Config(
            connect_timeout=settings.request_timeout,
            read_timeout=settings.request_timeout,
            max_pool_connections=settings.connections + 8,
            retries={"total_max_attempts": 1},
            **connection.config,
        )
        try:
            self.client = connection.session.create_client(
                "s3",
                endpoint_url=connection.endpoint,
                region_name=connection.region,
                config=config,
                # None: botocore's own choice, which honours AWS_CA_BUNDLE.
                verify=False if settings.insecure_tls else None,
                aws_access_key_id=keys.access_key if keys else None,
                aws_secret_access_key=keys.secret_key if keys else None,
                aws_session_token=keys.token if keys else None,
            )
        except ValueError as error:
            raise UsageError(f"endpoint {connection.endpoint!r} cannot be used", str(error)) from None
        # We follow redirects ourselves, to known places: botocore's own way ends in a RecursionError, or anywhere.
        self.client.meta.events.register_last("before-parameter-build.s3", stay)
        self.endpoint = connection.endpoint
        # OBS has no such checksums, and refuses botocore's other ways with them.
        self.mode: dict[str, str] = {} if addresses.is_obs(self.endpoint) else {"ChecksumMode": "ENABLED"}
        if settings.no_sign_request:
            credentials = None
        elif keys:
            credentials = Credentials(keys.access_key, keys.secret_key, keys.token)
        else:
            credentials = connection.session.get_credentials()
        http = new_http_session(
            connection.session,
            self.endpoint,
            is_insecure=settings.insecure_tls,
            timeout=settings.request_timeout,
            connections=config.max_pool_connections,
        )
        self._sender = RangeSender(self.client, credentials, http)
        bound(self.client, http)

    def resolve(self, what: str) -> None:
        """Look up the name of the server, or of the proxy before it, as the first request to it will: within a bound.

        How long a resolver waits is in resolv.conf(5): 10 s and more for each of its servers, which no timeout of a
        request ends. Raises UnavailableError when it does not answer; a name that it does not know is told later.
        """
        scheme = urlsplit(self.endpoint).scheme
        parts = urlsplit(get_environ_proxies(self.endpoint).get(scheme) or self.endpoint)
        answer: Future[None] = Future()

        def ask() -> None:
            with suppress(OSError, UnicodeError):
                socket.getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)
            answer.set_result(None)

        threading.Thread(target=ask, name="obsfs-resolve", daemon=True).start()
        if not wait([answer], _RESOLVE_SECONDS).done:
            raise UnavailableError(
                f"cannot reach {parts.hostname} for {what}: the name server does not answer",
                "check the network and the name servers in /etc/resolv.conf",
            )

    def get(self, bucket: str, key: str, span: str = "", pin: Pin = _NO_PIN) -> RangeAnswer:
        """An object, or a `span` of it (a Range header), pinned as far as is known. Raises what botocore raises."""
        headers = {"Range": span} if span else ({_CHECKSUM_MODE: "ENABLED"} if self.mode else {})
        answer = self._sender.send(bucket, key, {**headers, **pin.headers}, pin.version_id)
        if answer is None:
            options = pin.options | ({"Range": span} if span else self.mode)
            got = self.client.get_object(Bucket=bucket, Key=key, **options)
            answer = RangeAnswer(got["ResponseMetadata"]["HTTPHeaders"], got["Body"]._raw_stream)
        return answer


class Bucket:
    """A place in a bucket. Safe to use from many threads.

    Its clients reach every bucket of their endpoints: :meth:`open_range` reads the bucket that a version names. With
    several endpoints, each is taken to hold the same objects (:mod:`obsfs.store.replicas`); versions are known by the
    first, whichever serves them. `is_known`: the bucket was reached before, so that it is worth waiting for.
    """

    def __init__(
        self, address: Address, settings: Settings, *, keys: Keys | None = None, is_known: bool = False
    ) -> None:
        self.address = address
        self.name = address.bucket
        self._settings, self._keys = settings, keys
        self._urls = settings.endpoint_urls or (None,)
        self._is_known = is_known
        self._endpoints = [self._new_endpoint(url) for url in self._urls]
        self._is_known = True
        self._renewing = threading.Lock()
        self._renewed = float("-inf")
        self._near: str | None = None
        self._moved: dict[int, str] = {}
        self.replicas = Replicas(len(self._endpoints))
        self.retries = Retries(settings.retry_timeout, has_answered=is_known)
        self.endpoint: str = self._endpoints[0].endpoint

    def _new_endpoint(self, url: str | None, region: str = "") -> Endpoint:
        settings = replace(self._settings, region=region) if region else self._settings
        return Endpoint(settings, connect(settings, self.address.scheme, self._keys, url, is_known=self._is_known))

    def _follow(self, number: int, moved: MovedError) -> bool:
        """Go where a server has sent us, if that is another endpoint of its cloud; once, and for good."""
        site = self._endpoints[number]
        place = addresses.endpoint_at(site.endpoint, self.name, region=moved.region, host=moved.host)
        with self._renewing:
            if place is None or self._moved.setdefault(number, place) != place or site is not self._endpoints[number]:
                return self._endpoints[number] is not site
            self._endpoints[number] = self._new_endpoint(place, addresses.region_of(urlsplit(place).hostname or ""))
        log.warning("%s: the bucket %s is at %s", site.endpoint, self.name, place)
        return True

    def _renew(self, number: int) -> None:
        """Look for credentials anew, as a program that starts now would: somebody may have written newer ones."""
        with self._renewing:
            if time.monotonic() - self._renewed >= _RENEW_SECONDS:
                place = self._moved.get(number, "")
                self._endpoints[number] = self._new_endpoint(
                    place or self._urls[number], addresses.region_of(urlsplit(place).hostname or "")
                )
                self._renewed = time.monotonic()
                log.info("the credentials were refused as expired: looked for others")

    @property
    def client(self) -> Any:
        """botocore's client for the first endpoint, where everything is written."""
        return self._endpoints[0].client

    @property
    def sites(self) -> list[dict[str, object]]:
        """For ``obsfs status``: the endpoints, with their latency in seconds and their failures."""
        return [
            {"endpoint": site.endpoint, "latency": one.latency, "failures": one.failures, "lagging": one.lagging}
            for site, one in zip(self._endpoints, self.replicas.health, strict=True)
        ]

    def _ask(self, work: Callable[[int], _T], *, may_lag: bool = False) -> _T:
        """What the first endpoint that can answer says. With `may_lag`, one that says no may just be late: the others
        are asked too."""
        error: ObsfsError | None = None
        late: list[int] = []
        for number in self.replicas.order():
            started = time.monotonic()
            try:
                try:
                    if not self.retries.has_answered:
                        self._endpoints[number].resolve(self._what(self.address.prefix))
                    answer = work(number)
                except ExpiredError:
                    self._renew(number)
                    answer = work(number)
                except MovedError as moved:
                    if not self._follow(number, moved):
                        raise
                    answer = work(number)
            except ForbiddenError as forbidden:
                if not self._settings.no_sign_request or _IS_DENIED not in forbidden.message:
                    raise
                remedy = "no credentials were sent: leave out --no-sign-request, the bucket is not public"
                raise ForbiddenError(forbidden.message, remedy) from None
            except UnavailableError as unavailable:
                self.replicas.failed(number)
                error = error or unavailable
                if len(self._endpoints) > 1:
                    log.warning("%s: %s", self._endpoints[number].endpoint, unavailable)
            except (VersionChangedError, NotFoundError) as changed:
                if not may_lag:
                    raise
                late.append(number)
                error = changed
            else:
                self.retries.succeeded()
                self.replicas.answered(number, time.monotonic() - started if may_lag else None)
                for other in late:
                    self.replicas.lagged(other)
                    log.warning("%s lags behind %s", self._endpoints[other].endpoint, self._endpoints[number].endpoint)
                return answer
        assert error is not None
        raise error

    def _ask_again(self, work: Callable[[int], _T], *, may_lag: bool = False) -> _T:
        """As :meth:`_ask`, again and again while no endpoint can answer."""
        began, attempt = time.monotonic(), 0
        while True:
            try:
                return self._ask(work, may_lag=may_lag)
            except RefusedError as error:
                raise explained(error, self.endpoint) from None
            except NoBucketError as error:
                path = urlsplit(self.endpoint).path.strip("/")
                hint = f"leave {visible(path)} out of the endpoint URL; " if path else self._nearest_buckets()
                raise NoBucketError(error.message, f"{hint}{error.remedy}") from None
            except UnavailableError as error:
                attempt += 1
                if isinstance(error, BrokenOffError | BusyError | CorruptError):
                    self.retries.answered()
                if (pause := self.retries.failed(attempt, began)) is None:
                    raise explained(error, self.endpoint) from None
                log.warning("trying again: %s", error)
            time.sleep(pause)

    def _nearest_buckets(self) -> str:
        """The buckets whose names are most like this one's, for an error; empty where they may not be listed."""
        if self._near is None:
            self._near = ""
            with suppress(ObsfsError), map_errors("the buckets"):
                names = [str(one["Name"]) for one in self.client.list_buckets().get("Buckets", ())]
                close = difflib.get_close_matches(self.name, names, _NEAREST)
                self._near = (
                    f"there is {', '.join(f'{self.address.scheme}://{name}' for name in close)}; " if close else ""
                )
        return self._near

    def check(self) -> Page:
        """The first page of the place. Raises what is wrong when the bucket is not there or may not be listed."""
        return next(self.list(self.address.prefix))

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """The identity of what `info` describes."""
        etag = info.etag or tag(None, info.mtime)
        return ObjectVersion(self.endpoint, self.name, info.key, etag, info.size, modified=info.mtime)

    def list(self, prefix: str, *, page_size: int = 1000, delimiter: str = "/") -> Iterator[Page]:
        """Pages of what lies directly under `prefix` (empty, or ending in ``/``), in the server's order.

        Without a delimiter: of all objects under it.
        """
        return pages(
            lambda number: self._endpoints[number].client,
            self._ask_again,
            self.name,
            prefix,
            what=self._what(prefix),
            page_size=page_size,
            delimiter=delimiter,
        )

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a prefix, however deep."""
        bad = 0
        for page in self.list(prefix, delimiter=""):
            bad += page.bad
            yield from page.objects
        if bad:
            log.warning(
                "entries of the listing of %s that cannot be read, and are left out: %d", self._what(prefix), bad
            )

    def head(self, key: str) -> ObjectInfo:
        """The object at `key` as it is now. Raises NotFoundError."""

        def ask(number: int) -> dict[str, Any]:
            with map_errors(self._what(key)):
                answer: dict[str, Any] = self._endpoints[number].client.head_object(Bucket=self.name, Key=key)
            return answer

        answer = self._ask_again(ask)
        size, modified = answer.get("ContentLength", -1), epoch(answer.get("LastModified"))
        if not 0 <= size <= MAX_SIZE:
            raise UnavailableError(f"the server does not say how large {self._what(key)} is")
        return ObjectInfo(key, size, modified, tag(answer.get("ETag"), modified))

    def get(self, key: str, *, max_bytes: int = MAX_SMALL) -> ObjectBody:
        """Read a small object whole, as it is now.

        Raises:
            NotFoundError: It does not exist.
            UsageError: It has more than `max_bytes` bytes.
        """

        def ask(number: int) -> ObjectBody:
            site = self._endpoints[number]
            with map_errors(self._what(key)):
                answer = site.get(self.name, key)
                return self._content(answer, key, max_bytes)

        return self._ask_again(ask, may_lag=True)

    def list_versions(self, key: str) -> Iterator[ObjectBody]:
        """The versions of an object that the bucket keeps, the newest first; none where it keeps none."""
        with map_errors(self._what(key)):
            answer = self.client.list_object_versions(Bucket=self.name, Prefix=key)
            found = [one for one in answer.get("Versions", ()) if one["Key"] == key]
            for one in sorted(found, key=lambda one: epoch(one.get("LastModified")), reverse=True):
                if (one.get("VersionId") or "null") != "null":
                    answer = self._endpoints[0].get(self.name, key, pin=Pin(version_id=one["VersionId"]))
                    yield self._content(answer, key, MAX_SMALL)

    def _content(self, answer: RangeAnswer, key: str, max_bytes: int) -> ObjectBody:
        """A whole object, checked: here and not by botocore, which knows nothing of MD5 ETags."""
        length = parse_count(answer.headers.get("content-length"))
        with closing(answer.stream) as stream:
            data = read_at_most(stream, max_bytes) if (length or 0) <= max_bytes else None
        if data is None:
            raise UsageError(f"{self._what(key)} is too large to be what it should be", "look at it")
        if length is not None and len(data) != length:
            raise BrokenOffError(f"the server closed the body of {key} early")
        checksum = self._checksum_from(answer.headers)
        if checksum and not checksum.is_of(data):
            raise wrong_bytes(self._what(key), checksum)
        return ObjectBody(data, answer.headers)

    def _what(self, key: str, bucket: str = "") -> str:
        return f"{self.address.scheme}://{bucket or self.name}/{key}"

    def open_range(self, version: ObjectVersion, start: int, stop: int) -> RangeBody | CheckedBody:
        """Bytes ``[start, stop)`` of exactly this version; of a small object that is wanted whole, none before all are
        checked against what the server has of its bytes.

        Raises VersionChangedError when the object was replaced or deleted, and UnavailableError when what the
        server says it sends (Content-Range, length, ETag) is not what was asked for, whatever its status.
        """
        return self._ask(lambda number: self._open_range(number, version, start, stop), may_lag=True)

    def read_range(self, version: ObjectVersion, start: int, stop: int) -> bytes:
        """As :meth:`open_range`, all at once."""
        if stop <= start:
            return b""

        def ask(number: int) -> bytes:
            buffer = bytearray(stop - start)
            with closing(self._open_range(number, version, start, stop)) as body:
                body.readinto(memoryview(buffer))
            return bytes(buffer)

        return self._ask_again(ask, may_lag=True)

    def _open_range(self, number: int, version: ObjectVersion, start: int, stop: int) -> RangeBody | CheckedBody:
        what = self._what(version.key, version.bucket)
        site = self._endpoints[number]
        # S3 tells no checksum with a range, whatever it covers.
        is_whole = (start, stop) == (0, version.size) and stop <= WHOLE_BYTES
        span = "" if is_whole else f"bytes={start}-{stop - 1}"
        pin = Pin.of(version)
        with map_errors(what, pinned=True):
            answer = site.get(version.bucket, version.key, span, pin)
            is_framed = pin.check_range(answer.headers, range(start, stop), what, answer.stream)
            body = RangeBody(answer.stream, stop - start, lambda: self.replicas.failed(number), is_framed=is_framed)
        checksum = self._checksum_from(answer.headers) if is_whole else None
        return CheckedBody(body, stop, checksum, what) if checksum else body

    def checksum(self, version: ObjectVersion) -> Checksum | None:
        """By what the server vouches for all bytes of this version, if it does. Raises as :meth:`open_range`."""

        def ask(number: int) -> Mapping[str, str]:
            site = self._endpoints[number]
            with map_errors(self._what(version.key, version.bucket), pinned=True):
                pin = Pin.of(version)
                answer = site.client.head_object(Bucket=version.bucket, Key=version.key, **pin.options, **site.mode)
                headers: Mapping[str, str] = answer["ResponseMetadata"]["HTTPHeaders"]
                pin.check_version(headers, self._what(version.key, version.bucket))
            return headers

        return self._checksum_from(self._ask_again(ask, may_lag=True))

    def _checksum_from(self, headers: Mapping[str, str]) -> Checksum | None:
        return checksum_from_headers(headers, md5_etags=self._settings.md5_etags)
