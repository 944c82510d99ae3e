"""Addresses of buckets (``obs://bucket/prefix``), endpoints by region, and which keys can be file names. Pure."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from obsfs.errors import UsageError
from obsfs.text import is_utf8

SCHEMES = ("obs", "s3")
NAME_MAX = 255
"""Bytes in a file name on Linux, at most (``<linux/limits.h>``)."""

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html; OBS has the same rules.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-_]{1,61}[a-z0-9]", re.IGNORECASE)
_OBS = (".myhuaweicloud.com", ".myhuaweicloud.eu")
_AWS = (".amazonaws.com", ".amazonaws.com.cn")
PROVIDERS = (*_OBS, *_AWS, ".aliyuncs.com", ".myqcloud.com")
"""Ends of the host names of known clouds, which want the bucket in the host name."""

# huaweicloudsdkobs 3.1.219, region/obs_region.py, and rclone's backend/s3/provider/HuaweiOBS.yaml.
OBS_REGIONS = (
    *("af-north-1", "af-south-1", "ap-southeast-1", "ap-southeast-2", "ap-southeast-3", "ap-southeast-4"),
    *("ap-southeast-5", "cn-east-2", "cn-east-3", "cn-east-4", "cn-east-5", "cn-north-1", "cn-north-2", "cn-north-4"),
    *("cn-north-9", "cn-north-11", "cn-north-12", "cn-south-1", "cn-south-2", "cn-south-4", "cn-southwest-2"),
    *("cn-southwest-3", "eu-west-101", "la-north-2", "la-south-2", "me-east-1", "na-mexico-1", "ru-northwest-2"),
    *("sa-argentina-1", "sa-brazil-1", "sa-chile-1", "sa-peru-1", "tr-west-1"),
)
_EUROPE = "eu-west-101"
"""The one region under ``.eu`` (the same sources)."""


@dataclass(frozen=True)
class Address:
    """A place in a bucket. `prefix` is empty or ends with ``/``."""

    scheme: str
    bucket: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


def check_text(url: object) -> None:
    """Raise TypeError for anything but text, such as a path, which would lose a slash of ``obs://``."""
    if not isinstance(url, str):
        raise TypeError(f"an address in a bucket is text, as in 'obs://models', not {type(url).__name__}")


def parse_address(url: str) -> Address:
    """Parse ``obs://bucket[/prefix]`` (or ``s3://``). Raises UsageError for any other text."""
    check_text(url)
    scheme, separator, rest = url.partition("://")
    meant = _meant(url)
    if not separator or scheme not in SCHEMES:
        raise UsageError(f"{hide_secrets(url)!r} is no bucket address", meant or _FORM)
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"{hide_secrets(url)!r} has {'no bucket name' if not bucket else 'a bucket name that none can have'}",
            meant or "3 to 63 letters, digits, dots and hyphens, as in obs://models",
        )
    prefix = prefix.rstrip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/") if prefix) or "\0" in prefix:
        raise UsageError(f"{prefix!r} is no usable prefix", "empty, '.' and '..' components are not allowed")
    if not is_utf8(prefix):
        raise UsageError(f"{prefix!r} is no usable prefix", "keys are UTF-8, and it holds other bytes")
    return Address(scheme, bucket, f"{prefix}/" if prefix else "")


_FORM = "write obs://BUCKET or obs://BUCKET/PREFIX"
_ALMOST = re.compile(r"(?:(obs|s3)[an]?:?/+|(obs|s3):)?([^/:?#@]+)(/[^?#]*)?", re.IGNORECASE)


def _meant(url: str) -> str:
    """Return what to write instead of text that is not an address: for a browser's URL its bucket and endpoint, say."""
    text = url.strip()
    try:
        parts = urlsplit(text)
        host, path = parts.hostname or "", parts.path.strip("/")
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return _FORM
    if parts.scheme in ("http", "https"):
        if host.startswith("console."):
            return "that is a web console: write obs://BUCKET and --region REGION"
        end = next((end for end in PROVIDERS if host.endswith(end)), "")
        labels = host.removesuffix(end).split(".")
        bucket = ".".join(labels[:-2]) if end and len(labels) > 2 else ""  # BUCKET.obs.REGION
        if bucket:
            host, path = host.removeprefix(f"{bucket}."), f"{bucket}/{path}".rstrip("/")
        region = region_of(host)
        where = f"--region {region}" if region else f"--endpoint-url {parts.scheme}://{host}{port}"
        return f"write {'s3' if end in _AWS else 'obs'}://{path or 'BUCKET'} and {where}"
    found = _ALMOST.fullmatch(text)
    if found is None or not _BUCKET.fullmatch(found[3]):
        return ""
    scheme = (found[1] or found[2] or "obs").lower()
    meant = f"{scheme}://{found[3]}{(found[4] or '').rstrip('/')}"
    return f"did you mean {meant}?" if meant != url else ""


