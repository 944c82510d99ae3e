from __future__ import annotations

from pathlib import Path

import botocore.session
import pytest

from obsfs.errors import UsageError
from obsfs.remote.client import connect
from obsfs.remote.credentials import Keys, explicit_keys
from obsfs.settings import Settings

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
