"""How other programs are started: what they may import, and where they work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from obsfs import ObsfsError, processes
from obsfs.bench import measure
from tests.conftest import Mounter, Store
from tests.service.impostor import NOBODY, Impostor
from trainer.serve import serve

_MODULES = ("botocore", "click", "json", "mmap", "multiprocessing", "obsfs", "sglang", "transformers", "xxhash")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules that leave a mark when they are imported: ``mark`` beside it."""
    directory = tmp_path / "trap"
    directory.mkdir()
    for name in _MODULES:
        (directory / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(directory)
    return directory


def _paths(environment: dict[str, str]) -> list[str]:
    return environment.get("PYTHONPATH", "").split(os.pathsep)


def test_children_are_told_no_directory_of_strangers(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, shared, theirs, mounted = (tmp_path / name for name in ("mine", "shared", "theirs", "mounted"))
    for path in (mine, shared, theirs, mounted):
        path.mkdir()
    shared.chmod(0o1777)
    os.chown(theirs, NOBODY, NOBODY)
    given = ["", ".", "..", "lib", str(trap), str(shared), str(theirs), str(mounted / "lib"), str(mine)]
    impostor = Impostor(mounted)
    try:
        monkeypatch.setattr(sys, "path", [*given, *sys.path])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(given))
        for environment in (processes.child_environment(), processes.foreign_environment()):
            assert environment["PYTHONSAFEPATH"] == "1"
            assert [path for path in _paths(environment) if path in given] == [str(mine)]
        assert impostor.asked == 0
    finally:
        impostor.close()
    assert str(Path(processes.__file__).parents[1]) in _paths(processes.child_environment())


def test_a_program_is_found_only_where_it_is_in_every_working_directory(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (trap, tmp_path):
        (directory / "backend").write_text("#!/bin/sh\n")
        (directory / "backend").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", "../trap", str(tmp_path), os.environ["PATH"]]))
    assert processes.find_program("backend") == str(tmp_path / "backend")
    assert processes.find_program(sys.executable) == sys.executable
    with pytest.raises(ObsfsError, match="no-such-program"):
        processes.find_program("no-such-program")


@pytest.mark.parametrize("module", ["obsfs", "trainer"])
def test_commands_import_nothing_from_the_working_directory(module: str, trap: Path, tmp_path: Path) -> None:
    (trap / "obsfs.py").unlink()  # what `-m` runs is looked up there, by Python itself
    (trap / "json.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()


def test_a_mount_imports_nothing_from_the_working_directory(
    trap: Path, tmp_path: Path, bucket: Store, mount: Mounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a", b"1")
    monkeypatch.setattr(sys, "path", ["", str(trap), *sys.path])
    monkeypatch.setenv("PYTHONPATH", f":{trap}")
    path = mount(bucket)
    supervisor = mount.process(path).pid
    assert Path(f"/proc/{supervisor}/cwd").readlink() == Path("/")
    assert (path / "a").read_bytes() == b"1"
    assert not (tmp_path / "mark").exists()


def test_a_measurement_imports_nothing_from_the_working_directory(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    sample = measure.Sample(Path("file"), 1 << 20, [])
    assert measure.CASES["mmap"][2](tmp_path, sample, 1 << 20) > 0
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_a_backend_runs_in_an_empty_directory_of_its_own(
    backend: str, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trap / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "multiprocessing.py").write_bytes((trap / "multiprocessing.py").read_bytes())
    report = tmp_path / "report"
    code = (
        "import json, multiprocessing, os, sys\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=os.getpid)\n"
        "    child.start(); child.join()\n"
        f"    with open({str(report)!r}, 'w') as file:\n"
        "        json.dump([os.getcwd(), os.listdir(), sys.path, sys.argv, child.exitcode], file)\n"
    )
    stubs = tmp_path / "stubs"
    (stubs / backend).mkdir(parents=True)
    (stubs / backend / "__init__.py").write_text("")
    (stubs / backend / "launch_server.py").write_text(code)
    (stubs / "bin").mkdir()
    (stubs / "bin" / backend).write_text(f"#!{sys.executable}\n{code}")
    (stubs / "bin" / backend).chmod(0o755)
    monkeypatch.syspath_prepend(str(stubs))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(trap), str(stubs)]))
    monkeypatch.setenv("PATH", os.pathsep.join([".", str(stubs / "bin"), os.environ["PATH"]]))
    with pytest.raises(ObsfsError, match="did not start"), serve(str(model), None, backend=backend):
        pass
    home, names, paths, arguments, code_of_child = json.loads(report.read_text())
    assert names == ["model"]  # a link, by which a backend can be told the model by its name
    assert not Path(home).exists()
    assert str(model) in arguments
    assert not {"", home, str(trap), str(model)} & set(paths)
    assert code_of_child == 0
    assert not (tmp_path / "mark").exists()
