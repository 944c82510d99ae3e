"""`obsfs bench` on a real bucket, a mountpoint and a plain directory, and its mistakes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from obsfs.bench import report
from obsfs.bench.measure import CASES, Figure
from obsfs.text import visible
from tests.conftest import MIB, Mounter, Result, Store, random_bytes

Run = Callable[..., Result]


@pytest.mark.slow
def test_a_bucket(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    bucket.put("model/weights.bin", random_bytes(8 * MIB))
    bucket.put("model/config.json", b"{}")
    report, cache = tmp_path / "report.html", tmp_path / "blocks"
    done = obsfs("bench", bucket, "--report", report, "--cache-dir", cache, timeout=120)
    assert done.code == 0, done.err
    assert "model/weights.bin" in done.out
    written = json.loads(report.with_suffix(".json").read_text())
    assert written["file_bytes"] == 8 * MIB
    assert [figure["case"] for figure in written["figures"]] == list(CASES)
    assert all(figure["cold"] > 0 and figure["warm"] > 0 for figure in written["figures"])
    page = report.read_text()
    assert "<svg" in page
    assert "http-equiv" not in page
    assert "src=" not in page
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in page
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_a_mountpoint_keeps_its_cache_as_it_is(bucket: Store, obsfs: Run, mount: Mounter) -> None:
    bucket.put("weights.bin", random_bytes(4 * MIB))
    path = mount(bucket)
    done = obsfs("bench", path, "--no-report", "--json", timeout=120)
    assert done.code == 0, done.err
    assert json.loads(done.out)["target"] == str(bucket)
    assert os.getxattr(path / "weights.bin", "user.obsfs.cached_bytes") == b"0"


def test_any_directory(obsfs: Run, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(random_bytes(4 * MIB))
    report = tmp_path / "report.png"
    done = obsfs("bench", tmp_path, "--report", report)
    assert done.code == 0, done.err
    assert report.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/nowhere",), "no directory"),
        ((".", "--size", "much"), "--size much"),
        ((".", "--report", "report.pdf"), ".html"),
        ((".", "--report", "/nowhere/report.html"), "/nowhere"),
        ((".", "--no-report"), "4 MiB"),
        ((".", "--no-report", "--file", "absent.bin"), "absent.bin"),
        (("obs://models", "--no-report", "--cache-dir", "/proc/nowhere"), "/proc/nowhere"),
    ],
)
def test_a_mistake_is_one_line(obsfs: Run, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    filled = [str(tmp_path) if argument == "." else argument for argument in arguments]
    done = obsfs("bench", *filled)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


@pytest.mark.parametrize("name", [r"$\frac{1$ <script>&" + "\x1b]0;PWNED\x07\n\u202e\udcff" + "x" * 5000, "$$"])
def test_a_report_shows_any_name(name: str, tmp_path: Path) -> None:
    figures = [Figure("read", "read", "MB/s", 100.0, float("nan"))]
    for kind in report.KINDS:
        report.write(tmp_path / f"r{kind}", f"obsfs bench {name}", {"target": name}, figures)
        written = (tmp_path / "r.json").read_text()
        json.dumps(json.loads(written, parse_constant=pytest.fail), ensure_ascii=False).encode()
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in page.splitlines())
    assert "<script" not in page
    assert report.draw(f"obsfs bench {name}", figures).get_suptitle() == visible(f"obsfs bench {name}", 80)
