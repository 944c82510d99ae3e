from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import botocore.session
import pytest

from obsfs.errors import ForbiddenError, ObsfsError, UsageError, WaitWarning
from obsfs.filesystem import OBSFileSystem
from obsfs.paths import config_path
from obsfs.settings import GivenValue, Settings
from obsfs.store import credentials
from obsfs.store.address import parse_address
from obsfs.store.credentials import Keys, explicit_keys
from obsfs.store.s3.config import load_config
from obsfs.store.s3.endpoint import Endpoint
from obsfs.store.s3.store import S3Store
from obsfs.store.session import new_session
from tests.conftest import Mounter, Store

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
    config = load_config(Settings.load(region="cn-south-1"))
    assert config.url == "https://obs.cn-south-1.myhuaweicloud.com"
    assert config.options["s3"] == {"addressing_style": "virtual"}
    assert config.options["request_checksum_calculation"] == "when_required"
    assert config.options["response_checksum_validation"] == "when_required"
    assert config.keys == Keys("h", "hs", None)


def test_amazon_keeps_its_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    config = load_config(Settings.load(), "s3")
    assert config.url.endswith(".amazonaws.com")
    assert "request_checksum_calculation" not in config.options


def test_botocores_endpoint_variable_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    config = load_config(Settings.load())
    assert config.url == "http://127.0.0.1:9000"
    assert config.options["s3"] == {"addressing_style": "path"}


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
    assert load_config(Settings.load(), "s3").url == client.meta.endpoint_url


def test_no_endpoint_and_no_region_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="--region"):
        load_config(Settings.load())


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="nobody"):
        load_config(Settings.load(profile="nobody"))


def test_a_profile_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for profile, variable in (("none", ""), (None, "none")):
        monkeypatch.setenv("AWS_PROFILE", variable)
        with pytest.raises(UsageError, match=r"profile 'none' not found.*list-profiles"):
            load_config(Settings.load(profile=profile, region="cn-south-1"))


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
        given["endpoint_url"] = GivenValue(place, value)
    else:
        monkeypatch.setenv(place.rstrip("="), value)
    with pytest.raises(UsageError) as caught:
        load_config(Settings.load(**given))
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
        load_config(Settings.load(**given))
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
        S3Store(parse_address("obs://models"), Settings.load(endpoint_url="http://127.0.0.1:1")).check()
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
        load_config(Settings.load(endpoint_url="http://127.0.0.1:1"))


def test_who_hands_out_keys_is_not_waited_for_as_long_as_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    config = new_session().create_client("sts", region_name="us-east-1").meta.config
    assert (config.connect_timeout, config.retries["total_max_attempts"]) == (2.0, 1)
    settings = Settings.load(endpoint_url="http://h", request_timeout=7)
    ours = Endpoint(0, settings, load_config(settings)).client.meta.config
    assert (ours.connect_timeout, ours.read_timeout) == (7, 7)


def test_a_metadata_service_that_is_silent_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: tuple[str, int], **_: object) -> None:
        asked.append(address)
        raise TimeoutError

    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setattr(credentials, "_silent", {})
    monkeypatch.setattr(socket, "create_connection", refuse)
    for _ in range(2):
        assert not load_config(Settings.load(endpoint_url="http://127.0.0.1:1")).has_credentials
    assert asked == [("169.254.169.254", 80)]


