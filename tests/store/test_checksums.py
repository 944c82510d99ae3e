"""What headers promise of an object's bytes, and whether bytes keep it."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.store.checksums import Checksum, checksum_from_headers

CHECK = b"123456789"
# The "check" values of the catalogue of parametrised CRC algorithms, and of the digests' standards.
KNOWN = {
    "crc32": "cbf43926",
    "crc32c": "e3069283",
    "crc64nvme": "ae8b14860a799888",
    "sha1": hashlib.sha1(CHECK).hexdigest(),
    "sha256": hashlib.sha256(CHECK).hexdigest(),
}
MD5 = hashlib.md5(CHECK).hexdigest()


@pytest.mark.parametrize("algorithm", KNOWN)
def test_every_algorithm_of_s3(algorithm: str) -> None:
    header = base64.b64encode(bytes.fromhex(KNOWN[algorithm])).decode()
    checksum = checksum_from_headers({f"x-amz-checksum-{algorithm}": header, "etag": f'"{MD5}"'}, md5_etags=True)
    assert checksum == (algorithm, KNOWN[algorithm])
    assert checksum.is_of(CHECK)
    assert checksum.is_of(memoryview(CHECK))
    assert not checksum.is_of(b"123456788")
    hasher = checksum.hasher()
    for byte in CHECK:
        hasher.update(bytes([byte]))
    assert hasher.hexdigest() == KNOWN[algorithm]


def test_an_etag_is_an_md5_only_where_s3_says_so() -> None:
    etag = {"etag": f'"{MD5}"'}
    assert checksum_from_headers(etag, md5_etags=True) == Checksum("md5", MD5)
    assert checksum_from_headers(etag, md5_etags=False) is None
    assert checksum_from_headers({"etag": f'"{MD5}-2"'}, md5_etags=True) is None
    assert checksum_from_headers({**etag, "x-amz-server-side-encryption": "AES256"}, md5_etags=True) == Checksum(
        "md5", MD5
    )
    for name, value in (
        ("x-amz-server-side-encryption", "aws:kms"),
        ("x-amz-server-side-encryption-customer-algorithm", "AES256"),
        ("x-obs-server-side-encryption", "kms"),
        ("x-obs-object-type", "Appendable"),
    ):
        assert checksum_from_headers({**etag, name: value}, md5_etags=True) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"x-amz-checksum-crc32": "y/Q5Jg==-2"},
        {"x-amz-checksum-crc32": "y/Q5Jg==", "x-amz-checksum-type": "COMPOSITE"},
        {"x-amz-checksum-crc32": "no base64"},
        {"x-amz-checksum-crc32": "y/Q5JgAA"},
        {},
    ],
)
def test_what_is_no_checksum_of_the_bytes_is_none(headers: dict[str, str]) -> None:
    assert checksum_from_headers(headers, md5_etags=True) is None


@given(st.dictionaries(st.sampled_from(["etag", "x-amz-checksum-crc32", "x-amz-checksum-type"]), st.text()))
def test_hostile_headers(headers: dict[str, str]) -> None:
    checksum = checksum_from_headers(headers, md5_etags=True)
    assert checksum is None or checksum.hexdigest
