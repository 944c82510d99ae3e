"""Where things are: ``obs://bucket/prefix``, endpoints by region, and keys against names in a directory."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from obsfs.errors import UsageError

SCHEMES = ("obs", "s3")
NAME_MAX = 255
"""Bytes in a file name, as Linux has it (``<linux/limits.h>``)."""

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html; OBS has the same rules.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-_]{1,61}[a-z0-9]", re.IGNORECASE)
_VIRTUAL_HOSTED = (".myhuaweicloud.com", ".amazonaws.com", ".amazonaws.com.cn", ".aliyuncs.com", ".myqcloud.com")


@dataclass(frozen=True)
class Address:
    """A place in a bucket. `prefix` is empty or ends with ``/``."""

    scheme: str
    bucket: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


def parse_address(url: str) -> Address:
    """``obs://bucket[/prefix]`` (or ``s3://``) as an Address. Raises UsageError for anything else."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise UsageError(f"{url!r} is no bucket address", "write obs://BUCKET or obs://BUCKET/PREFIX")
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"{bucket!r} is no bucket name", "3 to 63 letters, digits, dots and hyphens, as in obs://models"
        )
    prefix = prefix.rstrip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/") if prefix) or "\0" in prefix:
        raise UsageError(f"{prefix!r} is no usable prefix", "empty, '.' and '..' components are not allowed")
    return Address(scheme, bucket, f"{prefix}/" if prefix else "")


def obs_endpoint(region: str) -> str:
    """The OBS endpoint of a region, per https://developer.huaweicloud.com/intl/en-us/endpoint?OBS."""
    if not re.fullmatch(r"[a-z0-9-]+", region):
        raise UsageError(f"{region!r} is no region", "write for example --region cn-south-1")
    return f"https://obs.{region}.myhuaweicloud.com"


def check_endpoint(url: str) -> str:
    """The endpoint as it is used and shown. Raises UsageError when it is no URL, or holds a secret."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise UsageError("the endpoint is no http:// or https:// URL", "write for example https://HOST:PORT")
    if parts.username or parts.password or parts.query:
        raise UsageError("the endpoint URL holds a user, password or query", "give the keys in AWS_ACCESS_KEY_ID")
    return url.rstrip("/")


def is_aws(endpoint_url: str) -> bool:
    """Whether an endpoint is Amazon's own S3."""
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def is_obs(endpoint_url: str) -> bool:
    """Whether an endpoint is Huawei Cloud's OBS."""
    return (urlsplit(endpoint_url).hostname or "").endswith(".myhuaweicloud.com")


def addressing_style(endpoint_url: str) -> str:
    """``virtual`` where the cloud is known to want the bucket in the host name, else ``path``."""
    host = urlsplit(endpoint_url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "virtual" if f".{host}".endswith(_VIRTUAL_HOSTED) else "path"
    return "path"


def is_valid_name(name: str) -> bool:
    """Whether a directory can show a name: not empty, ``.`` or ``..``, no ``/`` or NUL, 255 bytes at most."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode()) <= NAME_MAX
    except UnicodeEncodeError:
        return False
