from __future__ import annotations

import pytest
from botocore.awsrequest import AWSPreparedRequest

from obsfs.errors import UnavailableError
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.store.s3.client import Bucket
from obsfs.store.s3.writer import Writer
from tests.conftest import Store


@pytest.mark.parametrize("arrived", [b"", b"whol", b"whale"])
def test_what_has_not_arrived_whole_is_not_kept(bucket: Store, arrived: bytes) -> None:
    ours = Bucket(parse_address(str(bucket)), Settings.load())

    def lose(request: AWSPreparedRequest, **_: object) -> None:
        request.body = arrived
        request.headers["Content-Length"] = str(len(arrived))

    ours.client.meta.events.register("before-send.s3.PutObject", lose)
    with pytest.raises(UnavailableError, match="BadDigest"):
        Writer(ours).put("key", b"whole")
    ours.client.meta.events.unregister("before-send.s3.PutObject", lose)
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=bucket.name)
    Writer(ours).put("key", b"whole")
    assert bucket.client.get_object(Bucket=bucket.name, Key="key")["Body"].read() == b"whole"
