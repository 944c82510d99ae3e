"""Every knob once: its name, flag, ``OBSFS_*`` variable, config-file key, unit, default and help.

A field ``cache_size`` is the flag ``--cache-size``, the variable ``OBSFS_CACHE_SIZE`` and the key
``cache_size`` in ``~/.config/obsfs/config.toml`` (or in the file that ``OBSFS_CONFIG`` names). The first of
these that is set wins, in that order. Secrets are no settings: see :mod:`obsfs.remote.credentials`.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from obsfs.errors import UsageError

MIB = 1 << 20
UMASK = 0o022

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_seconds(value: object) -> float:
    """Seconds from a number or from text such as ``90``, ``500ms``, ``5m``, ``2h`` or ``7d``.

    Raises ValueError for anything else, and for a negative time.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|[smhdw]?)\s*", str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a time; write for example 90, 500ms, 5m, 2h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def _octal(value: object) -> int:
    if isinstance(value, int):
        return value
    try:
        return int(str(value), 8)
    except ValueError:
        raise ValueError(f"{value!r} is not an octal mask; write for example 022") from None


def _expand(value: object) -> Path:
    return Path(str(value)).expanduser().absolute()


def _joined(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


Several = Annotated[str | None, BeforeValidator(_joined)]
"""Text; several are separated by commas."""
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Octal = Annotated[int, BeforeValidator(_octal), Field(ge=0, le=0o777)]
LocalPath = Annotated[Path, BeforeValidator(_expand)]


def config_path() -> Path:
    """The config file: ``OBSFS_CONFIG``, or ``obsfs/config.toml`` in the XDG config directory."""
    if chosen := os.environ.get("OBSFS_CONFIG"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "obsfs" / "config.toml"


def state_dir() -> Path:
    """What outlives a process and is no cache: ``$XDG_STATE_HOME/obsfs``, by default ``~/.local/state/obsfs``.

    Made if it is not there. Raises UsageError.
    """
    path = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "obsfs"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made ({error.strerror})", "set XDG_STATE_HOME") from None
    return path


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "obsfs"


class Settings(BaseSettings):
    """What can be chosen about the bucket, the cache, the engine and the mount. Sizes are bytes, times seconds.

    Build one with :meth:`load`, which turns every mistake into one :class:`~obsfs.errors.UsageError`.
    """

    model_config = SettingsConfigDict(env_prefix="OBSFS_", extra="forbid", frozen=True)

    # the bucket
    endpoint_url: Several = Field(
        None,
        description="S3 endpoint; may be given again for replicas of the bucket, of which the nearest healthy one "
        "serves. Default: botocore's (AWS_ENDPOINT_URL, profile), or OBS's for --region.",
    )
    region: str | None = Field(None, description="Region, for example cn-south-1.")
    profile: str | None = Field(None, description="Profile of the AWS configuration files to use.")
    no_sign_request: bool = Field(False, description="Send no credentials (public buckets).")
    insecure_tls: bool = Field(
        False, description="Do not verify TLS certificates: whoever is in between may read and change everything."
    )
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        "auto", description="Bucket in the path or in the host name; auto knows OBS, AWS and other clouds."
    )
    md5_etags: bool = Field(
        True,
        description="Take an ETag of 32 digits for the MD5 of an object that was put whole, and check against it what "
        "is read whole.",
    )
    library: str | None = Field(
        None, description="Where the models are: obs://BUCKET/PREFIX, so that a model can be given by its name alone."
    )
    # the cache
    cache_dir: LocalPath = Field(
        default_factory=_default_cache_dir, description="Where fetched blocks are kept (an SSD is best)."
    )
    cache_size: ByteSize = Field(
        ByteSize(100 << 30), ge=16 * MIB, description="Most bytes to keep; least recently used blocks go first."
    )
    # the engine
    connections: int = Field(
        64, ge=1, le=256, description="Most range requests in parallel; how many are used is found by measuring."
    )
    read_ahead: ByteSize = Field(
        ByteSize(256 * MIB), description="Largest window fetched ahead of a sequential or dense reader."
    )
    request_timeout: Seconds = Field(
        15.0, gt=0, description="Longest silence of a connection before it is given up and tried again."
    )
    retry_timeout: Seconds = Field(
        60.0, ge=0, description="How long a read is retried before the reader gets an I/O error."
    )
    # the mount
    metadata_ttl: Seconds = Field(
        60.0, description="How long names, sizes and listings are believed before the bucket is asked again."
    )
    max_entries: int = Field(
        250_000,
        ge=1000,
        description="Names to remember, of listings and in the kernel, beyond the directory that is being listed "
        "(about 1 KiB of memory each).",
    )
    engine: Literal["native", "fusepy"] = Field(
        "native", description="native speaks to /dev/fuse itself; fusepy goes through libfuse (extra: fusepy)."
    )
    passthrough: bool = Field(
        True, description="Let the kernel read fully cached files by itself (Linux 6.9 or later, root)."
    )
    kernel_read_ahead: ByteSize = Field(
        ByteSize(1 << 20),
        description="The kernel's own read-ahead on the mount (set where permitted). Behind a read that is longer it "
        "asks for half as much again.",
    )
    snapshot: str | None = Field(
        None,
        description="Show the library as of a time (2026-11-25T12:00:00Z, or now), or one version of its models: what "
        "the manifests say, whatever happens in the bucket afterwards.",
    )
    allow_other: bool = Field(False, description="Let other users of this machine read the mount.")
    uid: int | None = Field(None, ge=0, description="Owner shown for every file. Default: who mounts.")
    gid: int | None = Field(None, ge=0, description="Group shown for every file. Default: that of who mounts.")
    umask: Octal = Field(UMASK, description="Permission bits to take away (octal).")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What the log holds.")

    @property
    def endpoint_urls(self) -> tuple[str, ...]:
        """The endpoints that were given; what is written goes to the first."""
        return tuple(url.strip() for url in (self.endpoint_url or "").split(",") if url.strip())

    def at_first_endpoint(self) -> Settings:
        """These, for what must be known exactly: a replica may lag."""
        return self.model_copy(update={"endpoint_url": next(iter(self.endpoint_urls), None)})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_path())

    @classmethod
    def load(cls, **given: Any) -> Settings:
        """Settings from `given` (None means not given), the environment, the config file and the defaults.

        Raises UsageError, naming the setting, for an unknown name or a value that does not fit.
        """
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise UsageError(f"unknown setting {name!r}", f"known are {', '.join(cls.model_fields)}") from None
            reason = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"--{name.replace('_', '-')} {first['input']}", reason) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{config_path()} is not valid TOML", str(error)) from None
        except OSError as error:
            raise UsageError(f"cannot read {config_path()}", error.strerror or str(error)) from None
