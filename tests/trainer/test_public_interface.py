"""The trainer uses obsfs as any other package would: by `obsfs` and `obsfs.plugin`, and nothing else of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import obsfs
import obsfs.plugin
import trainer

_PUBLIC = {"obsfs": frozenset(obsfs.__all__), "obsfs.plugin": frozenset(obsfs.plugin.__all__)}
_SOURCES = sorted(Path(trainer.__file__).parent.rglob("*.py"))


def misuses(source: str) -> Iterator[str]:
    """Yield what a module uses of obsfs that is not public."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {one.name}" for one in node.names if _is_ours(one.name) and one.name not in _PUBLIC)
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or "") and not node.level:
            public = _PUBLIC.get(node.module or "", frozenset())
            yield from (f"from {node.module} import {one.name}" for one in node.names if one.name not in public)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "obsfs":
            if node.attr not in _PUBLIC["obsfs"]:
                yield f"obsfs.{node.attr}"
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            words = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            if name in ("import_module", "__import__", "run_module"):
                yield from (f"{name}({word!r})" for word in words if _is_ours(word) and word not in _PUBLIC)


def _is_ours(module: str) -> bool:
    return module == "obsfs" or module.startswith("obsfs.")


def test_the_trainer_uses_only_public_names_of_obsfs() -> None:
    found = {str(path): used for path in _SOURCES if (used := list(misuses(path.read_text(encoding="utf-8"))))}
    assert len(_SOURCES) > 20
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import obsfs.errors",
        "import obsfs.store.s3 as other",
        "from obsfs import store",
        "from obsfs.errors import UsageError",
        "from obsfs.plugin import _facts",
        "if True:\n    def load():\n        from obsfs.service import mounts",
        "import obsfs\nobsfs.errors.UsageError",
        "importlib.import_module('obsfs.settings')",
        "__import__('obsfs.text')",
    ],
)
def test_each_way_around_the_public_names_is_found(source: str) -> None:
    assert list(misuses(source))


@pytest.mark.parametrize(
    "source",
    [
        "import obsfs\nobsfs.push",
        "import obsfs.plugin",
        "from obsfs.plugin import tell",
        "import obsfs_other",
        "from .obsfs import x",
    ],
)
def test_public_names_are_not_refused(source: str) -> None:
    assert not list(misuses(source))


def test_the_earlier_name_of_a_result_still_works() -> None:
    assert trainer.Outcome is trainer.TrainResult
