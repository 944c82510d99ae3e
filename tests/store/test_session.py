"""Our session knows what botocore's own does."""

from __future__ import annotations

import json
from pathlib import Path

import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import DataNotFoundError, UnknownServiceError

from obsfs.store.s3.http import new_http_session
from obsfs.store.session import new_session


@pytest.mark.parametrize("service", ["s3", "sts", "sso", "sso-oidc"])
@pytest.mark.parametrize("kind", ["service-2", "endpoint-rule-set-1", "paginators-1"])
def test_data_are_the_same(service: str, kind: str) -> None:
    ours, theirs = (
        session.get_component("data_loader").load_service_model(service, kind)
        for session in (new_session(), botocore.session.Session())
    )
    assert json.dumps(ours) == json.dumps(theirs)  # in the same order


def test_regions_and_services_are_the_same() -> None:
    ours, theirs = new_session(), botocore.session.Session()
    assert ours.get_available_regions("s3") == theirs.get_available_regions("s3")
    assert set(theirs.get_available_services()) <= set(ours.get_available_services())
    with pytest.raises((UnknownServiceError, DataNotFoundError)):
        ours.create_client("s4", "us-east-1")


def test_further_data_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "data" / "s4" / "2026-01-01"
    place.mkdir(parents=True)
    (place / "service-2.json").write_text('{"metadata": {"serviceId": "S4"}}')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DATA_PATH", "$HOME/nothing:~/data")
    loader = new_session().get_component("data_loader")
    assert loader.load_service_model("s4", "service-2") == {"metadata": {"serviceId": "S4"}}
    assert loader.load_service_model("s3", "service-2")["metadata"]["serviceId"] == "S3"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"AWS_CA_BUNDLE": "cert.pem"},
        {"REQUESTS_CA_BUNDLE": "cert.pem"},
        {"AWS_CA_BUNDLE": "cert.pem", "REQUESTS_CA_BUNDLE": "both.pem"},
        {"HTTPS_PROXY": "http://user:word@proxy:3128", "HTTP_PROXY": "http://other:3128"},
        {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "h.example"},
    ],
)
@pytest.mark.parametrize("is_insecure", [False, True])
def test_requests_go_the_way_that_the_clients_own_would(
    monkeypatch: pytest.MonkeyPatch, certificate: Path, given: dict[str, str], is_insecure: bool
) -> None:
    for name in (
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
        "https_proxy",
        "http_proxy",
        "no_proxy",
        "REQUESTS_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, str(certificate.parent / value) if value.endswith(".pem") else value)
    session, endpoint = new_session(), "https://h.example"
    config = Config(connect_timeout=7, read_timeout=7, max_pool_connections=9)
    client = session.create_client(
        "s3", "us-east-1", endpoint_url=endpoint, config=config, verify=False if is_insecure else None
    )
    ours = new_http_session(session, endpoint, is_insecure=is_insecure, timeout=7, connections=9)
    theirs = client._endpoint.http_session
    assert type(ours) is type(theirs)
    for name in ("_verify", "_max_pool_connections", "_socket_options", "_cert_file", "_timeout"):
        assert str(getattr(ours, name)) == str(getattr(theirs, name)), name
    assert vars(ours._proxy_config) == vars(theirs._proxy_config)
    assert vars(ours).keys() == vars(theirs).keys()
