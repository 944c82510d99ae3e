"""fsspec's own tests for third parties, as far as they read. (Writing is s3fs's.)"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.tests.abstract import AbstractFixtures
from fsspec.tests.abstract.get import AbstractGetTests

import obsfs
from obsfs.demo.server import EmbeddedServer

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def shared(server: EmbeddedServer) -> str:
    """A bucket for all of them: SeaweedFS takes a second to make one."""
    name = f"fsspec-{os.getpid()}"
    server.client().create_bucket(Bucket=name)
    return name


class TestGet(AbstractGetTests, AbstractFixtures):
    @pytest.fixture
    def fs(self, server: EmbeddedServer, tmp_path: Path) -> obsfs.OBSFileSystem:
        return obsfs.OBSFileSystem(cache_dir=tmp_path / "blocks", skip_instance_cache=True)

    @pytest.fixture
    def fs_path(self, shared: str) -> str:
        return f"{shared}/{next(_NUMBERS)}"

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False
