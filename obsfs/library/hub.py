"""A repository of Hugging Face or ModelScope as a source of a publication, read in ranges from the hub.

The hubs' own libraries find endpoints and tokens: ``HF_ENDPOINT``, ``HF_TOKEN``, ``MODELSCOPE_ENDPOINT``,
``MODELSCOPE_API_TOKEN``, and the tokens of their logins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

import urllib3

from obsfs.errors import ForbiddenError, NotFoundError, ObsfsError, UnavailableError, UsageError
from obsfs.extras import remedy
from obsfs.library import completeness
from obsfs.library import manifest as manifests
from obsfs.library.names import is_safe_path, matches_patterns
from obsfs.library.publish import Details
from obsfs.library.push import author

HUBS = ("hf", "ms")
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TIMEOUT = 60.0
_CONNECTIONS = 24
_MAX_JSON = 4 << 20
"""Most bytes of a JSON file that is checked beforehand: indexes and configurations, but not every tokenizer."""


class HubName(NamedTuple):
    """A repository of a hub at a revision (None: its default one)."""

    hub: str
    repository: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; a :class:`~obsfs.library.upload.PublishSource`."""

    path: str
    size: int
    sha256: str
    url: str
    _pool: urllib3.PoolManager = field(repr=False)
    _headers: Mapping[str, str] = field(repr=False)

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly these bytes. Raises ObsfsError."""
        if not size:
            return b""
        headers = {**self._headers, "Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        try:
            answer = self._pool.request("GET", self.url, headers=headers, preload_content=False)
            try:
                if answer.status not in (200, 206):
                    raise _refused(answer.status, self.path)
                if answer.status == 200 and (offset or size != self.size):
                    raise UsageError("the hub serves no ranges", "download with its own tool, then obsfs push")
                data = answer.read(size + 1)
            finally:
                answer.close() if answer.status == 200 else answer.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnavailableError(f"the hub did not send {self.path}", type(error).__name__) from None
        if len(data) != size:
            raise UnavailableError(f"the hub sent {len(data)} of {size} bytes of {self.path}")
        return bytes(data)


@dataclass(frozen=True)
class Repository:
    """The files of a hub's repository to publish. `revision` is their commit, if it is known."""

    name: HubName
    revision: str
    files: Sequence[HubFile]

    def chosen(self, include: Sequence[str], exclude: Sequence[str]) -> Repository:
        """Return it with the files that match. Raises UsageError if none does, or a model cannot have one."""
        files = [file for file in self.files if matches_patterns(file.path, include, exclude)]
        for file in files:
            if not is_safe_path(file.path):
                raise UsageError(f"{self.name} has a file {file.path!r}, which no model can have", "--exclude it")
        if not files:
            raise UsageError(f"{self.name} has no such files", "check --include and --exclude")
        return replace(self, files=files)

    def details(self) -> Details:
        """Return details for the manifest. Reads the configuration and the headers of the weights."""
        model = manifests.inspect_model({file.path: (file.size, file.read) for file in self.files})
        return Details(author(), str(self.name), self.revision, model)

    def problems(self) -> list[str]:
        """Return what is wrong with the hub's files: those that are truncated, damaged or missing."""
        found = completeness.inspect_files(
            {file.path: (file.size, file.read) for file in self.files}, max_json=_MAX_JSON
        )
        return [f"{self.name}/{path} {reason}" for path, reason in found.problems]


def parse_hub_name(text: str) -> HubName:
    """Parse ``hf:org/name[@revision]`` or ``ms:org/name[@revision]``. Raises UsageError."""
    hub, colon, rest = text.partition(":")
    repository, _, revision = rest.partition("@")
    if hub not in HUBS or not colon or not _REPOSITORY.fullmatch(repository):
        raise UsageError(
            f"{text!r} is no repository of a hub", "write hf:ORG/NAME or ms:ORG/NAME, with @REVISION or not, first"
        )
    return HubName(hub, repository, revision or None)


def open_repository(name: HubName) -> Repository:
    """Ask the hub for the files of a repository. Raises ObsfsError."""
    pool = urllib3.PoolManager(
        maxsize=_CONNECTIONS, timeout=_TIMEOUT, retries=urllib3.Retry(5, connect=0, read=0, status=0, other=0)
    )
    look: Callable[[HubName, urllib3.PoolManager], Repository] = _hugging_face if name.hub == "hf" else _model_scope
    try:
        found = look(name, pool)
    except ObsfsError:
        raise
    except Exception as error:  # the hubs' libraries raise many kinds
        status = getattr(getattr(error, "response", None), "status_code", 0) or getattr(error, "status_code", 0)
        if status:
            raise _refused(int(status), str(name)) from None
        raise UnavailableError(f"{name} cannot be read", f"{type(error).__name__}: {error}"[:300]) from None
    if not found.files:
        raise UsageError(f"{name} has no files", "check the name and the revision")
    return found


def _hugging_face(name: HubName, pool: urllib3.PoolManager) -> Repository:
    hub = _library("huggingface_hub")
    info = hub.HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=_TIMEOUT)
    headers = hub.utils.build_hf_headers()
    files = [
        HubFile(
            path=one.rfilename,
            size=one.size,
            sha256=(one.lfs.sha256 if one.lfs else "") or "",
            url=hub.hf_hub_url(name.repository, one.rfilename, revision=info.sha),
            _pool=pool,
            _headers=headers,
        )
        for one in info.siblings or ()
    ]
    return Repository(name, info.sha or "", files)


def _model_scope(name: HubName, pool: urllib3.PoolManager) -> Repository:
    config = _library("modelscope_hub.config").HubConfig()
    api = _library("modelscope_hub").HubApi(config=config)
    # As modelscope-hub does: some of its hosts know one of these headers, some the other.
    headers = (
        {"Authorization": f"Bearer {config.token}", "Cookie": f"m_session_id={config.token}"} if config.token else {}
    )
    revision = name.revision or "master"
    files = [
        HubFile(
            path=one["Path"],
            size=int(one["Size"]),
            sha256=str(one.get("Sha256") or "").lower(),
            url=api.legacy.get_download_url(name.repository, "model", one["Path"], revision),
            _pool=pool,
            _headers=headers,
        )
        for one in api.legacy.list_repo_files(name.repository, "model", revision)
        if one.get("Type") != "tree"
    ]
    return Repository(name, name.revision or "", files)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"the package {name.partition('.')[0]} is missing", remedy("hub")) from None


def _refused(status: int, what: str) -> ObsfsError:
    if status in (401, 403):
        return ForbiddenError(f"the hub refused {what} ({status})", "log in (HF_TOKEN, MODELSCOPE_API_TOKEN)")
    if status == 404:
        return NotFoundError(f"the hub has no {what}", "check the name and the revision")
    return UnavailableError(f"the hub answered {status} for {what}")
