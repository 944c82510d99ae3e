"""Whose listing is shown again: that of the same bucket, endpoint and keys, and of no other."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from obsfs.library import catalog_cache
from obsfs.settings import Settings

_DOCUMENT = {"library": "obs://models", "endpoint": "e", "models": [], "problems": []}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", endpoint_url="http://a")


def test_another_setting_of_the_mount_changes_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog_cache.save(settings, "obs://models", _DOCUMENT)
    for name in ("OBSFS_CACHE_SIZE", "OBSFS_CONNECTIONS", "OBSFS_LOG_LEVEL", "OBSFS_SUPERVISOR_FD"):
        monkeypatch.setenv(name, "7")
    other = dataclasses.replace(settings, connections=3, read_ahead=1, umask=0)
    assert catalog_cache.load(other, "obs://models") == _DOCUMENT


@pytest.mark.parametrize(
    "name",
    [
        "OBSFS_ACCESS_KEY_ID",
        "OBSFS_SECRET_ACCESS_KEY",
        "OBSFS_SESSION_TOKEN",
        "HUAWEICLOUD_SDK_AK",
        "HUAWEICLOUD_SDK_SECURITY_TOKEN",
        "AWS_PROFILE",
        "AWS_ACCESS_KEY_ID",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ROLE_ARN",
    ],
)
def test_other_keys_have_a_listing_of_their_own(name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    catalog_cache.save(settings, "obs://models", _DOCUMENT)
    monkeypatch.setenv(name, "other")
    assert catalog_cache.load(settings, "obs://models") is None
    del os.environ[name]
    assert catalog_cache.load(settings, "obs://models") == _DOCUMENT


@pytest.mark.parametrize(
    "change", [{"endpoint_url": "http://b"}, {"profile": "p"}, {"region": "r"}, {"no_sign_request": True}]
)
def test_another_place_has_a_listing_of_its_own(change: dict[str, object], settings: Settings) -> None:
    catalog_cache.save(settings, "obs://models", _DOCUMENT)
    assert catalog_cache.load(dataclasses.replace(settings, **change), "obs://models") is None  # type: ignore[arg-type]
    assert catalog_cache.load(settings, "obs://models/a") is None
