"""S3Store does what every store does, on real servers: SeaweedFS, and rclone, which is odd in many ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from obsfs.settings import Settings
from obsfs.store import open_store
from obsfs.store.address import parse_address
from obsfs.store.base import ObjectStore
from tests.conftest import Store, rclone_server
from tests.store.conformance import ObjectStoreConformance


class TestSeaweedFS(ObjectStoreConformance):
    @pytest.fixture
    def store(self, bucket: Store) -> ObjectStore:
        return open_store(parse_address(str(bucket)), Settings.load())


class TestRclone(ObjectStoreConformance):
    is_conditional = etags_tell_parts = copies_parts = pins_copies = False

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        with rclone_server(tmp_path) as (endpoint, _):
            yield open_store(parse_address("obs://models"), Settings.load(endpoint_url=endpoint, region="us-east-1"))
