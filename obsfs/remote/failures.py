"""What went wrong on the way to a bucket, in our terms: botocore's and urllib3's exceptions as :mod:`obsfs.errors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from botocore.exceptions import ConnectionError as BotoConnectionError
from urllib3.exceptions import HTTPError

from obsfs.errors import (
    BusyError,
    ExpiredError,
    ForbiddenError,
    NotFoundError,
    ObsfsError,
    UnavailableError,
    UsageError,
    VersionChangedError,
)

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}


@contextmanager
def translated(what: str, *, pinned: bool = False) -> Iterator[None]:
    """Turn botocore's and urllib3's exceptions into ours. `pinned`: absence means that a version is gone."""
    try:
        yield
    except ObsfsError:
        raise
    except (NoCredentialsError, PartialCredentialsError):
        raise ForbiddenError(
            "no credentials found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or HUAWEICLOUD_SDK_AK and _SK), "
            "use --profile, or --no-sign-request for a public bucket",
        ) from None
    except ClientError as error:
        raise _from_response(error, what, pinned) from None
    except BotoConnectionError as error:
        raise UnavailableError(f"cannot reach the server for {what}", _reason(error)) from None
    except (BotoCoreError, HTTPError, HTTPException, OSError) as error:
        raise UnavailableError(f"request for {what} failed", _reason(error)) from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _from_response(error: ClientError, what: str, pinned: bool) -> ObsfsError:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchUpload":
        return NotFoundError(f"the upload of {what} is gone", "begin anew")
    # 416 for a range inside the size we know means that the object is shorter now.
    if status in (412, 416) or (pinned and status == 404 and code != "NoSuchBucket"):
        return VersionChangedError(f"{what} was replaced or deleted while it was open", "open it again")
    if code == "NoSuchBucket":
        return NotFoundError(f"bucket of {what} does not exist", "check the name, the region and the endpoint")
    if status == 404:
        return NotFoundError(f"{what} does not exist", "check the name, the region and the endpoint")
    if code in _EXPIRED:
        return ExpiredError(f"access to {what} denied ({code})", "get new credentials")
    if status in (401, 403):
        return ForbiddenError(f"access to {what} denied ({code})", "check the credentials and what they allow")
    if status in (301, 307, 400) and code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return UsageError(f"{what} lives in another region ({code})", "give its --region")
    kind = BusyError if status >= 500 or status == 429 else UnavailableError
    return kind(f"server answered {status} {code} for {what}")
