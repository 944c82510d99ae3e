"""Turn exceptions of botocore and urllib3 into those of :mod:`obsfs.errors`.

Two tables map what a server answers (`_BY_CODE`, `_BY_STATUS`); `_network` maps what happens before it answers. Only a
failure that may end by itself becomes an UnavailableError, which callers retry; every other answer is final.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from botocore import exceptions as botocore
from urllib3.exceptions import HTTPError

from obsfs.errors import (
    BusyError,
    ExpiredError,
    ForbiddenError,
    MovedError,
    NoBucketError,
    NotFoundError,
    ObsfsError,
    RefusedError,
    UnavailableError,
    UnsupportedError,
    UsageError,
    VersionChangedError,
)
from obsfs.store import address as addresses
from obsfs.text import visible

_MAX_SAID = 200
"""Characters of a server's own words in an error."""
_MAX_WORD = 60
"""Characters of a word that is shown. A session token, which a server may echo, is longer and must not be shown."""
_PROBE_SECONDS = 2.0

_GIVE_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or OBSFS_ACCESS_KEY_ID and OBSFS_SECRET_ACCESS_KEY, or "
    "HUAWEICLOUD_SDK_AK and _SK), give --profile or fill ~/.aws/credentials, give the machine an instance role, "
    "or add --no-sign-request for a public bucket"
)


def no_credentials(places: str = "") -> ForbiddenError:
    """Return the error for a client without keys.

    Args:
        places: Where they were looked for, in words.
    """
    return ForbiddenError(f"no credentials found{f' ({places})' if places else ''}", _GIVE_CREDENTIALS)


class DroppedError(UnavailableError):
    """The server closed a connection without an answer, as one does that expects another protocol."""


class MuteError(RefusedError):
    """The server refused a request without an S3 error code, as one does that speaks another protocol."""


class _Rule(NamedTuple):
    kind: type[ObsfsError]
    message: str
    """With ``{what}``, ``{code}``, ``{status}``."""
    remedy: str = ""


_PROXIES = "HTTPS_PROXY and HTTP_PROXY"
_PROXY_PASSWORD = f"write user and password into {_PROXIES}, as http://USER:PASSWORD@HOST:PORT"
_DENIED = "access to {what} denied ({code})"
_ARREARS = _Rule(ForbiddenError, "{what}: the account is closed or owes money ({code})", "see to the account")
_BUSY = _Rule(BusyError, "server answered {status} {code} for {what}")
_TRANSIENT = _Rule(UnavailableError, "server answered {status} {code} for {what}")
_MISSING_BUCKET = _Rule(NoBucketError, "bucket of {what} does not exist", "check the name, the region and the endpoint")
_UNSUPPORTED = _Rule(
    UnsupportedError,
    "the server does not support this request for {what} ({status} {code})",
    "see whether a newer version of the server does",
)
_MOVED = _Rule(MovedError, "{what} lives elsewhere ({code})")

