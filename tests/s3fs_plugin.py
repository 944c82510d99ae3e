"""A plugin of pytest that has s3fs's own tests use OBSFileSystem, on a port of their own."""

from __future__ import annotations

import functools
import os
import socket

import fsspec
import pytest
from botocore.loaders import JSONFileLoader

from obsfs.filesystem import OBSFileSystem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}/"
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        module.__dict__.update(S3FileSystem=OBSFileSystem, port=port, endpoint_uri=endpoint)
    # s3fs has Amazon for a default; obs:// has none without a region.
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    fsspec.register_implementation("s3", OBSFileSystem, clobber=True)
    # Each test makes two or three sessions, and each of them parses botocore's data again: four fifths of all the time.
    load_file = functools.cache(JSONFileLoader().load_file)
    JSONFileLoader.load_file = lambda _, path: load_file(path)