def hide_secrets(url: str) -> str:
    """Return a user's URL without the user name, password and query that it may hold."""
    start, separator, rest = url.partition("://")
    place = (rest if separator else url).partition("?")
    shown = f"{'…@' if '@' in place[0].partition('/')[0] else ''}{place[0].partition('/')[0].rpartition('@')[2]}"
    path = place[0].partition("/")
    return f"{start + separator if separator else ''}{shown}{path[1]}{path[2]}{'?…' if place[1] else ''}"


def obs_endpoint(region: str, place: str = "--region ") -> str:
    """Return the OBS endpoint of a region (https://developer.huaweicloud.com/intl/en-us/endpoint?OBS).

    Args:
        region: A region of Huawei Cloud.
        place: What the user wrote before the region, for the error.

    Raises:
        UsageError: It cannot be a region.
    """
    if not re.fullmatch(r"[a-z0-9-]+", region):
        raise UsageError(f"{place}{region}: that is no region of OBS", "write for example --region cn-south-1")
    return f"https://obs.{region}{_OBS[region == _EUROPE]}"


def check_endpoint(url: str, place: str = "--endpoint-url ") -> str:
    """Return an endpoint as it is used and shown.

    Args:
        url: What the user wrote.
        place: What the user wrote before it, for the error.

    Raises:
        UsageError: It is not a URL, or it holds a secret.
    """
    shown = f"{place}{hide_secrets(url)}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"{shown}: that is no http:// or https:// URL", "write for example https://HOST:PORT")
    if parts.username or parts.password or parts.query:
        raise UsageError(
            f"{shown}: the endpoint URL holds a user, password or query", "give the keys in AWS_ACCESS_KEY_ID"
        )
    return url.rstrip("/")


def is_aws(endpoint_url: str) -> bool:
    """Return whether an endpoint is Amazon's own S3."""
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith(_AWS)


def is_obs(endpoint_url: str) -> bool:
    """Return whether an endpoint is Huawei Cloud's OBS."""
    return (urlsplit(endpoint_url).hostname or "").endswith(_OBS)


def region_of(host: str) -> str:
    """Return the region that a host name of OBS or Amazon names, which need not exist; empty for other hosts."""
    end = next((end for end in (*_OBS, *_AWS) if host.endswith(end)), "")
    service, _, region = host.removesuffix(end).rpartition(".")
    return region if end and service.rpartition(".")[2] in ("obs", "s3", "s3-fips", "dualstack") else ""


def nearest_regions(region: str, known: Iterable[str] = OBS_REGIONS) -> list[str]:
    """Return the regions whose names are closest to one that does not exist, the closest first."""
    return difflib.get_close_matches(region, known, n=2, cutoff=0.75)


def endpoint_at(endpoint: str, bucket: str, *, region: str, host: str) -> str | None:
    """Return the endpoint that a server redirects to, if it is another one of the same cloud; else None.

    Args:
        endpoint: The endpoint that was asked.
        bucket: The bucket, which may be the first part of `host`.
        region: The region that the server named, or empty.
        host: The host that the server named, or empty.
    """
    parts = urlsplit(endpoint)
    asked = parts.hostname or ""
    end = next((end for end in (*_OBS, *_AWS) if asked.endswith(end)), "")
    if not end:
        return None
    found = host.lower().removeprefix(f"{bucket.lower()}.")
    if not found and re.fullmatch(r"[a-z0-9-]+", region):
        found = (urlsplit(obs_endpoint(region)).hostname or "") if asked.endswith(_OBS) else f"s3.{region}{end}"
    is_known = bool(re.fullmatch(r"(obs|s3|s3-fips|s3\.dualstack)\.[a-z0-9-]+", found.removesuffix(end)))
    return f"{parts.scheme}://{found}" if found.endswith(end) and is_known and found != asked else None


def addressing_style(endpoint_url: str) -> str:
    """Return ``virtual`` for clouds that want the bucket in the host name, else ``path``."""
    host = urlsplit(endpoint_url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "virtual" if f".{host}".endswith(PROVIDERS) else "path"
    return "path"


def is_valid_name(name: str) -> bool:
    """Return whether a directory can show a name: not empty, ``.`` or ``..``, no ``/`` or NUL, 255 bytes at most."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    return is_utf8(name) and len(name.encode()) <= NAME_MAX
