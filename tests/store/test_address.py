from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import UsageError
from obsfs.store.address import (
    addressing_style,
    check_endpoint,
    is_aws,
    is_valid_name,
    obs_endpoint,
    parse_address,
)


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("obs://models", "models", ""),
        ("obs://models/", "models", ""),
        ("s3://models/Qwen/", "models", "Qwen/"),
        ("obs://my.models-1/a/b c", "my.models-1", "a/b c/"),
    ],
)
def test_addresses(url: str, bucket: str, prefix: str) -> None:
    address = parse_address(url)
    assert (address.bucket, address.prefix) == (bucket, prefix)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "url", ["models", "http://models", "obs://", "obs://a", "obs://models//x", "obs://models/../x"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError):
        parse_address(url)


def test_endpoints() -> None:
    assert obs_endpoint("cn-south-1") == "https://obs.cn-south-1.myhuaweicloud.com"
    assert addressing_style("https://obs.cn-south-1.myhuaweicloud.com") == "virtual"
    assert addressing_style("https://s3.eu-west-1.amazonaws.com") == "virtual"
    assert addressing_style("http://127.0.0.1:9000") == "path"
    assert addressing_style("http://minio.example:9000") == "path"
    assert is_aws("https://s3.eu-west-1.amazonaws.com")
    assert not is_aws("https://s3.amazonaws.com.example.org")
    with pytest.raises(UsageError):
        obs_endpoint("cn-south-1.evil.example/")


@pytest.mark.parametrize(
    "url", ["ftp://host", "host:9000", "http://", "http://user:secret@host", "http://h?key=secret"]
)
def test_endpoints_that_cannot_be_used(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_endpoint(url)
    assert "secret" not in str(caught.value)


@given(st.text(max_size=300))
def test_valid_names_are_those_that_linux_takes(name: str) -> None:
    encodable = not any(0xD800 <= ord(char) <= 0xDFFF for char in name)
    expected = encodable and name not in ("", ".", "..") and not {"/", "\0"} & set(name) and len(name.encode()) <= 255
    assert is_valid_name(name) == expected


CONSOLE = "write obs://BUCKET and --region REGION"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("models", "did you mean obs://models?"),
        ("obs:/models/a", "did you mean obs://models/a?"),
        ("obs:models", "did you mean obs://models?"),
        ("OBS://models", "did you mean obs://models?"),
        ("s3a://models/x/", "did you mean s3://models/x?"),
        (" obs://models", "did you mean obs://models?"),
        ("obs://models\n", "did you mean obs://models?"),
        ("https://obs.cn-south-1.myhuaweicloud.com/models/a", "write obs://models/a and --region cn-south-1"),
        ("https://models.obs.cn-south-1.myhuaweicloud.com/a?X=y", "write obs://models/a and --region cn-south-1"),
        ("https://a.b.s3.eu-west-1.amazonaws.com/x", "write s3://a.b/x and --region eu-west-1"),
        ("http://127.0.0.1:9000/models", "write obs://models and --endpoint-url http://127.0.0.1:9000"),
        ("https://minio", "write obs://BUCKET and --endpoint-url https://minio"),
        ("https://console.huaweicloud.com/#/obs/models", "that is a web console: " + CONSOLE),
        ("/mnt/models", "write obs://BUCKET or obs://BUCKET/PREFIX"),
        ("https://[", "write obs://BUCKET or obs://BUCKET/PREFIX"),
        ("", "write obs://BUCKET or obs://BUCKET/PREFIX"),
    ],
)
def test_what_is_almost_an_address_is_told_what_to_write(url: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert caught.value.remedy == hint


@pytest.mark.parametrize("url", ["obs://user:TheSecret@models/x", "https://u:TheSecret@h/b", "models?Sig=TheSecret"])
def test_no_address_that_is_refused_shows_a_secret(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert "TheSecret" not in str(caught.value)
