"""The requests we make to a bucket, through botocore: list, head, and ranges read into buffers that we own.

Every failure becomes one of :mod:`obsfs.errors`, so that nobody above knows botocore. Nothing is retried here:
the fetch engine decides that, because it knows who is waiting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ProfileNotFound

from obsfs.errors import ObsfsError, UnavailableError, UsageError, VersionChangedError
from obsfs.remote import address as addresses
from obsfs.remote.address import Address
from obsfs.remote.credentials import Keys, explicit_keys
from obsfs.remote.failures import translated
from obsfs.remote.ranges import RangeAnswer, RangeBody, RangeSender
from obsfs.settings import Settings

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
    with translated("the configuration"):
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
        if settings.no_sign_request:
            credentials = None
        elif keys:
            credentials = Credentials(keys.access_key, keys.secret_key, keys.token)
        else:
            credentials = connection.session.get_credentials()
        self._ranges = RangeSender(self._client, credentials)

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
            with translated(f"{self.address.scheme}://{self.name}/{prefix}"):
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
        with translated(f"{self.address.scheme}://{self.name}/{key}"):
            answer = self._client.head_object(Bucket=self.name, Key=key)
        return ObjectInfo(key, answer["ContentLength"], _epoch(answer.get("LastModified")), answer.get("ETag", ""))

    def open_range(self, version: ObjectVersion, start: int, stop: int) -> RangeBody:
        """Bytes ``[start, stop)`` of exactly this version.

        Raises VersionChangedError when the object was replaced or deleted, and UnavailableError when what the
        server says it sends (Content-Range, length, ETag) is not what was asked for, whatever its status.
        """
        what = f"{self.address.scheme}://{version.bucket}/{version.key}"
        span = f"bytes={start}-{stop - 1}"
        with translated(what, pinned=True):
            answer = self._ranges.send(version.bucket, version.key, span, version.etag)
            if answer is None:
                match = {"IfMatch": version.etag} if version.etag else {}
                got = self._client.get_object(Bucket=version.bucket, Key=version.key, Range=span, **match)
                answer = RangeAnswer(got["ResponseMetadata"]["HTTPHeaders"], got["Body"]._raw_stream)
            body = RangeBody(answer.stream, stop - start)
            try:
                _check_range(answer.headers, version, start, stop)
            except ObsfsError:
                body.close()
                raise
        return body


def _check_range(headers: Mapping[str, str], version: ObjectVersion, start: int, stop: int) -> None:
    etag = headers.get("etag", "")
    if version.etag and etag and etag.strip('"') != version.etag.strip('"'):
        raise VersionChangedError(f"{version.key} was replaced while it was open", "open it again")
    said = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if said:
        first, last, total = (int(number) for number in said.groups())
        if total != version.size:
            raise VersionChangedError(f"{version.key} changed its size while it was open", "open it again")
        fits = (first, last + 1) == (start, stop)
    else:
        # A server that ignores Range sends everything: right only when everything was asked for.
        fits = (start, stop) == (0, version.size)
    if not fits or headers.get("content-length") != str(stop - start):
        raise UnavailableError(f"the server sent another range of {version.key} than was asked for")


def _epoch(value: datetime | None) -> float:
    return value.timestamp() if value else 0.0
