"""The requests we make to a bucket, through botocore: list, head, and ranges read into buffers that we own.

Every failure becomes one of :mod:`obsfs.errors`, so that nobody above knows botocore. Nothing is retried here:
the fetch engine decides that, because it knows who is waiting.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from urllib3.exceptions import HTTPError

from obsfs.errors import (
    ForbiddenError,
    NotFoundError,
    ObsfsError,
    UnavailableError,
    UsageError,
    VersionChangedError,
)
from obsfs.remote import address as addresses
from obsfs.remote.address import Address
from obsfs.remote.credentials import Keys, explicit_keys
from obsfs.settings import Settings

_WAKE_BYTES = 256 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One immutable version of one object: what a block in the cache belongs to. `size` is in bytes."""

    endpoint: str
    bucket: str
    key: str
    etag: str
    size: int


class ObjectInfo(NamedTuple):
    """An object as a listing or HEAD shows it: size in bytes, mtime in seconds since the epoch."""

    key: str
    size: int
    mtime: float
    etag: str


class Page(NamedTuple):
    """One page of a listing: objects directly under the prefix, and the common prefixes (ending in ``/``)."""

    objects: list[ObjectInfo]
    prefixes: list[str]
    is_last: bool = True


class RangeBody:
    """The body of one range request, to be read in order. Close it when done, also when it was read in part."""

    def __init__(self, body: Any, length: int) -> None:
        self._left = length
        self._response = body._raw_stream
        # urllib3's readinto reads into bytes of its own and copies them; http.client's fills the buffer it is given.
        inner = getattr(self._response, "_fp", None)
        self._readinto = inner.readinto if isinstance(inner, HTTPResponse) else self._response.readinto
        self._socket = getattr(self._response.connection, "sock", None)

    def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` whole. Raises UnavailableError when the body stalls, breaks off or ends early."""
        filled, wanted = 0, len(buffer)
        # Fewer, larger wake-ups, as long as more is to come than they wait for.
        self._wake_at(_WAKE_BYTES if self._left - wanted >= _WAKE_BYTES else 1)
        with _translated("read"):
            while filled < wanted:
                count = self._readinto(buffer[filled:])
                if not count:
                    raise UnavailableError(f"the server closed a body {self._left - filled} bytes early")
                filled += count
        self._left -= filled

    def _wake_at(self, size: int) -> None:
        if self._socket is not None:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
            except OSError:
                self._socket = None

    def close(self) -> None:
        """Release the connection: for the next request when the body was read whole, else by closing it."""
        if self._left:
            self._response.close()
        else:
            self._response.release_conn()


@dataclass(frozen=True)
class Connection:
    """How a bucket is spoken to, resolved from settings, environment and profile; see :func:`connect`."""

    session: Any
    endpoint: str
    region: str
    keys: Keys | None
    """Keys to hand over, or None: botocore's own chain finds (and refreshes) them."""
    config: dict[str, Any]
    """Keyword arguments of ``botocore.config.Config`` for this endpoint: signing, checksums, addressing style."""


def connect(settings: Settings, scheme: str = "obs", keys: Keys | None = None) -> Connection:
    """Find endpoint, region, credentials (unless `keys` are given) and addressing. Asks no server.

    Raises UsageError for a profile that does not exist, half a key pair, or an endpoint that cannot be known.
    """
    with _translated("the configuration"):
        try:
            session = botocore.session.Session(profile=settings.profile)
            session.get_scoped_config()
        except ProfileNotFound:
            raise UsageError(f"profile {session.profile!r} not found", "see `aws configure list-profiles`") from None
        region = settings.region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
        endpoint = addresses.check_endpoint(settings.endpoint_url or _default_endpoint(session, scheme, region))
        config: dict[str, Any] = {}
        if settings.no_sign_request:
            config["signature_version"] = UNSIGNED
        elif keys is None:
            keys = explicit_keys(
                profile=settings.profile,
                on_obs=addresses.is_obs(endpoint),
                chain_has_keys=session.get_credentials() is not None,
            )
        if not addresses.is_aws(endpoint):
            # botocore's newer default checksums are refused by OBS and others (README, "Endpoints").
            config["request_checksum_calculation"] = "when_required"
            config["response_checksum_validation"] = "when_required"
        style = settings.addressing_style
        config["s3"] = {"addressing_style": addresses.addressing_style(endpoint) if style == "auto" else style}
        return Connection(session, endpoint, region or "us-east-1", keys, config)


def _default_endpoint(session: Any, scheme: str, region: str | None) -> str:
    probe = session.create_client("s3", region_name=region or "us-east-1", config=Config(signature_version=UNSIGNED))
    configured = str(probe.meta.endpoint_url)
    if not addresses.is_aws(configured):
        return configured
    if scheme == "s3" and (region is None or region in session.get_available_regions("s3")):
        return configured
    if region is None:
        raise UsageError(
            "the endpoint of the bucket is not known",
            "give --region cn-south-1 (OBS), or --endpoint-url URL (any other S3 server)",
        )
    return addresses.obs_endpoint(region)


class Bucket:
    """A place in a bucket at one endpoint. Safe to use from many threads.

    Its client reaches every bucket of the endpoint: :meth:`open_range` reads the bucket that a version names.
    """

    def __init__(self, address: Address, settings: Settings, *, keys: Keys | None = None) -> None:
        self.address = address
        self.name = address.bucket
        connection = connect(settings, address.scheme, keys)
        keys = connection.keys
        config = Config(
            connect_timeout=settings.request_timeout,
            read_timeout=settings.request_timeout,
            max_pool_connections=settings.connections + 8,
            retries={"total_max_attempts": 1},
            **connection.config,
        )
        try:
            self._client = connection.session.create_client(
                "s3",
                endpoint_url=connection.endpoint,
                region_name=connection.region,
                config=config,
                aws_access_key_id=keys.access_key if keys else None,
                aws_secret_access_key=keys.secret_key if keys else None,
                aws_session_token=keys.token if keys else None,
            )
        except ValueError as error:
            raise UsageError(f"endpoint {connection.endpoint!r} cannot be used", str(error)) from None
        self.endpoint: str = connection.endpoint

    def check(self) -> Page:
        """The first page of the place. Raises what is wrong when the bucket is not there or may not be listed."""
        return next(self.list(self.address.prefix))

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """The identity of what `info` describes."""
        return ObjectVersion(self.endpoint, self.name, info.key, info.etag, info.size)

    def list(self, prefix: str, *, page_size: int = 1000) -> Iterator[Page]:
        """Pages of what lies directly under `prefix` (empty, or ending in ``/``), in the server's order."""
        token: dict[str, str] = {}
        while True:
            with _translated(f"{self.address.scheme}://{self.name}/{prefix}"):
                answer = self._client.list_objects_v2(
                    Bucket=self.name, Prefix=prefix, Delimiter="/", MaxKeys=page_size, **token
                )
            objects = [
                ObjectInfo(entry["Key"], entry["Size"], _epoch(entry.get("LastModified")), entry.get("ETag", ""))
                for entry in answer.get("Contents", ())
            ]
            is_last = not answer.get("IsTruncated")
            yield Page(objects, [entry["Prefix"] for entry in answer.get("CommonPrefixes", ())], is_last)
            if is_last:
                return
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def head(self, key: str) -> ObjectInfo:
        """The object at `key` as it is now. Raises NotFoundError."""
        with _translated(f"{self.address.scheme}://{self.name}/{key}"):
            answer = self._client.head_object(Bucket=self.name, Key=key)
        return ObjectInfo(key, answer["ContentLength"], _epoch(answer.get("LastModified")), answer.get("ETag", ""))

    def open_range(self, version: ObjectVersion, start: int, stop: int) -> RangeBody:
        """Bytes ``[start, stop)`` of exactly this version.

        Raises VersionChangedError when the object was replaced or deleted, and UnavailableError when what the
        server says it sends (Content-Range, length, ETag) is not what was asked for, whatever its status.
        """
        match = {"IfMatch": version.etag} if version.etag else {}
        with _translated(f"{self.address.scheme}://{version.bucket}/{version.key}", pinned=True):
            answer = self._client.get_object(
                Bucket=version.bucket, Key=version.key, Range=f"bytes={start}-{stop - 1}", **match
            )
        body = answer["Body"]
        try:
            _check_range(answer, version, start, stop)
        except ObsfsError:
            body.close()
            raise
        return RangeBody(body, stop - start)


def _check_range(answer: dict[str, Any], version: ObjectVersion, start: int, stop: int) -> None:
    etag = answer.get("ETag", "")
    if version.etag and etag and etag.strip('"') != version.etag.strip('"'):
        raise VersionChangedError(f"{version.key} was replaced while it was open", "open it again")
    said = _CONTENT_RANGE.fullmatch(answer.get("ContentRange") or "")
    if said:
        first, last, total = (int(number) for number in said.groups())
        if total != version.size:
            raise VersionChangedError(f"{version.key} changed its size while it was open", "open it again")
        fits = (first, last + 1) == (start, stop)
    else:
        # A server that ignores Range sends everything: right only when everything was asked for.
        fits = (start, stop) == (0, version.size)
    if not fits or answer.get("ContentLength") != stop - start:
        raise UnavailableError(f"the server sent another range of {version.key} than was asked for")


def _epoch(value: datetime | None) -> float:
    return value.timestamp() if value else 0.0


@contextmanager
def _translated(what: str, *, pinned: bool = False) -> Iterator[None]:
    """Turn botocore's and urllib3's exceptions into ours. `pinned`: absence means that a version is gone."""
    try:
        yield
    except ObsfsError:
        raise
    except (NoCredentialsError, PartialCredentialsError):
        raise ForbiddenError(
            "no credentials found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or HUAWEICLOUD_SDK_AK and _SK), "
            "use --profile, or --no-sign-request for a public bucket",
        ) from None
    except ClientError as error:
        raise _from_response(error, what, pinned) from None
    except BotoConnectionError as error:
        raise UnavailableError(f"cannot reach the server for {what}", _reason(error)) from None
    except (BotoCoreError, HTTPError, HTTPException, OSError) as error:
        raise UnavailableError(f"request for {what} failed", _reason(error)) from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _from_response(error: ClientError, what: str, pinned: bool) -> ObsfsError:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    # 416 for a range inside the size we know means that the object is shorter now.
    if status in (412, 416) or (pinned and status == 404 and code != "NoSuchBucket"):
        return VersionChangedError(f"{what} was replaced or deleted while it was open", "open it again")
    if code == "NoSuchBucket":
        return NotFoundError(f"bucket of {what} does not exist", "check the name, the region and the endpoint")
    if status == 404:
        return NotFoundError(f"{what} does not exist", "check the name, the region and the endpoint")
    if status in (401, 403):
        return ForbiddenError(f"access to {what} denied ({code})", "check the credentials and what they allow")
    if status in (301, 307, 400) and code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return UsageError(f"{what} lives in another region ({code})", "give its --region")
    return UnavailableError(f"server answered {status} {code} for {what}")