# Codes of S3: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html. Of OBS: its API reference,
# "Error Codes" (obs_04_0115), and its pages of single codes (obs_errorcode_0009 to _0014).
_BY_CODE = {
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"),
        _Rule(ExpiredError, _DENIED, "the session token has expired: get new credentials"),
    ),
    "InvalidAccessKeyId": _Rule(
        ForbiddenError,
        _DENIED,
        "the server does not know this access key: check the credentials, and that they are for this endpoint",
    ),
    "InvalidToken": _Rule(
        ForbiddenError, _DENIED, "check the credentials: the session token does not belong to this access key"
    ),
    "SignatureDoesNotMatch": _Rule(
        ForbiddenError,
        _DENIED,
        "check the credentials: the secret key is not that of the access key (or the endpoint URL holds the bucket)",
    ),
    "RequestTimeTooSkewed": _Rule(
        ForbiddenError, _DENIED, "the clock of this machine is wrong: set it (timedatectl set-ntp true)"
    ),
    "AccessDenied": _Rule(
        ForbiddenError,
        _DENIED,
        "the server knows the credentials, but they do not allow this: ask the bucket's owner for the permission",
    ),
    "InvalidObjectState": _Rule(
        ForbiddenError,
        "cannot read {what}: the object is archived ({code})",
        "restore it first, or move it to the standard storage class",
    ),
    **dict.fromkeys(
        (
            *("AllAccessDisabled", "InArrearOrInsufficientBalance", "FrozenUserId", "AccountProblem", "NotSignedUp"),
            *("DeregisterUserId", "UserAccountSuspended", "UserDisable"),
        ),
        _ARREARS,
    ),
    "VirtualHostDomainRequired": _Rule(
        ForbiddenError,
        "{what}: the server wants the bucket in the host name ({code})",
        "add --addressing-style virtual, and give an endpoint by its name, not by its IP address",
    ),
    "TooManyWrongSignature": _Rule(
        ForbiddenError, _DENIED, "too many requests had a wrong signature: correct the secret key, then wait a while"
    ),
    "NoSuchBucket": _MISSING_BUCKET,
    "NoSuchUpload": _Rule(NotFoundError, "the upload of {what} is gone", "begin again"),
    "KMS.DisabledException": _Rule(
        ForbiddenError, "cannot read {what}: its encryption key is disabled ({code})", "enable the key in KMS"
    ),
    "KMS.NotFoundException": _Rule(
        ForbiddenError, "cannot read {what}: its encryption key is gone ({code})", "the bytes are lost with the key"
    ),
    **dict.fromkeys(
        # Each may end by itself, whatever its HTTP status.
        (
            *(
                "SlowDown",
                "ServiceUnavailable",
                "InternalError",
                "Throttling",
                "ThrottlingException",
                "TooManyRequests",
            ),
            *("RequestLimitExceeded", "GetQosTokenException", "OperationAborted", "ConditionalRequestConflict"),
            *("TemporarilyUnavailable", "Busy"),
        ),
        _BUSY,
    ),
    # The body was damaged or lost on its way.
    **dict.fromkeys(
        ("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "InvalidCRC64"), _TRANSIENT
    ),
    **dict.fromkeys(
        (
            *("NotImplemented", "ServiceNotImplemented", "MethodNotAllowed", "ServiceNotSupported", "FsNotSupport"),
            "OperationNotSupported",
        ),
        _UNSUPPORTED,
    ),
    **dict.fromkeys(
        (
            *("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "WebsiteRedirect"),
            "IllegalLocationConstraintException",
        ),
        _MOVED,
    ),
}

_BY_STATUS = {
    401: _Rule(ForbiddenError, _DENIED, "check the credentials"),
    403: _Rule(ForbiddenError, _DENIED, "check the credentials and what they allow"),
    404: _Rule(NotFoundError, "{what} does not exist", "check the name, the region and the endpoint"),
    405: _UNSUPPORTED,
    407: _Rule(RefusedError, "the proxy refuses to pass on {what} ({status})", _PROXY_PASSWORD),
    408: _TRANSIENT,
    425: _TRANSIENT,
    429: _BUSY,
    501: _UNSUPPORTED,
    505: _UNSUPPORTED,
    **dict.fromkeys((301, 302, 303, 307, 308), _MOVED),
}


@contextmanager
def map_errors(what: str, *, pinned: bool = False) -> Iterator[None]:
    """Turn exceptions of botocore and urllib3 into those of :mod:`obsfs.errors`.

    Args:
        what: What was asked for, as the error names it.
        pinned: The request was for one version: if the object is absent, that version is gone.
    """
    try:
        yield
    except ObsfsError:
        raise
    except botocore.NoCredentialsError:
        raise no_credentials() from None
    except _CREDENTIAL_ERRORS as error:
        raise ForbiddenError(f"no credentials for {what} ({_words(error)})", _where_keys_come_from(error)) from None
    except botocore.ClientError as error:
        raise _from_response(error, what, pinned) from None
    except botocore.ParamValidationError as error:
        raise UsageError(f"{what} cannot be asked for ({visible(error, _MAX_SAID)})", "check the name") from None
    except (botocore.BotoCoreError, HTTPError, HTTPException, OSError, ValueError, LookupError) as error:
        raise _network(error, what) from None


_SIGN_IN_ERRORS = (botocore.SSOError, botocore.TokenRetrievalError)
_CREDENTIAL_ERRORS = (
    *_SIGN_IN_ERRORS,
    botocore.PartialCredentialsError,
    botocore.CredentialRetrievalError,
    botocore.InvalidConfigError,
    botocore.InfiniteLoopConfigError,
    botocore.UnknownCredentialError,
    botocore.RefreshWithMFAUnsupportedError,
    botocore.ConfigParseError,
    botocore.ConfigNotFound,
    botocore.NoRegionError,  # of STS
)
"""What botocore raises for a profile, or another source of credentials, that gives none."""


def _where_keys_come_from(error: Exception) -> str:
    if isinstance(error, _SIGN_IN_ERRORS):
        return "sign in with `aws sso login`, with the same profile"
    if isinstance(error, botocore.PartialCredentialsError):
        return "an access key and its secret key go together"
    return "see to the profile in ~/.aws/config, and to what it takes the keys from"


# what a server answers


def _from_response(error: botocore.ClientError, what: str, pinned: bool) -> ObsfsError:
    meta = error.response.get("ResponseMetadata", {})
    status, headers = meta.get("HTTPStatusCode", 0), meta.get("HTTPHeaders", {})
    said = error.response.get("Error", {})
    code = _code(str(said.get("Code", "")), status, headers)
    message = _words(said.get("Message", "") or _header(headers, "error-message"))
    # 416 for a range inside the size we know means that the object is shorter now.
    if status in (412, 416) or (pinned and status == 404 and code not in ("NoSuchBucket", "NoSuchUpload")):
        return VersionChangedError(f"{what} was replaced or deleted while it was open", "open it again")
    rule = _BY_CODE.get(code) or _BY_STATUS.get(status)
    if code == "InvalidAccessKeyId" and "token" in message.lower():
        # OBS knows no ExpiredToken (obs_errorcode_0009).
        rule = _BY_CODE["ExpiredToken"]
    if rule is None:
        kind = RefusedError if code else MuteError
        rule = _BUSY if status >= 500 else _Rule(kind, "the server refused {what} ({status} {code})", message)
    shown = code if code or "{status}" in rule.message else status
    text = rule.message.format(what=what, code=visible(shown, _MAX_SAID), status=status).replace(" )", ")")
    if rule.kind is MovedError:
        return _moved(text, headers, said)
    remedy = rule.remedy
    if rule is _UNSUPPORTED and message:
        remedy = f"{message} ({rule.remedy})"
    return rule.kind(" ".join(text.split()), remedy)


def _code(code: str, status: int, headers: Mapping[str, str]) -> str:
    """Return the code of an error. HEAD has none in its body, and OBS sends it in a header."""
    if code in ("", str(status)):
        return _header(headers, "error-code")
    return code


def _header(headers: Mapping[str, str], name: str) -> str:
    return str(headers.get(f"x-amz-{name}") or headers.get(f"x-obs-{name}") or "")


def _words(text: object) -> str:
    """Return the start of a server's message, without any word that could be a token."""
    words = (word if len(word) <= _MAX_WORD else "…" for word in str(text)[: 4 * _MAX_SAID].split())
    return visible(" ".join(words), _MAX_SAID)


def _moved(text: str, headers: Mapping[str, str], said: Mapping[str, Any]) -> MovedError:
    region = str(headers.get("x-amz-bucket-region") or headers.get("x-obs-bucket-location") or said.get("Region") or "")
    try:
        host = urlsplit(headers.get("location", "")).hostname or ""
    except ValueError:
        host = ""
    host = host or str(said.get("Endpoint") or "")
    told = [f"{name} {visible(value, 100)}" for name, value in (("region", region), ("host", host)) if value]
    remedy = "give its --region, or its --endpoint-url"
    if told:
        remedy = f"the server names {' and '.join(told)}, where no keys are sent unasked: {remedy}"
    return MovedError(text, remedy, region=region, host=host)


# what happens before it answers


def _network(error: Exception, what: str) -> ObsfsError:
    """Return one sentence, and a next step, for each way in which a server is not reached."""
    given = getattr(error, "kwargs", None) or {}
    place, scheme = _place(str(given.get("endpoint_url") or ""))
    causes = list(_causes(error))
    text = " ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    start = f"cannot reach {place or 'the server'} for {what}"
    if isinstance(error, botocore.ProxyConnectionError):
        return _proxy(str(given.get("proxy_url") or ""), what, text)
    if any(isinstance(cause, socket.gaierror) for cause in causes) or "NameResolutionError" in text:
        return UnavailableError(f"{start}: its name does not resolve", _unresolved(place, causes))
    if isinstance(error, botocore.SSLError) or any(isinstance(cause, ssl.SSLError) for cause in causes):
        return _tls(start, place, text)
    for cause in causes:
        if isinstance(cause, ConnectionRefusedError):
            return UnavailableError(
                f"{start}: nothing listens on that port", "check that the server runs, and the port of the endpoint"
            )
        if isinstance(cause, OSError) and cause.errno in _UNREACHABLE:
            return UnavailableError(f"{start}: there is no route to it", "check the network, the VPN and the address")
    if isinstance(error, botocore.ConnectTimeoutError) or "ConnectTimeoutError" in text:
        return UnavailableError(
            f"{start}: it did not accept a connection in time",
            "check the address, the firewall and the security group between here and there",
        )
    if isinstance(error, botocore.ReadTimeoutError) or "ReadTimeoutError" in text or "timed out" in text:
        return UnavailableError(
            f"{start}: it accepted the connection and then sent nothing", "see whether it is overloaded, or hangs"
        )
    if isinstance(error, botocore.ConnectionError) or "ProtocolError" in text or isinstance(error, HTTPException):
        if "\\x15\\x03" in text or "BadStatusLine" in text:
            return DroppedError(f"{start}: it does not answer in HTTP", _expects_tls(scheme))
        return DroppedError(f"{start}: it closed the connection without a whole answer", _expects_tls(scheme))
    if any(isinstance(cause, ValueError | TypeError) for cause in causes):
        return RefusedError(f"the server's answer for {what} makes no sense", _words(causes[-1]))
    if isinstance(error, OSError):
        return UnavailableError(start, f"{type(error).__name__}: {error.strerror or error}")
    return UnavailableError(f"request for {what} failed", _words(f"{type(error).__name__}: {error}"))


def _proxy(url: str, what: str, text: str) -> ObsfsError:
    """Return why a proxy does not lead to the server."""
    place, scheme = _place(url)
    bypass = "or list the host in NO_PROXY"
    start = f"cannot reach the proxy {place or scheme} for {what}"
    if said := re.search(r"Tunnel connection failed: (\d{3})", text):
        remedy = _PROXY_PASSWORD if said[1] == "407" else f"ask whoever runs it to let this host through, {bypass}"
        may_end = said[1] in ("408", "429") or said[1] >= "500"
        kind = UnavailableError if may_end else RefusedError
        return kind(f"the proxy {place} refuses to connect to the server for {what} ({said[1]})", remedy)
    if scheme not in ("http", "https") or place.endswith(":"):  # botocore writes http:// before socks5://
        return RefusedError(f"{start}: it is no HTTP proxy", f"write http://HOST:PORT in {_PROXIES}, {bypass}")
    if any(word in text for word in _NOT_TLS):
        return UnavailableError(f"{start}: it does not speak TLS", f"write http://{place} in {_PROXIES}")
    if "ertificate verify failed" in text:
        return UnavailableError(f"{start}: its certificate is not trusted", "name its CA in AWS_CA_BUNDLE")
    if "NameResolutionError" in text or "gaierror" in text:
        return UnavailableError(f"{start}: its name does not resolve", f"check {_PROXIES}, {bypass}")
    return UnavailableError(start, f"check {_PROXIES}, {bypass}")


_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        one = queue.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        queue += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
        queue += list((getattr(one, "kwargs", None) or {}).values())


def _place(url: str) -> tuple[str, str]:
    """Return host and port of a URL, without the secrets in it, and its scheme."""
    try:
        parts = urlsplit(url)
        return visible(parts.netloc.rpartition("@")[2], _MAX_SAID), parts.scheme
    except ValueError:
        return "", ""


def _unresolved(place: str, causes: list[BaseException]) -> str:
    host = place.partition(":")[0]
    region = addresses.region_of(host)
    if region and addresses.is_obs(f"https://{host}") and region not in addresses.OBS_REGIONS:
        near = addresses.nearest_regions(region)
        return f"{region} is not a known region of OBS: " + (
            f"did you mean {' or '.join(near)}?" if near else "see the list of regions and endpoints of OBS"
        )
    if region and not addresses.is_obs(f"https://{host}"):
        return f"check the region {region}, and the network and its DNS"
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_AGAIN for cause in causes):
        return "the DNS server does not answer: check the network; if only this name fails, check --endpoint-url"
    return "check the host name in --endpoint-url, and the DNS of this machine"