@pytest.mark.parametrize("name", ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"])
def test_an_agent_of_a_container_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    is_full = name.endswith("FULL_URI")
    monkeypatch.setenv(name, "http://127.0.0.1:1/v1" if is_full else "/v1")
    monkeypatch.setattr(credentials, "_silent", {("169.254.170.2", 80): time.monotonic()})
    with pytest.raises(ForbiddenError, match="127.0.0.1 does not" if is_full else "169.254.170.2 does not"):
        load_config(Settings.load(endpoint_url="http://127.0.0.1:1"))


@pytest.mark.parametrize("program", ["/no/such/program", "echo", "echo {}"])
def test_a_program_that_gives_no_keys_is_not_the_servers_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    (tmp_path / "aws-config").write_text(f"[profile work]\ncredential_process = {program}\n")
    with pytest.raises(ForbiddenError, match=r"^no credentials.*(credential_process|see to the profile)"):
        load_config(Settings.load(endpoint_url="http://127.0.0.1:1", profile="work"))


@pytest.fixture
def silent_sts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[socket.socket]]:
    """The connections to a place of keys that accepts them, and never says a word."""
    (tmp_path / "token").write_text("token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    accepted.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield accepted
        server.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()


def test_a_place_of_keys_that_is_silent_is_not_waited_for(
    silent_sts: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_LOOK_SECONDS", 0.5)
    with pytest.raises(ForbiddenError, match=r"no credentials in time: web identity \(STS\) does not answer: "):
        S3Store(parse_address("obs://models"), Settings.load(endpoint_url="http://127.0.0.1:1"))
    with pytest.raises((ForbiddenError, PermissionError), match="in time: web identity"):
        OBSFileSystem(endpoint_url="http://127.0.0.1:1", skip_instance_cache=True).ls("models")
    assert len(silent_sts) == 2


def test_a_bucket_that_was_reached_before_needs_no_keys_yet(
    silent_sts: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_LOOK_SECONDS", 30.0)
    S3Store(parse_address("obs://models"), Settings.load(endpoint_url="http://127.0.0.1:1"), is_known=True)
    assert not silent_sts


def test_every_verb_asks_once(silent_sts: list[socket.socket], tmp_path: Path) -> None:
    place = "obs://models/a@v1"
    (tmp_path / "mnt").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    verbs = [
        ("mount", "obs://models", tmp_path / "mnt"),
        ("models", "obs://models"),
        ("pull", place, tmp_path / "to"),
        ("push", tmp_path / "model", place),
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "obsfs", *map(str, verb), "--endpoint-url", "http://127.0.0.1:1"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for verb in verbs
    ]
    told = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert [code for _, code in told] == [2] * len(verbs)
    assert all(text.startswith("obsfs: no credentials in time: ") and text.count("\n") == 1 for text, _ in told), told
    assert len(silent_sts) == len(verbs)


def test_keys_that_are_given_ask_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text("[profile work]\ncredential_process = false\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("HUAWEICLOUD_SDK_AK", "h")
    monkeypatch.setenv("HUAWEICLOUD_SDK_SK", "hs")
    assert load_config(Settings.load(region="cn-south-1")).keys == Keys("h", "hs", None)
    with pytest.raises(ForbiddenError, match="see to the profile"):
        load_config(Settings.load(endpoint_url="http://127.0.0.1:1"))
    monkeypatch.setenv("OBSFS_ACCESS_KEY_ID", "o")
    monkeypatch.setenv("OBSFS_SECRET_ACCESS_KEY", "os")
    assert load_config(Settings.load(endpoint_url="http://127.0.0.1:1")).keys == Keys("o", "os", None)


def _profile_by_program(home: Path, *lines: str, **keys: str) -> None:
    """A profile `work` whose keys come from a program that does `lines` and then prints `keys`."""
    (home / "keys.json").write_text(json.dumps({"Version": 1, **keys}))
    program = home / "program"
    program.write_text("\n".join(["#!/bin/sh", *lines, f"cat {home / 'keys.json'}", ""]))
    program.chmod(0o700)
    (home / "aws-config").write_text(
        f"[profile work]\ncredential_process = {program}\n"
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = work\n"
    )


@pytest.mark.parametrize("profile", ["work", "role"])
def test_a_program_that_takes_its_time_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: str
) -> None:
    _profile_by_program(tmp_path, "read line < " + str(tmp_path / "fifo"), AccessKeyId="a", SecretAccessKey="s")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(credentials, "_LOOK_SECONDS", 0.2)

    def go_on(message: Warning | str, *_: object, **__: object) -> None:
        warned.append(str(message))
        (tmp_path / "fifo").write_text("go on\n")

    warned: list[str] = []
    settings = Settings.load(endpoint_url="http://127.0.0.1:1", profile=profile)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", go_on)
        # A role is asked for with the keys of its source: the STS that is named here is not there.
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        if profile == "work":
            assert load_config(settings).has_credentials
        else:
            with pytest.raises(ObsfsError, match="nothing listens"):
                load_config(settings)
    assert [text.partition(" (")[0] for text in warned] == ["waiting for credentials"]
    assert f"of profile {profile}" in warned[0]


def test_a_program_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _profile_by_program(tmp_path, f"read line < {tmp_path / 'fifo'}")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(credentials, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(credentials, "_ASSISTED_SECONDS", 0.1)
    with (
        pytest.warns(WaitWarning, match="credential_process of profile work"),
        pytest.raises(ForbiddenError, match="in time: credential_process of profile work does not answer"),
    ):
        load_config(Settings.load(endpoint_url="http://127.0.0.1:1", profile="work"))
    (tmp_path / "fifo").write_text("end\n")


def test_who_mounts_is_told_what_is_waited_for(
    bucket: Store, mount: Mounter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = {"AccessKeyId": os.environ["AWS_ACCESS_KEY_ID"], "SecretAccessKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    _profile_by_program(tmp_path, "sleep 2", **keys)
    with pytest.warns(WaitWarning, match="waiting for credentials .credential_process of profile work"):
        mount(bucket, profile="work")


def test_fsspec_signs_with_keys_that_are_refreshed(
    bucket: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket.put("a.txt", b"a")
    soon = datetime.now(UTC) + timedelta(minutes=5)  # botocore refreshes them a quarter of an hour before
    keys = {"AccessKeyId": os.environ["AWS_ACCESS_KEY_ID"], "SecretAccessKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    _profile_by_program(tmp_path, f"echo >> {tmp_path / 'calls'}", Expiration=soon.isoformat(), **keys)
    files = OBSFileSystem(profile="work", skip_instance_cache=True)
    before = (tmp_path / "calls").stat().st_size
    assert files.ls(bucket.name, detail=False) == [f"{bucket.name}/a.txt"]
    assert (tmp_path / "calls").stat().st_size > before
    files.pipe(f"{bucket.name}/b.txt", b"b")
    assert files.cat(f"{bucket.name}/b.txt") == b"b"


def test_fsspec_tells_missing_keys_by_itself_and_finds_later_ones(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.txt", b"a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    files = OBSFileSystem(skip_instance_cache=True)
    with pytest.raises(PermissionError, match=r"no credentials found \(environment, profile default, .*: set AWS_ACC"):
        files.ls(bucket.name)
    for name, value in bucket.server.environment.items():
        monkeypatch.setenv(name, value)
    assert files.ls(bucket.name, detail=False) == [f"{bucket.name}/a.txt"]
