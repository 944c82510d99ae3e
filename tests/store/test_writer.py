"""What changes a bucket, on a real server."""

from __future__ import annotations

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.httpsession import URLLib3Session

from obsfs.errors import UnavailableError
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.store.s3.store import S3Store
from tests.conftest import Store


@pytest.mark.parametrize("arrived", [b"", b"whol", b"whale"])
def test_what_has_not_arrived_whole_is_not_kept(bucket: Store, arrived: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = S3Store(parse_address(str(bucket)), Settings.load())
    send = URLLib3Session.send

    def lose(session: URLLib3Session, request: AWSPreparedRequest) -> AWSResponse:
        assert request.method == "PUT"
        request.body = arrived
        request.headers["Content-Length"] = str(len(arrived))
        return send(session, request)

    with monkeypatch.context() as patched:
        patched.setattr(URLLib3Session, "send", lose)
        with pytest.raises(UnavailableError, match="BadDigest"):
            ours.put("key", b"whole")
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=bucket.name)
    ours.put("key", b"whole")
    assert bucket.client.get_object(Bucket=bucket.name, Key="key")["Body"].read() == b"whole"
