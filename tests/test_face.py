"""The public face of the package: what it shows, and what it says to arguments of a wrong type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import obsfs


def test_everything_public_is_listed_and_there() -> None:
    assert set(obsfs.__all__) <= set(dir(obsfs))
    assert all(getattr(obsfs, name) is not None for name in obsfs.__all__)


@pytest.mark.parametrize(
    "call",
    [
        lambda: obsfs.mount(Path("obs://models"), "/mnt"),  # type: ignore[arg-type]
        lambda: obsfs.mount(b"obs://models"),  # type: ignore[arg-type]
        lambda: obsfs.resolve(Path("models/m")),  # type: ignore[arg-type]
        lambda: obsfs.snapshot_download(None),  # type: ignore[call-overload]
        lambda: obsfs.push(".", Path("m")),  # type: ignore[arg-type]
    ],
)
def test_an_address_is_text(call: Callable[[], object]) -> None:
    """A path would have lost a slash of it already."""
    with pytest.raises(TypeError, match="an address in a bucket is text, as in 'obs://models', not"):
        call()
