"""The pages are built by one command, without a warning, and the generated parts are in them."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT


class Text(HTMLParser):
    """The text of a page, and the targets of its images."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text = ""
        self.images: list[str] = []
        self.feed(page.read_text())

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "docs", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.parent.name: Text(path) for path in (tmp_path / "site").glob("*/index.html")}
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= set(pages)
    assert "--cache-min-free SIZE" in pages["options"].text
    assert "AutoTokenizer.from_pretrained" in pages["python"].text
    for name, page in pages.items():
        assert "<!--" not in page.text
        for image in page.images:
            assert (tmp_path / "site" / name / image).resolve().is_file(), f"{name}: {image}"
