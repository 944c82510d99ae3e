"""What is missing of an extra, and what installs it."""

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from obsfs import extras
from obsfs.errors import UsageError
from obsfs.ours import DISTRIBUTION

_REQUIRES = [
    "click>=8.1",
    'nowhere-a>=1.0; extra == "train"',
    'click>=8.1; extra == "train"',
    'click>=999; extra == "train"',
    'nowhere-b; python_version < "3" and extra == "train"',
    'obsfs-mount[train]; extra == "all"',
    "this is no requirement ===",
]


@pytest.fixture
def requires(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(name: str) -> Any:
        return _REQUIRES if name == DISTRIBUTION else None

    monkeypatch.setattr(metadata, "requires", known)


@pytest.mark.usefixtures("requires")
@pytest.mark.parametrize("extra", ["train", "all"])
def test_what_is_missing_is_named_as_pip_takes_it(extra: str) -> None:
    assert extras.missing(extra) == ["nowhere-a>=1.0", "click>=999"]
    assert extras.remedy(extra) == "pip install 'nowhere-a>=1.0' 'click>=999'"


@pytest.mark.usefixtures("requires")
def test_a_missing_module_is_one_error_with_the_remedy() -> None:
    extras.require("train", "click", "os.path")
    with pytest.raises(UsageError, match=r"'nowhere_a' is missing: pip install 'nowhere-a>=1\.0'"):
        extras.require("train", "click", "nowhere_a")


def test_our_own_extras_are_installed_for_the_tests() -> None:
    assert extras.missing("test") == []


def test_the_extra_of_bench_has_what_bench_imports_and_no_more() -> None:
    """No torch to draw bars."""
    top = Path(extras.__file__).parents[1]
    project = tomllib.loads((top / "pyproject.toml").read_text())["project"]
    paths = [*(top / "obsfs" / "bench").glob("*.py"), top / "obsfs" / "cli" / "bench.py"]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    always = {Requirement(line).name for line in project["dependencies"]}
    third = {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, *always, "obsfs"}
    assert third == {Requirement(line).name for line in project["optional-dependencies"]["bench"]} == {"matplotlib"}