def _tls(start: str, place: str, text: str) -> ObsfsError:
    is_of_another = any(words in text for words in ("ostname mismatch", "doesn't match", "not valid for"))
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text or is_of_another:
        found = re.search(r"certificate verify failed: ([^(\"']+)|(doesn't match [^\"]*?')\)?(?: |$)", text)
        reason = visible((found[1] or found[2]).strip() if found else "not trusted", 100)
        if is_of_another:
            remedy = (
                "use the name that the certificate is for (a bucket with dots in its name: --addressing-style path)"
            )
        elif "expired" in text:
            remedy = "renew the server's certificate, or set the clock of this machine"
        else:
            remedy = "name the CA in AWS_CA_BUNDLE, or add --insecure-tls to trust any certificate"
        return UnavailableError(f"{start}: its certificate is not trusted ({reason})", remedy)
    if any(word in text for word in _NOT_TLS):
        return UnavailableError(
            f"{start}: it does not speak TLS on that port", f"write http://{place}, or another port"
        )
    if "ALERT_HANDSHAKE_FAILURE" in text or "UNSUPPORTED_PROTOCOL" in text or "PROTOCOL_VERSION" in text:
        return UnavailableError(f"{start}: it knows no TLS version or cipher that we do", "update the server's TLS")
    return DroppedError(f"{start}: the TLS connection failed ({_words(text)[:120]})", "check the port and the proxy")


_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
"""How versions of OpenSSL name an answer that is not a TLS record."""


def _expects_tls(scheme: str) -> str:
    return "if it expects TLS, write https://" if scheme == "http" else "see the server's own log"


def explain_silence(error: ObsfsError, endpoint: str) -> ObsfsError:
    """Return why a server does not answer: `error`, or that it expects TLS.

    Connects to the server again, once for each server, for two seconds at most.
    """
    parts = urlsplit(endpoint)
    if not isinstance(error, DroppedError | MuteError) or parts.scheme != "http" or not parts.hostname:
        return error
    if not _speaks_tls(parts.hostname, parts.port or 80):
        return error
    return UnavailableError(
        f"{parts.netloc} expects TLS, and was spoken to in plain HTTP", f"write https://{parts.netloc}"
    )


@lru_cache(maxsize=64)
def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only to see whether there is TLS; nothing is sent
    try:
        with (
            socket.create_connection((host, port), timeout=_PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except (OSError, ValueError):
        return False
