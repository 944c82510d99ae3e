"""Where things are: ``obs://bucket/prefix``, endpoints by region, and keys against names in a directory."""

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
"""Bytes in a file name, as Linux has it (``<linux/limits.h>``)."""

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html; OBS has the same rules.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-_]{1,61}[a-z0-9]", re.IGNORECASE)
_OBS = (".myhuaweicloud.com", ".myhuaweicloud.eu")
_AWS = (".amazonaws.com", ".amazonaws.com.cn")
PROVIDERS = (*_OBS, *_AWS, ".aliyuncs.com", ".myqcloud.com")
"""Ends of the host names of clouds whose endpoints are known; they want the bucket in the host name."""

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
    """Raise TypeError for what is no text, such as a path, which would lose a slash of ``obs://``."""
    if not isinstance(url, str):
        raise TypeError(f"an address in a bucket is text, as in 'obs://models', not {type(url).__name__}")


def parse_address(url: str) -> Address:
    """``obs://bucket[/prefix]`` (or ``s3://``) as an Address. Raises UsageError for any other text."""
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
    """What to write instead of an address that is none: for a browser's URL its bucket and endpoint, and so on."""
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
    """A URL that somebody gave, without the user, password and query that it may hold."""
    start, separator, rest = url.partition("://")
    place = (rest if separator else url).partition("?")
    shown = f"{'…@' if '@' in place[0].partition('/')[0] else ''}{place[0].partition('/')[0].rpartition('@')[2]}"
    path = place[0].partition("/")
    return f"{start + separator if separator else ''}{shown}{path[1]}{path[2]}{'?…' if place[1] else ''}"


def obs_endpoint(region: str, place: str = "--region ") -> str:
    """The OBS endpoint of a region, per https://developer.huaweicloud.com/intl/en-us/endpoint?OBS.

    `place` is what was written before the region. Raises UsageError when it cannot be one.
    """
    if not re.fullmatch(r"[a-z0-9-]+", region):
        raise UsageError(f"{place}{region}: that is no region of OBS", "write for example --region cn-south-1")
    return f"https://obs.{region}{_OBS[region == _EUROPE]}"


def check_endpoint(url: str, place: str = "--endpoint-url ") -> str:
    """The endpoint as it is used and shown. Raises UsageError when it is no URL, or holds a secret.

    `place` is what was written before it.
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
    """Whether an endpoint is Amazon's own S3."""
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith(_AWS)


def is_obs(endpoint_url: str) -> bool:
    """Whether an endpoint is Huawei Cloud's OBS."""
    return (urlsplit(endpoint_url).hostname or "").endswith(_OBS)


def region_of(host: str) -> str:
    """Return the region that a host name of OBS or Amazon names, which need not exist; empty for other hosts."""
    end = next((end for end in (*_OBS, *_AWS) if host.endswith(end)), "")
    service, _, region = host.removesuffix(end).rpartition(".")
    return region if end and service.rpartition(".")[2] in ("obs", "s3", "s3-fips", "dualstack") else ""


def nearest_regions(region: str, known: Iterable[str] = OBS_REGIONS) -> list[str]:
    """Return the regions whose names are most like one that does not exist, the most alike first."""
    return difflib.get_close_matches(region, known, n=2, cutoff=0.75)


def endpoint_at(endpoint: str, bucket: str, *, region: str, host: str) -> str | None:
    """Return the endpoint that a server has sent us to, if it is another one of the same cloud; else None.

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
    """``virtual`` where the cloud is known to want the bucket in the host name, else ``path``."""
    host = urlsplit(endpoint_url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "virtual" if f".{host}".endswith(PROVIDERS) else "path"
    return "path"


def is_valid_name(name: str) -> bool:
    """Whether a directory can show a name: not empty, ``.`` or ``..``, no ``/`` or NUL, 255 bytes at most."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    return is_utf8(name) and len(name.encode()) <= NAME_MAX
