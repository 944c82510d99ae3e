"""What is promised: each target is a ratio of two figures of one run, or one figure. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.bench import Key
from benchmarks.data import TENSOR
from benchmarks.peers import OBSFS, PEERS

_PEERS = tuple(peer.name for peer in PEERS if peer is not OBSFS)
BEST = "best peer"
"""Stands for the fastest of the file systems that people use today."""


class Target(NamedTuple):
    """The median of `figure` over that of `base`, or over a number, is `at_least` or `at_most` so much."""

    title: str
    figure: Key
    base: Key | float
    at_most: float | None = None
    at_least: float | None = None


def _speed(title: str, case: str, profile: str, other: str, at_least: float) -> Target:
    """How many times as fast obsfs is as another system."""
    return Target(title, Key(case, profile, other), Key(case, profile, "obsfs"), at_least=at_least)


def _time(title: str, case: str, profile: str, other: str, at_most: float) -> Target:
    """How many times as long obsfs takes as another system."""
    return Target(title, Key(case, profile, "obsfs"), Key(case, profile, other), at_most=at_most)


def _of(case: str, profile: str, metric: str = "seconds", system: str = "obsfs") -> Key:
    return Key(case, profile, system, metric)


_CPU_OBSFS = _of("cold_dd", "obs", "daemon_cpu_seconds_per_gb")
_CPU_BOTO3 = _of("cold_dd", "obs", "cpu_seconds_per_gb", "boto3")

TARGETS = (
    _speed("cold dd, obs: speed over boto3, 16 threads", "cold_dd", "obs", "boto3", 0.95),
    _speed("cold dd, obs: speed over rclone tuned", "cold_dd", "obs", "rclone tuned", 1.5),
    _speed("cold dd, obs: speed over s3fs-fuse", "cold_dd", "obs", "s3fs-fuse", 1.5),
    _time("cold from_pretrained, obs: time over boto3, 16 threads", "cold_load", "obs", "boto3", 1.15),
    _speed("cold from_pretrained, obs: speed over best peer", "cold_load", "obs", BEST, 1.6),
    _time("cold from_pretrained, far: time over boto3, 32 threads", "cold_load", "far", "boto3", 1.25),
    _speed("cold dd, lan: speed over boto3, 16 threads", "cold_dd", "lan", "boto3", 0.6),
    _speed("cold dd, lan: speed over best peer", "cold_dd", "lan", BEST, 1.0),
    Target("cold load_file, obs: speed over dd", _of("cold_dd", "obs"), _of("load_file", "obs"), None, 0.95),
    Target("cold, 8 threads, obs: speed over dd", _of("cold_dd", "obs"), _of("threads", "obs"), None, 0.95),
    _time("warm from_pretrained: time over ext4", "warm_load", "lan", "ext4", 1.03),
    _speed("warm dd: speed over ext4", "warm_dd", "lan", "ext4", 0.75),
    _speed("warm mmap: speed over ext4", "warm_mmap", "lan", "ext4", 0.75),
    Target("one tensor: bytes over its own", _of("tensor", "waits", "received_mib"), TENSOR / 2**20, 1.3),
    Target("one tensor: round trips waited for", _of("tensor", "waits", "waits"), 1, 4),
    Target("8 processes, obs: time over one", _of("processes", "obs"), _of("cold_load", "obs"), 1.15),
    _speed("random 1 MiB, obs: speed over boto3", "random_reads", "obs", "boto3", 0.85),
    _time("hot stat: time over ext4", "stat_hot", "obs", "ext4", 2.0),
    _time("hot ls -l: time over ext4", "ls_hot", "obs", "ext4", 2.0),
    _time("cold listing: time over the bare pages", "find_cold", "obs", "boto3", 1.5),
    _speed("push of 4 GB, obs: speed over s5cmd", "push", "obs", "s5cmd", 0.95),
    _speed("pull of 4 GB, obs: speed over s5cmd", "pull", "obs", "s5cmd", 0.95),
    _speed("pull of 4 GB, obs: speed over s5cmd and sha256sum", "pull", "obs", "s5cmd, hashed", 0.95),
    Target("500 models, obs: seconds", _of("models_cold", "obs"), 1, 3.0),
    Target("500 models, remembered: seconds", _of("models_cached", "obs"), 1, 0.3),
    _time("first step of QLoRA, cold, obs: time over s5cmd and then", "train_cold", "obs", "s5cmd", 0.7),
    _time("first step of QLoRA, warm: time over ext4", "train_warm", "obs", "ext4", 1.05),
    Target("daemon CPU per GB, cold dd, obs: over boto3", _CPU_OBSFS, _CPU_BOTO3, 1.5),
    Target("daemon memory, 20 GB streamed: MiB", _of("stream", "lan", "daemon_memory_mib"), 1, 300),
)


def check(figures: Mapping[Key, Sequence[float]]) -> list[dict[str, Any]]:
    """One row per target whose figures are there: title, value, bound, whether it is met."""
    rows = []
    for target in TARGETS:
        figure = _median(figures, target.figure)
        base = _median(figures, target.base) if isinstance(target.base, Key) else target.base
        if figure is None or base is None:
            continue
        value = figure / base
        low, high = target.at_least or 0.0, target.at_most or float("inf")
        bound = f"at least {low:g}" if target.at_least else f"at most {high:g}"
        rows.append({"title": target.title, "value": round(value, 3), "bound": bound, "met": low <= value <= high})
    return rows


def _median(figures: Mapping[Key, Sequence[float]], key: Key) -> float | None:
    names = _PEERS if key.system == BEST else (key.system,)
    found = [statistics.median(values) for name in names if (values := figures.get(key._replace(system=name)))]
    return min(found) if found else None
