"""Our session knows what botocore's own does."""

from __future__ import annotations

import json
from pathlib import Path

import botocore.session
import pytest
from botocore.exceptions import DataNotFoundError, UnknownServiceError

from obsfs.remote.session import new_session


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
