"""Every knob once: its name, flag, ``OBSFS_*`` variable, config-file key, unit, default and help.

A field ``cache_size`` is the flag ``--cache-size``, the variable ``OBSFS_CACHE_SIZE`` and the key
``cache_size`` in ``~/.config/obsfs/config.toml`` (or in the file that ``OBSFS_CONFIG`` names). The first of
these that is set wins, in that order. Secrets are no settings: see :mod:`obsfs.store.credentials`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from obsfs.errors import SettingWarning, UsageError
from obsfs.private import make_directory
from obsfs.text import is_utf8, visible

MIB = 1 << 20
UMASK = 0o022

_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PREFIXES = "kmgtpe"
_DAY = 86400
MAX_SIZE = 1 << 60
"""Bytes, 1 EiB: more than any disk or object has, and few enough for every call of the system (off_t)."""
MAX_SECONDS = 3650.0 * _DAY
"""Ten years; Python waits for 292 years at most (2^63 ns)."""
_MAX_TIMEOUT = _DAY
"""Seconds of silence. poll(2) counts milliseconds in an int: 24.8 days at most."""
_MAX_READ_AHEAD = 1 << 30
"""Bytes; FUSE_INIT has 32 bits for them (max_readahead, <linux/fuse.h>)."""
_MAX_ID = (1 << 32) - 2
"""The greatest uid or gid: 2^32 - 1 means none (chown(2))."""
_SIZE_UNITS = {f"{letter.upper()}iB": 1024**power for power, letter in reversed(list(enumerate(_PREFIXES, 1)))}
_TIME_UNITS = {unit: _TIMES[unit] for unit in ("d", "h", "m", "s")}
_PREFIX = "OBSFS_"
_OTHER_VARIABLES = ("CONFIG", "DEBUG", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "SUPERVISOR_FD")
"""Variables of ours that are not settings."""
RENAMED = {"engine": "fuse_backend"}
"""Old names of settings and the present ones. The old ones still work in this version, with a warning."""
_ALIKE = 0.7
"""How alike (difflib's ratio) two names after ``OBSFS_`` must be for one to be a typo of the other."""
_ALIKE_PREFIX = 0.8
_LEAST_PART = 3
"""Letters of a name that may stand for a longer one that has it in it."""
_LONG_NAME = 8
"""Letters, from which on two of them may be wrong."""
_MAX_QUOTED = 200
"""Characters of a value that an error quotes."""
_SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def parse_seconds(value: object) -> float:
    """Seconds from a number or from text such as ``90``, ``500ms``, ``5m``, ``2h`` or ``7d``.

    Raises ValueError for anything else, a negative time, and one of more than ten years.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|[smhdw]?)\s*", str(value))
    if match is None:
        raise ValueError(f"{str(value)!r} is not a time; write for example 90, 500ms, 5m, 2h or 7d")
    seconds = float(match[1]) * _TIMES[match[2]]
    if seconds > MAX_SECONDS:
        raise ValueError(f"it must be at most {_amount(MAX_SECONDS, 'TIME')}")
    return seconds


def parse_size(value: object) -> int:
    """Bytes from a number or from text such as ``500MB`` (a million each) or ``1GiB`` (1024 each time).

    Raises ValueError for anything else, a negative size, and one of more than 1 EiB.
    """
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:([{_PREFIXES}])(i?))?b?\s*", str(value).lower())
    if match is None:
        raise ValueError(f"{str(value)!r} is not a size; write for example 500MB or 1GiB")
    power = _PREFIXES.index(match[2]) + 1 if match[2] else 0
    size = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)
    if size > MAX_SIZE:
        raise ValueError(f"it must be at most {_amount(MAX_SIZE, 'SIZE')}")
    return size


def _amount(number: float, metavar: str) -> str:
    """A bound in the largest unit of which it has a whole number: ``16MiB``, ``1d``."""
    units = {"SIZE": _SIZE_UNITS, "TIME": _TIME_UNITS}.get(metavar, {})
    unit, size = next(((unit, size) for unit, size in units.items() if number and number % size == 0), ("", 1))
    return f"{number / size:.0f}{unit}" if unit else f"{number:g}" if number % 1 else f"{number:.0f}"


def _octal(value: object) -> object:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"0?o?[0-7]{1,3}", value) is None:
        raise ValueError(f"{value!r} is not an octal mask; write for example 022")
    return int(value, 8)


def _expand(value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("it must be text")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no such user") from None


def _joined(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _library(value: object) -> object:
    if isinstance(value, str) and re.match(r"\w+://\S", value) is None:
        raise ValueError("write obs://BUCKET or obs://BUCKET/PREFIX")
    return value


def _same(value: object) -> object:
    return value


def _size_or_auto(value: object) -> object:
    return None if value is None or str(value).strip().lower() == "auto" else parse_size(value)


def _switch(value: object) -> object:
    if isinstance(value, str) and value.lower() not in _SWITCHES:
        raise ValueError(f"{value!r} is neither on nor off")
    return _SWITCHES[value.lower()] if isinstance(value, str) else value


def _fuse_backend(value: object) -> object:
    if value == "fusepy":
        _warn("the FUSE backend 'fusepy' has a new name", "write 'libfuse'")
        return "libfuse"
    return value


class _Kind(NamedTuple):
    """Of a type: how its values are read from text, and what --help calls them."""

    read: Callable[[object], object]
    metavar: str | None = None


class GivenValue(NamedTuple):
    """The value of a setting, and what was written before it, such as ``-o cache_size=``."""

    place: str
    value: Any


def keywords(given: Mapping[str, Any], function: Callable[..., Any] | None = None) -> dict[str, GivenValue]:
    """Settings as a program gives them, so that an error names ``cache_size=`` and no flag.

    Raises UsageError for a name that is not one, with what is like it of `function`'s own arguments, too.
    """
    if function is not None and (unknown := [name for name in given if not is_setting(name)]):
        own = list(inspect.signature(function).parameters)[:-1]  # the last takes the settings
        hint = did_you_mean(unknown[0], [*own, *knobs()]) or "see its arguments, and the fields of obsfs.Settings"
        raise UsageError(f"{function.__name__} has no argument {unknown[0]!r}", hint)
    return {name: GivenValue(f"{name}=", value) for name, value in given.items()}


Several = Annotated[str | None, _Kind(_joined)]
"""Text; several are separated by commas."""
Number = Annotated[int, _Kind(_same, "N")]
Size = Annotated[int, _Kind(parse_size, "SIZE")]
OptionalSize = Annotated[Annotated[int, Meta(ge=0)] | None, _Kind(_size_or_auto, "SIZE")]
"""Bytes; None, which is also written ``auto``, leaves the choice to whom it is for."""
CacheSize = Annotated[Annotated[int, Meta(ge=16 * MIB)] | None, _Kind(_size_or_auto, "SIZE")]
Seconds = Annotated[float, _Kind(parse_seconds, "TIME")]
Octal = Annotated[int, _Kind(_octal, "OCTAL"), Meta(ge=0, le=0o777)]
Owner = Annotated[Annotated[int, Meta(ge=0, le=_MAX_ID)] | None, _Kind(_same, "N")]
LocalPath = Annotated[Path, _Kind(_expand)]
Library = Annotated[str | None, _Kind(_library)]
Switch = Annotated[bool, _Kind(_switch)]
FuseBackend = Annotated[Literal["native", "libfuse"], _Kind(_fuse_backend)]


def config_path() -> Path:
    """The config file: ``OBSFS_CONFIG``, or ``obsfs/config.toml`` in the XDG config directory."""
    if chosen := os.environ.get("OBSFS_CONFIG"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "obsfs" / "config.toml"


def state_home() -> Path:
    """Where :func:`state_dir` is, or would be."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser().absolute() / "obsfs"


def state_dir() -> Path:
    """What outlives a process and is no cache: ``$XDG_STATE_HOME/obsfs``, by default ``~/.local/state/obsfs``.

    Made if it is not there; nobody else can look into it. Raises UsageError.
    """
    path = state_home()
    try:
        make_directory(path, "state directory", "set XDG_STATE_HOME to another place")
    except OSError as error:
        raise UsageError(f"{path} cannot be made ({error.strerror})", "set XDG_STATE_HOME") from None
    return path


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "obsfs"


def _knob(default: Any, text: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be chosen about the bucket, the cache, the engine and the mount. Sizes are bytes, times seconds.

    Build one with :meth:`load`, which turns every mistake into one :class:`~obsfs.errors.UsageError`.
    """

    # the bucket
    endpoint_url: Several = _knob(
        None,
        "S3 endpoint; may be given again for replicas of the bucket, of which the nearest healthy one "
        "serves. Default: botocore's (AWS_ENDPOINT_URL, profile), or OBS's for --region.",
    )
    region: str | None = _knob(None, "Region, for example cn-south-1.")
    profile: str | None = _knob(None, "Profile of the AWS configuration files to use.")
    no_sign_request: Switch = _knob(False, "Send no credentials (public buckets).")
    insecure_tls: Switch = _knob(
        False, "Do not verify TLS certificates: whoever is in between may read and change everything."
    )
    addressing_style: Literal["auto", "path", "virtual"] = _knob(
        "auto", "Bucket in the path or in the host name; auto knows OBS, AWS and other clouds."
    )
    md5_etags: Switch = _knob(
        True,
        "Take an ETag of 32 digits for the MD5 of an object that was put whole, and check against it what "
        "is read whole.",
    )
    library: Library = _knob(
        None, "Where the models are: obs://BUCKET/PREFIX, so that a model can be given by its name alone."
    )
    # the cache
    cache_dir: LocalPath = _knob(_default_cache_dir, "Where fetched blocks are kept (an SSD is best).")
    cache_size: CacheSize = _knob(
        None,
        "Most bytes to keep; least recently used blocks go first. Default: what the disk can give, less "
        "--cache-min-free.",
    )
    cache_min_free: OptionalSize = _knob(
        None, "Bytes of the cache's disk to leave free. Default: the larger of 5 % and 1 GiB, at most half of it."
    )
    scrub: Size = _knob(
        20 * MIB,
        "Bytes per second at which a mount reads its cache again while the disk is idle, each block once in 7 days, "
        "to find what has rotted; 0: never.",
    )
    # the engine
    connections: Annotated[Number, Meta(ge=1, le=256)] = _knob(
        64, "Most range requests in parallel; how many are used is found by measuring."
    )
    read_ahead: Size = _knob(256 * MIB, "Largest window fetched ahead of a sequential or dense reader.")
    request_timeout: Annotated[Seconds, Meta(gt=0, le=_MAX_TIMEOUT)] = _knob(
        15.0, "Longest silence of a connection before it is given up and tried again."
    )
    retry_timeout: Annotated[Seconds, Meta(ge=0)] = _knob(
        60.0, "How long a read is retried before the reader gets an I/O error."
    )
    # the mount
    metadata_ttl: Seconds = _knob(
        60.0, "How long names, sizes and listings are believed before the bucket is asked again."
    )
    max_entries: Annotated[Number, Meta(ge=1000, le=10**9)] = _knob(
        250_000,
        "Names to remember, of listings and in the kernel, beyond the directory that is being listed "
        "(about 1 KiB of memory each).",
    )
    fuse_backend: FuseBackend = _knob(
        "native", "How to talk to the kernel: native uses /dev/fuse itself, libfuse needs libfuse 3 (extra: libfuse)."
    )
    passthrough: Switch = _knob(True, "Let the kernel read fully cached files by itself (Linux 6.9 or later, root).")
    kernel_read_ahead: Annotated[Size, Meta(le=_MAX_READ_AHEAD)] = _knob(
        1 << 20,
        "The kernel's own read-ahead on the mount (set where permitted). Behind a read that is longer it "
        "asks for half as much again.",
    )
    snapshot: str | None = _knob(
        None,
        "Show the library as of a time (2026-11-25T12:00:00Z, or now), or one version of its models: what "
        "the manifests say, whatever happens in the bucket afterwards.",
    )
    allow_other: Switch = _knob(False, "Let other users of this machine read the mount.")
    uid: Owner = _knob(None, "Owner shown for every file. Default: who mounts.")
    gid: Owner = _knob(None, "Group shown for every file. Default: that of who mounts.")
    umask: Octal = _knob(UMASK, "Permission bits to take away (octal).")
    log_level: Literal["debug", "info", "warning", "error"] = _knob("info", "What the log holds.")

    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """For errors, not a setting: what was written before each value that was given, such as ``OBSFS_PROFILE=``."""

    def place(self, name: str) -> str:
        """What was written before the value of a setting, up to it: ``--profile``, ``OBSFS_PROFILE=`` and so on."""
        return self.places.get(name) or f"{knobs()[name].flag} "

    @property
    def endpoint_urls(self) -> tuple[str, ...]:
        """The endpoints that were given; what is written goes to the first."""
        return tuple(url.strip() for url in (self.endpoint_url or "").split(",") if url.strip())

    def at_first_endpoint(self) -> Settings:
        """These, for what must be known exactly: a replica may lag."""
        return replace(self, endpoint_url=next(iter(self.endpoint_urls), None))

    def to_json(self) -> dict[str, Any]:
        """For :meth:`parse`, in another process."""
        values = {name: getattr(self, name) for name in knobs()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def load(cls, **given: Any) -> Settings:
        """Settings from `given` (None means not given), the environment, the config file and the defaults.

        A value may be :class:`GivenValue`; else an error names the flag.
        Warns (SettingWarning) of a key in the file that is not a setting, and of a variable that looks like a typo.
        Raises UsageError, naming the setting and where it stands, for an unknown name or a value that does not fit.
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
        """Settings from another version of obsfs, and what was left out of them, a line each.

        What is not known here has no effect, and what does not fit is as if it was not given.
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
        """Settings from these values and the defaults. Raises UsageError as :meth:`load`."""
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
    """One setting, as it is read and shown."""

    name: str
    text: str
    default: Any
    hint: Any
    """Its type, with what is annotated."""
    group: str
    """The heading that it stands under in ``--help``."""

    @property
    def type(self) -> Any:
        """Its type, without."""
        return self.hint.__origin__ if get_origin(self.hint) is Annotated else self.hint

    @property
    def flag(self) -> str:
        """On the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be, when that is not many."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def metavar(self) -> str:
        """What stands for its value in ``--help``."""
        return self._kind.metavar or self.name.rsplit("_", 1)[-1].upper()

    def convert(self, value: object, place: str = "") -> Any:
        """A value, of text or another type.

        Raises UsageError if it does not fit; it begins with `place`, what stands before the value where it was found.
        """
        place = place or f"{self.flag} "
        if isinstance(value, str) and not value.strip():
            raise UsageError(f"{place.rstrip(' =:')} is empty", "give it a value, or leave it out")
        try:
            return msgspec.convert(self._kind.read(self._usable(value)), self.hint, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            reason = f"choose from {', '.join(self.choices)}" if self.choices else _reason(str(error), self.metavar)
            raise UsageError(f"{place}{visible(value, _MAX_QUOTED)}", reason) from None

    def _usable(self, value: object) -> object:
        """A value that no call of the system stumbles over. Raises ValueError."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("it holds a NUL")
        if isinstance(value, str) and self.type is not Path and not is_utf8(value):
            raise ValueError("it is not UTF-8")
        return value

    @property
    def _kind(self) -> _Kind:
        found = [part for part in getattr(self.hint, "__metadata__", ()) if isinstance(part, _Kind)]
        return found[0] if found else _Kind(_same)


def _reason(said: str, metavar: str) -> str:
    """What msgspec says of a value, in words for people."""
    said = said.replace("`", "")
    if bound := re.fullmatch(r"Expected (?:int|float) (>=|>|<=) ([0-9.]+)", said):
        words = {">=": "at least", ">": "more than", "<=": "at most"}
        return f"it must be {words[bound[1]]} {_amount(float(bound[2]), metavar)}"
    if kind := re.fullmatch(r"Expected (\w+)(?: \| null)?, got (\w+)", said):
        names = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
        return f"it must be {names.get(kind[1], kind[1])}"
    return said


def is_setting(name: str) -> bool:
    """Return whether this is the name of a setting, or was one in the version before (:data:`RENAMED`)."""
    return name in knobs() or name in RENAMED


@cache
def knobs() -> dict[str, Knob]:
    """All settings, by their names."""
    hints = get_type_hints(Settings, include_extras=True)
    defaults = Settings()
    group, found = "", {}
    for one in fields(Settings):
        if "help" not in one.metadata:
            continue
        group = _GROUPS.get(one.name, group)
        found[one.name] = Knob(one.name, one.metadata["help"], getattr(defaults, one.name), hints[one.name], group)
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'NAME'?`` for the known name that `name` is a typo, or a part, of; empty if there is none.

    Two words that are merely alike, such as ``revision`` and ``region``, mean two things.
    """
    names = list(known)
    for written in (name.replace("-", "_"), name):  # in a file or variable, a hyphen is often written for an underscore
        close = difflib.get_close_matches(written, [one for one in names if _is_typo(written, one)], 1, 0)
        if close:
            return f"did you mean {close[0]!r}?"
    return ""


def _is_typo(written: str, meant: str) -> bool:
    """Whether one name has the other in it, or they differ by one letter (of eight and more: two)."""
    if min(len(written), len(meant)) >= _LEAST_PART and (written in meant or meant in written):
        return True
    most = 1 if len(written) < _LONG_NAME else 2
    return abs(len(written) - len(meant)) <= most and _edits(written, meant) <= most


def _edits(one: str, other: str) -> int:
    """Letters to add, drop or replace, and neighbours to swap, to make one word another (Damerau, Levenshtein)."""
    above, last = list[int](), list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, beside in enumerate(other, 1):
            cost = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != beside))
            if row > 1 < column and letter == other[column - 2] and one[row - 2] == beside:
                cost = min(cost, above[column - 2] + 1)
            line.append(cost)
        above, last = last, line
    return last[-1]


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
    """Settings in the environment, each with what stands before its value."""
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
    """What a variable such as ``OBFS_CACHE_DIR`` or ``obsfs_cache_dir`` stands for; empty for others."""
    start, _, name = variable.upper().partition("_")
    is_close = difflib.SequenceMatcher(None, f"{start}_", _PREFIX).ratio() > _ALIKE_PREFIX
    return f"{_PREFIX}{name}" if is_close and name in known else ""


def _read_config() -> dict[str, GivenValue]:
    """Settings in the config file, each with the place it stands in."""
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
