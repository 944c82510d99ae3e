"""botocore's session, which finds configuration and credentials and makes clients; this one starts faster."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import botocore.session
import msgspec
from botocore.config import Config
from botocore.loaders import JSONFileLoader, Loader

from obsfs.store.bounds import parse_date

_KEYS_SECONDS = 2.0


class _JSONFiles(JSONFileLoader):  # type: ignore[misc]
    """Reads botocore's own data with msgspec: 65 ms less at the start of each command."""

    def _load_file(self, full_path: str, open_method: Callable[[str, str], IO[bytes]]) -> Any:
        if not os.path.isfile(full_path):  # noqa: PTH113 - Path raises where one may not look
            return None
        with open_method(full_path, "rb") as file:
            return msgspec.json.decode(file.read())


class _Loader(Loader):  # type: ignore[misc]
    FILE_LOADER_CLASS = _JSONFiles

    def list_available_services(self, type_name: str) -> list[str]:
        """Return the directories of all services: to look into each of the 400 for its `type_name` takes 60 ms more."""
        places = [path for path in self.search_paths if os.path.isdir(path)]  # noqa: PTH112 - as above
        return sorted({path.name for place in places for path in Path(place).iterdir()})


def new_session(profile: str | None = None) -> Any:
    """Return a ``botocore.session.Session``. Its first use raises ProfileNotFound if there is no such profile."""
    session = botocore.session.Session(profile=profile)
    session.lazy_register_component("data_loader", lambda: _Loader(_extra_paths(session)))
    # For STS, SSO and others that give out keys, while nothing else can start. Our own clients have other timeouts.
    session.set_default_client_config(
        Config(connect_timeout=_KEYS_SECONDS, read_timeout=5 * _KEYS_SECONDS, retries={"total_max_attempts": 1})
    )
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_date)
    return session


def _extra_paths(session: Any) -> list[str]:
    given = session.get_config_variable("data_path") or ""
    return [str(Path(os.path.expandvars(path)).expanduser()) for path in given.split(os.pathsep) if path]
