"""Numbers, dates and listings from outside, within bounds."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import UnavailableError
from obsfs.store.bounds import (
    MAX_SIZE,
    drop_unreadable,
    parse_count,
    parse_date,
    parse_listing,
    read_at_most,
    read_start,
)
from obsfs.store.types import MAX_TIME, epoch

_BAD_NUMBERS = ["", "-1", "+1", "1.0", "1e3", "0x10", "x", "1_000", "٣", "9" * 401, str(1 << 63), str(1 << 64), "NaN"]
_BAD_DATES = ["", "not a time", "x" * 100_000, "2026-13-01T00:00:00Z", "99999-01-01T00:00:00Z", "1e400", "-" * 60, "[]"]


@pytest.mark.parametrize("text", _BAD_NUMBERS)
def test_what_is_no_count_is_none(text: str) -> None:
    assert parse_count(text) is None


@given(st.integers(0, 1 << 62))
def test_counts_are_read(number: int) -> None:
    assert parse_count(str(number)) == number
    assert parse_count(f"\n {number} ") == number


def test_a_count_has_a_bound() -> None:
    assert parse_count(str(MAX_SIZE), MAX_SIZE) == MAX_SIZE
    assert parse_count(str(MAX_SIZE + 1), MAX_SIZE) is None


@pytest.mark.parametrize("text", _BAD_DATES)
def test_a_date_that_cannot_be_read_is_unknown(text: str) -> None:
    assert parse_date(text) is None


@given(st.text() | st.integers().map(str) | st.floats().map(str))
def test_no_date_raises(text: str) -> None:
    assert 0 <= epoch(parse_date(text)) <= MAX_TIME


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2023-11-14T22:13:20.000Z", 1_700_000_000.0),
        ("Tue, 14 Nov 2023 22:13:20 GMT", 1_700_000_000.0),
        ("0001-01-01T00:00:00Z", 0.0),  # Go's zero time
        ("0001-01-01T00:00:00+14:00", 0.0),
        ("1969-12-31T23:59:59Z", 0.0),
        ("9999-12-31T23:59:59Z", MAX_TIME),
        ("9999-12-31T23:59:59-14:00", MAX_TIME),
    ],
)
def test_dates_are_seconds_since_the_epoch(text: str, seconds: float) -> None:
    assert epoch(parse_date(text)) == seconds


def test_a_date_without_a_zone_is_no_fault() -> None:
    assert epoch(datetime(1, 1, 1)) == 0.0
    assert epoch(None) == 0.0


def test_a_body_is_read_to_its_bound() -> None:
    assert read_at_most(io.BytesIO(b"x" * 100), 100) == b"x" * 100
    body = io.BytesIO(b"x" * 200_000)
    assert read_at_most(body, 100_000) is None
    assert body.closed
    body = io.BytesIO(b"x" * 200_000)
    assert read_start(body, 100_000) == b"x" * 100_000
    assert body.closed


def test_headers_that_nobody_can_read_are_left_out() -> None:
    headers = {"content-length": "-5", "last-modified": "yesterday", "x-amz-missing-meta": "3", "etag": "-5"}
    kinds = {
        "content-length": "long",
        "last-modified": "timestamp",
        "x-amz-missing-meta": "integer",
        "expires": "timestamp",
    }
    drop_unreadable(headers, kinds)
    assert headers == {"x-amz-missing-meta": "3", "etag": "-5"}


def _contents(**fields: str) -> str:
    whole = {"Key": "good", "Size": "7", "ETag": "&quot;e&quot;", "LastModified": "2026-01-01T00:00:00Z"} | fields
    return "<Contents>" + "".join(f"<{name}>{text}</{name}>" for name, text in whole.items()) + "</Contents>"


@pytest.mark.parametrize("size", [*_BAD_NUMBERS, str(MAX_SIZE + 1), "<b>7</b>", "<![CDATA[x]]>"])
def test_an_entry_with_a_bad_size_is_left_out_and_counted(size: str) -> None:
    body = f"<ListBucketResult>{_contents(Size=size, Key='bad')}{_contents()}</ListBucketResult>"
    found = parse_listing(body.encode(), "ListBucketResult")
    assert [one["Key"] for one in found["Contents"]] == ["good"]
    assert found["BadEntries"] == 1


def test_entries_without_what_they_need_are_counted() -> None:
    entries = [
        "<Contents/>",
        "<Contents><Size>1</Size></Contents>",
        "<Contents><Key>k</Key></Contents>",
        "<CommonPrefixes/>",
    ]
    body = (
        f"<ListBucketResult>{''.join(entries)}<CommonPrefixes><Prefix>d/</Prefix></CommonPrefixes></ListBucketResult>"
    )
    found = parse_listing(body.encode(), "ListBucketResult")
    assert found == {"BadEntries": 4, "CommonPrefixes": [{"Prefix": "d/"}]}


@pytest.mark.parametrize("date", _BAD_DATES)
def test_an_entry_with_a_bad_date_is_shown(date: str) -> None:
    body = f"<ListBucketResult>{_contents(LastModified=date)}</ListBucketResult>"
    found = parse_listing(body.encode(), "ListBucketResult")
    assert found["Contents"] == [{"Key": "good", "ETag": '"e"', "Size": 7, "LastModified": None}]


def test_a_listing_is_read_as_it_is_meant() -> None:
    body = (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        "<IsTruncated>true</IsTruncated><MaxKeys>abc</MaxKeys><EncodingType>url</EncodingType>"
        f"<NextContinuationToken>t</NextContinuationToken>{_contents(StorageClass='COLD')}</ListBucketResult>"
    )
    good = {"Key": "good", "Size": 7, "ETag": '"e"', "LastModified": datetime(2026, 1, 1, tzinfo=UTC)}
    assert parse_listing(body.encode(), "ListBucketResult") == {
        "BadEntries": 0,
        "IsTruncated": True,
        "EncodingType": "url",
        "NextContinuationToken": "t",
        "Contents": [{**good, "StorageClass": "COLD"}],
    }


def test_parts_and_versions_are_read_too() -> None:
    parts = "<Part><PartNumber>1</PartNumber><Size>5</Size><ETag>a</ETag></Part><Part><PartNumber>x</PartNumber></Part>"
    found = parse_listing(f"<ListPartsResult>{parts}</ListPartsResult>".encode(), "ListPartsResult")
    assert found == {"BadEntries": 1, "Parts": [{"PartNumber": 1, "Size": 5, "ETag": "a"}]}
    version = _contents(VersionId="v", IsLatest="true").replace("Contents", "Version")
    found = parse_listing(f"<ListVersionsResult>{version}</ListVersionsResult>".encode(), "ListVersionsResult")
    assert found["Versions"][0]["VersionId"] == "v"
    assert found["Versions"][0]["IsLatest"] is True


@pytest.mark.parametrize(
    "body",
    [b"", b"<html/>", b"<!DOCTYPE html><ListBucketResult/>", b"<ListBucketResult>", b"\xff\xfe", b"{}", b"<a" * 9999],
)
def test_what_is_no_listing_is_no_empty_bucket(body: bytes) -> None:
    with pytest.raises(UnavailableError, match="listing cannot be read"):
        parse_listing(body, "ListBucketResult")


@given(st.binary(max_size=200))
def test_no_body_raises_anything_else(body: bytes) -> None:
    for one in (body, b"<ListBucketResult><Contents><Size>" + body + b"</Size></Contents></ListBucketResult>"):
        try:
            parse_listing(one, "ListBucketResult")
        except UnavailableError as error:
            assert str(error).isprintable()
