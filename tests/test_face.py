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


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("snapshot_download", "revison", "has no argument 'revison': did you mean 'revision'?"),
        ("snapshot_download", "cach_dir", "did you mean 'cache_dir'?"),
        ("snapshot_download", "endpoint_urls", "did you mean 'endpoint_url'?"),
        ("resolve", "revision", "has no argument 'revision': see its arguments"),  # not region
        ("push", "anyfiles", "did you mean 'any_files'?"),
        ("mount", "profil", "did you mean 'profile'?"),
    ],
)
def test_a_wrong_argument_is_told_what_fits_or_nothing(name: str, given: str, said: str) -> None:
    arguments: list[str] = ["x", "obs://b/m"] if name == "push" else ["obs://b/m"]
    with pytest.raises(obsfs.ObsfsError) as error:
        getattr(obsfs, name)(*arguments, **{given: "x"})
    assert said in str(error.value)
