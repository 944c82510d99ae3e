"""Every setting, once: its name, flag, ``OBSFS_*`` variable, config-file key, unit, default and help.

A field ``cache_size`` is the flag ``--cache-size``, the variable ``OBSFS_CACHE_SIZE`` and the key ``cache_size`` in
``~/.config/obsfs/config.toml`` (or in the file that ``OBSFS_CONFIG`` names). The first of these that is set wins, in
that order. Secrets are not settings: see :mod:`obsfs.store.credentials`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import tomllib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from obsfs.errors import SettingWarning, UsageError
from obsfs.paths import cache_home, config_path
from obsfs.suggestions import did_you_mean
from obsfs.text import is_utf8, visible
from obsfs.values import (
    MIB,
    CacheSize,
    Kind,
    Library,
    LocalPath,
    Number,
    Octal,
    OptionalSize,
    Owner,
    Seconds,
    Several,
    Size,
    Switch,
    reason_of,
    unchanged,
)

UMASK = 0o022
_MAX_TIMEOUT = 86400
"""Seconds without data, a day. poll(2) counts milliseconds in an int: 24.8 days at most."""
_MAX_READ_AHEAD = 1 << 30
"""Bytes; FUSE_INIT has 32 bits for them (max_readahead, <linux/fuse.h>)."""
_PREFIX = "OBSFS_"
_OTHER_VARIABLES = ("CONFIG", "DEBUG", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "SUPERVISOR_FD")
"""Variables of obsfs that are not settings."""
RENAMED = {"engine": "fuse_backend"}
"""Old names of settings and the present ones. The old ones still work in this version, with a warning."""
_ALIKE = 0.7
"""How alike (difflib's ratio) two names after ``OBSFS_`` must be for one to be a typo of the other."""
_ALIKE_PREFIX = 0.8
_MAX_QUOTED = 200
"""Characters of a value that an error quotes."""


class GivenValue(NamedTuple):
    """The value of a setting, and what stands before it where it was given, such as ``-o cache_size=``."""

    place: str
    value: Any


def keywords(given: Mapping[str, Any], function: Callable[..., Any] | None = None) -> dict[str, GivenValue]:
    """Return settings that a program gives as keyword arguments, so that an error names ``cache_size=``, not a flag.

    Args:
        given: Values by the names of settings.
        function: Takes them as its last parameter. Its other arguments are suggested for a mistyped name, too.

    Raises:
        UsageError: A name is not a setting. Checked only if `function` is given.
    """
    if function is not None and (unknown := [name for name in given if not is_setting(name)]):
        own = list(inspect.signature(function).parameters)[:-1]  # the last takes the settings
        hint = did_you_mean(unknown[0], [*own, *knobs()]) or "see its arguments, and the fields of obsfs.Settings"
        raise UsageError(f"{function.__name__} has no argument {unknown[0]!r}", hint)
    return {name: GivenValue(f"{name}=", value) for name, value in given.items()}


def _fuse_backend(value: object) -> object:
    if value == "fusepy":
        _warn("the FUSE backend 'fusepy' has a new name", "write 'libfuse'")
        return "libfuse"
    return value


FuseBackend = Annotated[Literal["native", "libfuse"], Kind(_fuse_backend)]


def _knob(default: Any, text: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of the bucket, the cache, the engine and the mount. Sizes are in bytes, times in seconds.

    Make one with :meth:`load`, which reports every mistake as a :class:`~obsfs.errors.UsageError`.
    """

    # the bucket
    endpoint_url: Several = _knob(
        None,
        "URL of the S3 endpoint. Give it several times for replicas of the bucket: the nearest healthy one serves. "
        "Default: AWS_ENDPOINT_URL or the profile's, else OBS's for --region.",
    )
    region: str | None = _knob(None, "Region of the bucket, for example cn-south-1.")
    profile: str | None = _knob(None, "Profile in the AWS configuration files.")
    no_sign_request: Switch = _knob(False, "Send no credentials (for public buckets).")
    insecure_tls: Switch = _knob(
        False, "Do not verify TLS certificates. Anyone on the network path can then read and change everything."
    )
    addressing_style: Literal["auto", "path", "virtual"] = _knob(
        "auto",
        "Where the bucket's name goes in a request: in the path, or in the host name (virtual). "
        "auto knows OBS, AWS and other clouds.",
    )
    md5_etags: Switch = _knob(
        True,
        "Treat an ETag of 32 hexadecimal digits as the MD5 of the object, and check against it what is read whole. "
        "Turn it off for servers whose ETags only look like MD5s.",
    )
    library: Library = _knob(
        None, "Where your models are: obs://BUCKET/PREFIX. Verbs then also take the name of a model alone."
    )
    # the cache
    cache_dir: LocalPath = _knob(cache_home, "Directory of the block cache. Put it on a fast local disk.")
    cache_size: CacheSize = _knob(
        None,
        "Largest size of the block cache. The least recently used blocks are evicted first. "
        "Default: all of the disk but --cache-min-free.",
    )
    cache_min_free: OptionalSize = _knob(
        None,
        "Space on the cache's disk that stays free. Default: 5 % of it, 1 GiB or more, but at most half of the disk.",
    )
    scrub: Size = _knob(
        20 * MIB,
        "Bytes per second at which a mount checks its cached blocks for damage while the disk is idle. Each block is "
        "checked once in 7 days. 0 turns it off.",
    )
    # the engine
    connections: Annotated[Number, Meta(ge=1, le=256)] = _knob(
        64, "Most range requests at the same time. obsfs measures how many of them make it faster."
    )
    read_ahead: Size = _knob(256 * MIB, "Most bytes that are prefetched for a sequential or dense reader.")
    request_timeout: Annotated[Seconds, Meta(gt=0, le=_MAX_TIMEOUT)] = _knob(
        15.0, "Longest time without data from the server before a request is aborted and retried."
    )
    retry_timeout: Annotated[Seconds, Meta(ge=0)] = _knob(
        60.0, "How long a read is retried before the reader gets an I/O error."
    )
    # the mount
    metadata_ttl: Seconds = _knob(
        60.0, "How long names, sizes and listings are reused before the bucket is asked again."
    )
    max_entries: Annotated[Number, Meta(ge=1000, le=10**9)] = _knob(
        250_000,
        "Most names that a mount remembers, besides the directory that is being listed. "
        "Each takes about 1 KiB of memory.",
    )
    fuse_backend: FuseBackend = _knob(
        "native", "How to talk to the kernel: native uses /dev/fuse itself, libfuse needs libfuse 3 (extra: libfuse)."
    )
    passthrough: Switch = _knob(
        True, "Let the kernel read fully cached files itself, at the disk's speed (Linux 6.9 or later, as root)."
    )
    kernel_read_ahead: Annotated[Size, Meta(le=_MAX_READ_AHEAD)] = _knob(
        1 << 20, "Size of the kernel's own read-ahead on the mount. Setting it needs root."
    )
    snapshot: str | None = _knob(
        None,
        "Show the library as it was at a time (2026-11-25T12:00:00Z, or now), or one version of its models. "
        "Later changes in the bucket do not show.",
    )
    allow_other: Switch = _knob(False, "Let other users of this machine read the mount.")
    uid: Owner = _knob(None, "Owner (uid) of every file. Default: the user who mounts.")
    gid: Owner = _knob(None, "Group (gid) of every file. Default: the group of the user who mounts.")
    umask: Octal = _knob(UMASK, "Permission bits to remove from every file and directory (octal).")
    log_level: Literal["debug", "info", "warning", "error"] = _knob("info", "Least severe messages in the log.")

    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """For errors, not a setting: what stands before each given value, such as ``OBSFS_PROFILE=``."""

    def place(self, name: str) -> str:
        """Return what stands before the value of a setting where it was given, such as ``--profile`` (for errors)."""
        return self.places.get(name) or f"{knobs()[name].flag} "

    @property
    def endpoint_urls(self) -> tuple[str, ...]:
        """The given endpoints. Writes go to the first."""
        return tuple(url.strip() for url in (self.endpoint_url or "").split(",") if url.strip())

    def at_first_endpoint(self) -> Settings:
        """Return these settings with the first endpoint only, for reads that must not lag as a replica may."""
        return replace(self, endpoint_url=next(iter(self.endpoint_urls), None))

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON types, for :meth:`parse` in another process."""
        values = {name: getattr(self, name) for name in knobs()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def load(cls, **given: Any) -> Settings:
        """Return settings from the arguments, the environment, the config file and the defaults, in this order.

        Warns (SettingWarning) of a key in the file that is not a setting, and of a variable that looks like a typo.

        Args:
            given: Values by the names of settings; None means not given. For a plain value, an error names the flag;
                for a :class:`GivenValue`, what it says.

        Raises:
            UsageError: A name is unknown, or a value does not fit. It names the setting and where it was given.
        """
        known = knobs()
        values = {**_read_config(), **_read_variables()}
        for name, value in given.items():
            place, text = value if isinstance(value, GivenValue) else ("", value)
            if text is None:
                continue
            if name in RENAMED:
                place = place or f"--{name} "
                _warn_of_old_name(name, place)
                if given.get(RENAMED[name]) is not None:
                    continue  # the present name wins
            values[RENAMED.get(name, name)] = GivenValue(place, text)
        for name in values:
            if name not in known:
                raise UsageError(
                    f"unknown setting {name!r}", did_you_mean(name, known) or f"known are {', '.join(known)}"
                )
        places = {name: place for name, (place, _) in values.items() if place}
        return cls(**{name: known[name].convert(text, place) for name, (place, text) in values.items()}, places=places)

    @classmethod
    def adopt(cls, values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
        """Return settings from another version of obsfs, and a line for each that was left out.

        A setting that is unknown here, or whose value does not fit, is left out.
        """
        fitting, notes = {}, []
        for written, value in values.items():
            name = RENAMED.get(written, written)
            try:
                cls.parse({name: value})
                fitting[name] = value
            except UsageError as error:
                notes.append(f"setting {written} is left out: {error}")
        return cls.parse(fitting), notes

    @classmethod
    def parse(cls, values: Mapping[str, Any], places: Mapping[str, str] | None = None) -> Settings:
        """Return settings from these values and the defaults. Raises UsageError as :meth:`load`."""
        known = knobs()
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        for name in values:
            if name not in known:
                raise UsageError(f"unknown setting {name!r}", f"known are {', '.join(known)}")
        return cls(**{name: known[name].convert(value) for name, value in values.items()}, places=places or {})


_GROUPS = {"endpoint_url": "Bucket", "cache_dir": "Cache", "connections": "Fetching", "metadata_ttl": "Mount"}
"""The first setting of each group, in the order of the fields above."""


@dataclass(frozen=True)
class Knob:
    """One setting: how it is read and shown. The options reference of the docs is made from these."""

    name: str
    text: str
    default: Any
    hint: Any
    """Its type, with annotations."""
    group: str
    """Its heading in ``--help``."""

    @property
    def type(self) -> Any:
        """Its type, without annotations."""
        return self.hint.__origin__ if get_origin(self.hint) is Annotated else self.hint

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        """Its possible values, if they are few."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def metavar(self) -> str:
        """The word for its value in ``--help``."""
        return self._kind.metavar or self.name.rsplit("_", 1)[-1].upper()

    def convert(self, value: object, place: str = "") -> Any:
        """Return a value that was given, as text or another type, as its own type.

        Args:
            value: What was given.
            place: What stands before it where it was given. By default, the flag.

        Raises:
            UsageError: It does not fit. The message begins with `place`.
        """
        place = place or f"{self.flag} "
        if isinstance(value, str) and not value.strip():
            raise UsageError(f"{place.rstrip(' =:')} is empty", "give it a value, or leave it out")
        try:
            return msgspec.convert(self._kind.read(self._usable(value)), self.hint, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            reason = f"choose from {', '.join(self.choices)}" if self.choices else reason_of(str(error), self.metavar)
            raise UsageError(f"{place}{visible(value, _MAX_QUOTED)}", reason) from None

    def _usable(self, value: object) -> object:
        """Return a value that system calls accept. Raises ValueError."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("it holds a NUL")
        if isinstance(value, str) and self.type is not Path and not is_utf8(value):
            raise ValueError("it is not UTF-8")
        return value

    @property
    def _kind(self) -> Kind:
        found = [part for part in getattr(self.hint, "__metadata__", ()) if isinstance(part, Kind)]
        return found[0] if found else Kind(unchanged)


def is_setting(name: str) -> bool:
    """Return whether this is the name of a setting, or was one in the version before (:data:`RENAMED`)."""
    return name in knobs() or name in RENAMED


@cache
def knobs() -> dict[str, Knob]:
    """Return all settings, by their names, in the order of ``--help``."""
    hints = get_type_hints(Settings, include_extras=True)
    defaults = Settings()
    group, found = "", {}
    for one in fields(Settings):
        if "help" not in one.metadata:
            continue
        group = _GROUPS.get(one.name, group)
        found[one.name] = Knob(one.name, one.metadata["help"], getattr(defaults, one.name), hints[one.name], group)
    return found


def warn_of_variables() -> None:
    """Warn (SettingWarning) of each variable that looks like a mistyped setting, as :meth:`Settings.load` does."""
    _read_variables()


def _warn(message: str, remedy: str) -> None:
    warnings.warn(visible(f"{message}: {remedy}"), SettingWarning, stacklevel=4)


def _warn_of_old_name(name: str, place: str) -> None:
    """Warn (SettingWarning) of a setting written by its old `name`; `place` is what was written before its value."""
    written, new = place.rstrip(" =:"), RENAMED[name]
    if written.isupper():
        name, new = name.upper(), new.upper()
    elif written.startswith("--"):
        name, new = name.replace("_", "-"), new.replace("_", "-")
    before, _, _ = written.rpartition(name)
    _warn(f"{written} is the old name of a setting", f"write {before}{new}")


def _read_variables() -> dict[str, GivenValue]:
    """Return the settings in the environment, each with what stands before its value."""
    names = {name.upper(): name for name in knobs()}
    known = [*names, *_OTHER_VARIABLES]
    old_names = {name.upper(): name for name in RENAMED}
    found: dict[str, GivenValue] = {}
    for variable, text in os.environ.items():
        prefix, is_ours, name = variable.partition(_PREFIX)
        if not is_ours and (meant := _mistyped_prefix(variable, known)):
            _warn(f"the variable {variable} is not used", f"did you mean {meant}?")
        if prefix or not is_ours or not text or name in _OTHER_VARIABLES:
            continue
        if name in names:
            found[names[name]] = GivenValue(f"{variable}=", text)
        elif name in old_names:
            _warn_of_old_name(old_names[name], variable)
            found.setdefault(RENAMED[old_names[name]], GivenValue(f"{variable}=", text))
        elif close := difflib.get_close_matches(name.upper(), known, 1, _ALIKE):
            _warn(f"the variable {variable} is not used", f"did you mean {_PREFIX}{close[0]}?")
    return found


def _mistyped_prefix(variable: str, known: list[str]) -> str:
    """Return the variable that one such as ``OBFS_CACHE_DIR`` or ``obsfs_cache_dir`` stands for; empty for others."""
    start, _, name = variable.upper().partition("_")
    is_close = difflib.SequenceMatcher(None, f"{start}_", _PREFIX).ratio() > _ALIKE_PREFIX
    return f"{_PREFIX}{name}" if is_close and name in known else ""


def _read_config() -> dict[str, GivenValue]:
    """Return the settings in the config file, each with its place there."""
    path = config_path()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except FileNotFoundError:
        if os.environ.get("OBSFS_CONFIG"):
            raise UsageError(f"OBSFS_CONFIG={path}: there is no such file", "write one, or unset it") from None
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML", str(error)) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}", error.strerror or str(error)) from None
    found: dict[str, GivenValue] = {}
    for key, value in document.items():
        if key in knobs():
            if knobs()[key].metavar == "OCTAL" and isinstance(value, int):
                raise UsageError(f"{path}: {key} = {value}", f'write it as text, in octal: {key} = "022"')
            found[key] = GivenValue(f"{path}: {key} = ", value)
        elif key in RENAMED:
            _warn_of_old_name(key, f"{path}: {key}")
            found.setdefault(RENAMED[key], GivenValue(f"{path}: {key} = ", value))
        else:
            in_table = isinstance(value, dict) and any(name in knobs() for name in value)
            hint = f"write its keys without [{key}]" if in_table else did_you_mean(key.lower(), knobs())
            _warn(f"{path}: {key!r} is not a setting and is not used", hint or "see `obsfs mount --help`")
    return found
