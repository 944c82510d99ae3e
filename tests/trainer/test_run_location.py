"""Where a run publishes, by all that can be given as its output."""

from __future__ import annotations

from pathlib import Path

import pytest

from obsfs import ObsfsError
from tests.conftest import Mounter, Store
from trainer.run_location import check_output, run_location


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("obs:/bucket/run", "give a directory, or obs://BUCKET/NAME"),
        ("s3:bucket/run", "no place that can be written"),
        ("hf:org/name", "no place that can be written"),
        ("gs://bucket/run", "no place that can be written"),
        ("file:///tmp/run", "no place that can be written"),
        ("OBS://bucket/run", "no place that can be written"),
        ("obs://bucket", "is a bucket: name a place in it: obs://bucket/NAME"),
        ("obs://bucket/", "is a bucket"),
    ],
)
def test_what_is_meant_as_a_url_and_is_no_place_is_refused(output: str, said: str) -> None:
    with pytest.raises(ObsfsError, match=said):
        check_output(output)


def test_a_directory_may_have_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    for output in ("run:1", "./obs:x", "s3:", "C:/run", "a b", "~/x"):
        check_output(output)
        assert run_location(output, {}) is None


def test_a_mount_is_known_however_a_path_leads_there(
    bucket: Store, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("models/a", b"")
    mounted = mount(bucket)
    (tmp_path / "link").symlink_to(mounted / "models")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("HOME", str(mounted))
    monkeypatch.chdir(mounted.parent)
    for output in (mounted / "x/run", f"{mounted}/x/./run/", f"{mounted.name}/x/run", "~/x/run",
                   tmp_path / "link/../x/run"):  # fmt: skip
        found = run_location(str(output), {})
        assert found is not None
        assert found.url == f"{bucket}/x/run"
    linked = run_location(str(tmp_path / "link" / "run"), {})
    assert linked is not None
    assert linked.url == f"{bucket}/models/run"
    with pytest.raises(ObsfsError, match="is a bucket"):
        run_location(str(mounted), {})
    with pytest.raises(ObsfsError, match=r"loop/run cannot be written \(Too many levels"):
        run_location(str(tmp_path / "loop" / "run"), {})
