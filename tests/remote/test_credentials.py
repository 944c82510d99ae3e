from __future__ import annotations

import socket
import time
from pathlib import Path

import botocore.session
import pytest

from obsfs.errors import ForbiddenError, UsageError
from obsfs.filesystem import OBSFileSystem
from obsfs.remote import credentials
from obsfs.remote.address import parse_address
from obsfs.remote.client import Bucket, connect
from obsfs.remote.credentials import Keys, explicit_keys
from obsfs.remote.session import new_session
from obsfs.settings import Settings, Written, config_path
from tests.conftest import Store

OURS = {"OBSFS_ACCESS_KEY_ID": "o", "OBSFS_SECRET_ACCESS_KEY": "os"}
HUAWEI = {"HUAWEICLOUD_SDK_AK": "h", "HUAWEICLOUD_SDK_SK": "hs", "HUAWEICLOUD_SDK_SECURITY_TOKEN": "ht"}


def found(
    environ: dict[str, str], *, on_obs: bool = False, chain: bool = False, profile: str | None = None
) -> Keys | None:
    return explicit_keys(profile=profile, on_obs=on_obs, chain_has_keys=chain, environ=environ)


def test_who_comes_first() -> None:
    assert found({**OURS, **HUAWEI}, on_obs=True, chain=True) == Keys("o", "os", None)
    assert found(HUAWEI, on_obs=True, chain=True) == Keys("h", "hs", "ht")
    assert found(HUAWEI, chain=True) is None
    assert found(HUAWEI) == Keys("h", "hs", "ht")
    assert found({**OURS, **HUAWEI}, profile="work") is None
    assert found({}) is None


def test_half_a_pair_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="HUAWEICLOUD_SDK_SK is not set"):
        found({"HUAWEICLOUD_SDK_AK": "h"})


def test_keys_do_not_show_themselves() -> None:
    keys = Keys("access", "secret", "token")
    assert "secret" not in f"{keys} {keys!r} {[keys]}"


def test_a_region_alone_means_obs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUAWEICLOUD_SDK_AK", "h")
    monkeypatch.setenv("HUAWEICLOUD_SDK_SK", "hs")
    connection = connect(Settings.load(region="cn-south-1"))
    assert connection.endpoint == "https://obs.cn-south-1.myhuaweicloud.com"
    assert connection.config["s3"] == {"addressing_style": "virtual"}
    assert connection.config["request_checksum_calculation"] == "when_required"
    assert connection.config["response_checksum_validation"] == "when_required"
    assert connection.keys == Keys("h", "hs", None)


def test_amazon_keeps_its_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    connection = connect(Settings.load(), "s3")
    assert connection.endpoint.endswith(".amazonaws.com")
    assert "request_checksum_calculation" not in connection.config


def test_botocores_endpoint_variable_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    connection = connect(Settings.load())
    assert connection.endpoint == "http://127.0.0.1:9000"
    assert connection.config["s3"] == {"addressing_style": "path"}


@pytest.mark.parametrize("ignored", ["", "true"])
@pytest.mark.parametrize("variables", [(), ("AWS_ENDPOINT_URL",), ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")])
@pytest.mark.parametrize(
    "file",
    [
        "",
        "[default]\nendpoint_url = http://10.0.0.1\n",
        "[default]\nservices = ours\n[services ours]\ns3 =\n  endpoint_url = http://10.0.0.2\n",
    ],
)
def test_the_endpoint_is_the_one_that_a_client_of_botocore_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, variables: tuple[str, ...], ignored: str
) -> None:
    (tmp_path / "aws-config").write_text(file)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for number, name in enumerate(variables):
        monkeypatch.setenv(name, f"http://10.1.1.{number}")
    if ignored:
        monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", ignored)
    client = botocore.session.Session().create_client("s3", region_name="eu-west-1")
    assert connect(Settings.load(), "s3").endpoint == client.meta.endpoint_url


def test_no_endpoint_and_no_region_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="--region"):
        connect(Settings.load())


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="nobody"):
        connect(Settings.load(profile="nobody"))


def test_a_profile_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for profile, variable in (("none", ""), (None, "none")):
        monkeypatch.setenv("AWS_PROFILE", variable)
        with pytest.raises(UsageError, match=r"profile 'none' not found.*list-profiles"):
            connect(Settings.load(profile=profile, region="cn-south-1"))


_BAD = "http://user:TheSecret@host/x?token=TheSecret"
_SHOWN = "http://…@host/x?…: the endpoint URL holds"


@pytest.mark.parametrize(
    "place", ["-o endpoint-url=", "OBSFS_ENDPOINT_URL=", "file", "AWS_ENDPOINT_URL_S3=", "profile"]
)
@pytest.mark.parametrize(
    ("value", "said"), [("host:9000", "host:9000: that is no http:// or https:// URL"), (_BAD, _SHOWN)]
)
def test_an_endpoint_that_cannot_be_used_is_named_with_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, value: str, said: str
) -> None:
    given = {}
    if place == "file":
        config_path().parent.mkdir(parents=True)
        config_path().write_text(f'endpoint_url = "{value}"')
        place = f"{config_path()}: endpoint_url = "
    elif place == "profile":
        (tmp_path / "aws-config").write_text(f"[profile work]\nendpoint_url = {value}\n")
        monkeypatch.setenv("AWS_PROFILE", "work")
        place = f"profile work in {tmp_path / 'aws-config'}: endpoint_url = "
    elif place.startswith("-o"):
        given["endpoint_url"] = Written(place, value)
    else:
        monkeypatch.setenv(place.rstrip("="), value)
    with pytest.raises(UsageError) as caught:
        connect(Settings.load(**given))
    assert str(caught.value).startswith(f"{place}{said}")
    assert "TheSecret" not in str(caught.value)


