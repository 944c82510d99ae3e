"""botocore's HTTP session, as one of its clients would make it."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies

from obsfs.errors import UsageError
from obsfs.text import visible


def new_http_session(session: Any, endpoint: str, *, is_insecure: bool, timeout: float, connections: int) -> Any:
    """Return a ``botocore.httpsession.URLLib3Session`` as a client of `session` makes one, which does not show its own.

    Args:
        session: From :func:`new_session`.
        endpoint: The URL that proxies are chosen by.
        is_insecure: Trust any certificate.
        timeout: Seconds of silence of a connection.
        connections: How many are kept open.

    Raises:
        UsageError: The file of certificates that is named by the environment or the profile is none.
    """
    trusted = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    if isinstance(trusted, str) and endpoint.startswith("https:") and not is_insecure:
        _check_certificates(trusted)
    return URLLib3Session(
        verify=not is_insecure and trusted,
        proxies=get_environ_proxies(endpoint),
        timeout=(timeout, timeout),
        max_pool_connections=connections,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
    )


def _check_certificates(file: str) -> None:
    names = [name for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE") if os.environ.get(name) == file]
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except ssl.SSLError:
        reason = "holds no certificates"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    else:
        return
    place = f"{names[0]}=" if names else "ca_bundle = "
    raise UsageError(f"{place}{visible(file)}: {reason}", "name a file of certificates in PEM format")
