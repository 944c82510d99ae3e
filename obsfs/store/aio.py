"""What s3fs is given, so that it connects, signs and refuses redirects as :class:`~obsfs.store.base.ObjectStore` does.

s3fs makes its own clients, by aiobotocore. Nothing else above this package makes any.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from aiobotocore.credentials import AioCredentials
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError

from obsfs.errors import ExpiredError, ObsfsError, UsageError
from obsfs.settings import Settings
from obsfs.store import address as addresses
from obsfs.store.credentials import Keys
from obsfs.store.s3.config import EndpointConfig, load_config
from obsfs.store.s3.endpoint import disable_redirects
from obsfs.store.s3.failures import map_errors, no_credentials


class Connection:
    """How to reach the first endpoint of the settings, with the credentials that were found for it."""

    def __init__(self, settings: Settings, keys: Keys | None = None) -> None:
        """Look for endpoint, region and credentials.

        Args:
            settings: What the user chose.
            keys: Credentials; None to look for them.

        Raises:
            UsageError: The endpoint or the profile cannot be used.
            ForbiddenError: A source of credentials is broken.
        """
        self._settings = settings
        self._config: EndpointConfig = load_config(settings, keys=keys)

    @property
    def endpoint(self) -> str:
        """The endpoint's URL."""
        return self._config.url

    @property
    def region(self) -> str:
        """The region that requests are signed for."""
        return self._config.region

    @property
    def keys(self) -> Keys | None:
        """Keys to hand to clients; None where there are none, or the session refreshes them."""
        return self._config.keys

    @property
    def has_credentials(self) -> bool:
        """Whether requests can be signed."""
        return self._config.has_credentials

    @property
    def client_options(self) -> dict[str, Any]:
        """Keyword arguments of a client's configuration (``config_kwargs`` of s3fs)."""
        options = {name: value for name, value in self._config.options.items() if name != "signature_version"}
        return {"region_name": self.region, "http_session_cls": _HTTPSession, **options}

    def require_credentials(self) -> None:
        """Raise ForbiddenError if requests cannot be signed."""
        if not self.has_credentials:
            raise no_credentials(self._config.searched)

    def new_session(self, options: Mapping[str, Any]) -> AioSession:
        """Return a session of aiobotocore with these credentials.

        Args:
            options: Arguments of ``AioSession``.
        """
        session = AioSession(**options)
        if self.keys is None:
            session.register_component("credential_provider", _Chain(self._config.session.get_credentials()))
        return session

    def adapt(self, client: Any) -> None:
        """Have a client of s3fs follow no redirect, and send the checksums that others than Amazon take."""
        if not addresses.is_aws(self.endpoint):
            client.meta.events.register("before-sign.s3.DeleteObjects", _use_md5, unique_id="obsfs-content-md5")
            client.meta.events.register_last(
                "before-parameter-build.s3", disable_redirects, unique_id="obsfs-no-redirects"
            )


def is_expired(error: OSError | ClientError) -> bool:
    """Return whether the server refused a session token because it has expired.

    Args:
        error: What s3fs raised.
    """
    cause = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(cause, ClientError | BotoCoreError):
        return False
    try:
        with map_errors("the bucket"):
            raise cause
    except ExpiredError:
        return True
    except ObsfsError:
        return False


class _Direct:
    """An HTTP session of aiohttp that follows no redirect."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *arguments: Any, **options: Any) -> Any:
        return self._session.request(*arguments, **{**options, "allow_redirects": False})


class _HTTPSession(AIOHTTPSession):
    """aiobotocore's HTTP session, to which a redirect is an answer, as it is to botocore.

    aiohttp goes wherever a server sends it, and sends the session token and the body along.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # aiobotocore has no public setting for it, and nothing else that its session calls in aiohttp stops a redirect.
        if not hasattr(AIOHTTPSession, "_get_session"):
            raise UsageError("this aiobotocore would follow redirects, with keys", "pip install 'aiobotocore<4'")
        super().__init__(*arguments, **options)

    async def _get_session(self, proxy_url: str | None) -> _Direct:
        return _Direct(await super()._get_session(proxy_url))


class _Credentials(AioCredentials):
    """botocore's credentials, as aiobotocore asks for them: found once, and refreshed in a thread."""

    def __init__(self, found: Any) -> None:
        super().__init__("", "", method=found.method)
        self._found = found

    async def get_frozen_credentials(self) -> Any:
        """Return the keys that a request is signed with."""
        needs_refresh = getattr(self._found, "refresh_needed", None)
        if needs_refresh is not None and needs_refresh():
            return await asyncio.to_thread(self._found.get_frozen_credentials)
        return self._found.get_frozen_credentials()


class _Chain:
    """In place of aiobotocore's chain of providers, which would wait for each of them once more."""

    def __init__(self, found: Any) -> None:
        self._found = found

    async def load_credentials(self) -> _Credentials | None:
        return _Credentials(self._found) if self._found is not None else None


def _use_md5(request: Any, **_: Any) -> None:
    """Send the checksum that a bulk delete must carry as Content-MD5, which OBS and others ask for, and not as CRC32.

    botocore calls it just before it signs the request.
    """
    for name in [
        name for name in request.headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))
    ]:
        del request.headers[name]
    body = request.body if isinstance(request.body, bytes) else request.body.encode()
    request.headers["Content-MD5"] = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
