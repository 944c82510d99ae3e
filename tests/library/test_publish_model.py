"""Publication against a model of its promises: publishers that are killed at any request, and resume, and race."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from obsfs.errors import ExistsError
from obsfs.library import catalog
from obsfs.library.manifest import ModelInfo
from obsfs.library.names import LEASE, parse_model
from obsfs.library.publish import Details, Publication
from obsfs.store.memory import MemoryStore, Request
from obsfs.store.parts import PART

_NAME = parse_model("obs://memory/m")
_CONTENTS = [b"", b"one", b"two", b"1" * (PART + 5), b"2" * (PART + 5)]
"""The two large ones are sent in parts, or copied in parts from another version."""
_FILES = st.dictionaries(
    st.sampled_from(["config.json", "a.bin", "sub/b.bin"]), st.sampled_from(range(len(_CONTENTS))), min_size=1
)
_VERSIONS = st.sampled_from(["v1", "v2"])


class Killed(BaseException):
    """The publisher's process is killed."""


@dataclass(frozen=True)
class MemoryFile:
    path: str
    data: bytes
    sha256: str = ""

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


class PublicationModel(RuleBasedStateMachine):
    """Each version holds the files of one publisher, whole, or does not exist; and it never changes."""

    @initialize()
    def begin(self) -> None:
        self.store = MemoryStore()
        self.home = Path(tempfile.mkdtemp(prefix="obsfs-publish-"))
        self.tried: dict[str, list[dict[str, bytes]]] = {}
        self.published: dict[str, dict[str, bytes]] = {}

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "home", ""), ignore_errors=True)

    @rule(
        version=_VERSIONS,
        files=_FILES,
        publisher=st.sampled_from("AB"),
        killed_at=st.one_of(st.none(), st.integers(1, 40)),
        is_answered=st.booleans(),
    )
    def publish(
        self, version: str, files: Mapping[str, int], publisher: str, killed_at: int | None, is_answered: bool
    ) -> None:
        """Publish, and be killed at some request: before the server does it, or after it."""
        wanted = {path: _CONTENTS[number] for path, number in files.items()}
        self.tried.setdefault(version, []).append(wanted)
        count = 0

        def hook(request: Request) -> None:
            nonlocal count
            count += 1
            if killed_at is not None and count >= killed_at:
                raise Killed

        before = self.published.get(version)
        try:
            publication = self.publication(version, wanted, publisher)
            if is_answered:
                self.store.after = hook
            else:
                self.store.before = hook
            manifest = publication.run()
        except Killed:
            return
        except ExistsError:
            has_lease = f"{_NAME.at(version).prefix}{LEASE}" in self.store
            assert has_lease or (before is not None and before != wanted)
            return
        finally:
            self.store.before = self.store.after = lambda request: None
        assert {file.path for file in manifest.files} == set(wanted)
        assert before in (None, wanted)
        assert self.visible(version) == wanted
        if before is None:
            left = [key for key, _ in self.store.list_uploads(_NAME.at(version).prefix)]
            assert not set(left) & {f"{_NAME.at(version).prefix}{path}" for path in wanted}

    @rule(version=_VERSIONS)
    def lease_ends(self, version: str) -> None:
        """The lease of a killed publisher becomes old enough to be taken over."""
        self.store.delete(f"{_NAME.at(version).prefix}{LEASE}")

    @invariant()
    def versions_are_whole_and_never_change(self) -> None:
        for version in ("v1", "v2"):
            found = self.visible(version)
            if version in self.published:
                assert found == self.published[version]
            elif found is not None:
                assert found in self.tried[version]
                self.published[version] = found

    def publication(self, version: str, files: Mapping[str, bytes], publisher: str) -> Publication:
        return Publication(
            self.store,
            _NAME.at(version),
            [MemoryFile(path, data) for path, data in sorted(files.items())],
            Details(publisher, "test", "", ModelInfo()),
            self.home / f"{publisher}-{version}.json",
            connections=1,
            retry_timeout=0,
        )

    def visible(self, version: str) -> dict[str, bytes] | None:
        """What a reader of the manifest gets; None if the version is not published."""
        model = catalog.read_model(self.store, _NAME.at(version))
        if model is None:
            return None
        found = {}
        for file in model.manifest.files:
            data = (
                self.store.read_range(model.version_of(file, self.store.endpoint), 0, file.size) if file.size else b""
            )
            assert hashlib.sha256(data).hexdigest() == file.sha256
            found[file.path] = data
        return found


PublicationModel.TestCase.settings = settings(
    max_examples=10, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPublication = PublicationModel.TestCase