@pytest.mark.parametrize("place", ["--region ", "AWS_DEFAULT_REGION=", "profile"])
def test_a_region_that_cannot_be_one_is_named_with_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    given = {}
    if place == "profile":
        (tmp_path / "aws-config").write_text("[default]\nregion = cn south\n")
        place = f"profile default in {tmp_path / 'aws-config'}: region = "
    elif place == "--region ":
        given["region"] = "cn south"
    else:
        monkeypatch.setenv(place.rstrip("="), "cn south")
    with pytest.raises(UsageError) as caught:
        connect(Settings.load(**given))
    assert str(caught.value).startswith(f"{place}cn south: that is no region")


@pytest.mark.parametrize(
    ("profile", "remedy"),
    [
        ("role_arn = arn:aws:iam::123456789012:role/x\nsource_profile = other", "see to the profile"),
        ("role_arn = arn:aws:iam::123456789012:role/x\nsource_profile = missing", "see to the profile"),
        ("role_arn = arn:aws:iam::123456789012:role/x\ncredential_source = Nowhere", "see to the profile"),
        ("credential_process = false", "see to the profile"),
        ("sso_session = s\nsso_account_id = 1\nsso_role_name = R", "sign in with `aws sso login`"),
    ],
)
def test_a_profile_that_gives_no_keys_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: str, remedy: str
) -> None:
    start = (
        "sso_region = us-east-1\nsso_start_url = https://x.invalid/start\nsso_registration_scopes = sso:account:access"
    )
    (tmp_path / "aws-config").write_text(f"[profile work]\n{profile}\n[profile other]\n[sso-session s]\n{start}\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    with pytest.raises(ForbiddenError, match=remedy) as caught:
        Bucket(parse_address("obs://models"), Settings.load(endpoint_url="http://127.0.0.1:1")).check()
    assert str(caught.value).startswith("no credentials for ")


@pytest.mark.parametrize(
    ("name", "missing"),
    [("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("aws_access_key_id", "aws_secret_access_key")],
)
def test_half_a_pair_of_botocores_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, missing: str
) -> None:
    if name.isupper():
        monkeypatch.setenv(name, "a")
    else:
        (tmp_path / "aws-credentials").write_text(f"[default]\n{name} = a\n")
    with pytest.raises(ForbiddenError, match=f"missing: {missing}.*go together"):
        connect(Settings.load(endpoint_url="http://127.0.0.1:1"))


def test_who_hands_out_keys_is_not_waited_for_as_long_as_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    config = new_session().create_client("sts", region_name="us-east-1").meta.config
    assert (config.connect_timeout, config.retries["total_max_attempts"]) == (2.0, 1)
    ours = Bucket(parse_address("obs://models"), Settings.load(endpoint_url="http://h", request_timeout=7))
    assert (ours.client.meta.config.connect_timeout, ours.client.meta.config.read_timeout) == (7, 7)


def test_a_metadata_service_that_is_silent_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: tuple[str, int], **_: object) -> None:
        asked.append(address)
        raise TimeoutError

    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setattr(credentials, "_silent", {})
    monkeypatch.setattr(socket, "create_connection", refuse)
    for _ in range(2):
        assert not connect(Settings.load(endpoint_url="http://127.0.0.1:1")).has_keys
    assert asked == [("169.254.169.254", 80)]


@pytest.mark.parametrize("name", ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"])
def test_an_agent_of_a_container_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    is_full = name.endswith("FULL_URI")
    monkeypatch.setenv(name, "http://127.0.0.1:1/v1" if is_full else "/v1")
    monkeypatch.setattr(credentials, "_silent", {("169.254.170.2", 80): time.monotonic()})
    with pytest.raises(ForbiddenError, match="127.0.0.1 does not" if is_full else "169.254.170.2 does not"):
        connect(Settings.load(endpoint_url="http://127.0.0.1:1"))


@pytest.mark.parametrize("program", ["/no/such/program", "echo", "echo {}"])
def test_a_program_that_gives_no_keys_is_not_the_servers_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    (tmp_path / "aws-config").write_text(f"[profile work]\ncredential_process = {program}\n")
    with pytest.raises(ForbiddenError, match=r"^no credentials.*(credential_process|see to the profile)"):
        connect(Settings.load(endpoint_url="http://127.0.0.1:1", profile="work"))


def test_fsspec_tells_missing_keys_by_itself_and_finds_later_ones(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.txt", b"a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    files = OBSFileSystem(skip_instance_cache=True)
    with pytest.raises(PermissionError, match="no credentials found: set AWS_ACCESS_KEY_ID"):
        files.ls(bucket.name)
    for name, value in bucket.server.environment.items():
        monkeypatch.setenv(name, value)
    assert files.ls(bucket.name, detail=False) == [f"{bucket.name}/a.txt"]
