"""A tiny Qwen2 for the commands and the examples."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from obsfs.demo.model import make_model

    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    make_model(directory, hidden_size=64, layers=2, vocabulary=1024, max_shard_size="300KB")
    return directory
