"""Every command and every piece of Python of the README and the pages is run, against a real server and real mounts.

The blocks of one page run in order, in one directory, as a reader would type them. These words stand for others:

=========================================  ============================================================
on the page                                here
=========================================  ============================================================
``obs://models``, ``s3://models``          a bucket of the server, with a tiny Qwen2 by the names of the pages
``/mnt/``                                  a directory of the test
``https://minio:9000``, ``a.example``, ..  the server, by its address or by its name
``...`` behind the name of a key           the keys of the server
``obsfs status`` alone                     may say that a mount of another test is dead
=========================================  ============================================================

A file that a block begins with (``# run.yaml``, ``# config.toml``) is written, and read as obsfs reads it. A comment
``<!-- not run here: REASON -->`` above a block keeps it from being run; test_pages.py looks at it all the same.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest

from obsfs import mountinfo
from obsfs.filesystem import OBSFileSystem
from obsfs.fuse.kernel import channel
from obsfs.settings import Settings
from tests.conftest import MIB, Result, Store, wait_for
from tests.docs.pages import PAGES, Block, blocks
from trainer.config import load_config, read_yaml

_CHATS = [
    {"messages": [{"role": "user", "content": f"name {n}"}, {"role": "assistant", "content": f"it is module {n}"}]}
    for n in range(4)
]
_SHELL = frozenset("|&;<>()$*\\")
"""What only a shell understands."""
_RUN = [page for page in PAGES if any(not block.reason for block in blocks(page))]


class Session:
    """A reader of one page: a directory, an environment that lasts from block to block, and names in Python."""

    def __init__(
        self, home: Path, bucket: Store, monkeypatch: pytest.MonkeyPatch, obsfs: Callable[..., Result]
    ) -> None:
        self.home, self.bucket, self._monkeypatch, self._obsfs = home, bucket, monkeypatch, obsfs
        self._names: dict[str, Any] = {}
        programs = home / "bin"
        programs.mkdir()
        program = programs / "obsfs"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m obsfs "$@"\n')
        program.chmod(0o700)
        monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        monkeypatch.setenv("HOME", str(home))
        (home / "work").mkdir()
        monkeypatch.chdir(home / "work")
        (home / "mnt" / "models").mkdir(parents=True)

    def here(self, text: str) -> str:
        """The text of a block, with the words of the table above replaced."""
        text = re.sub(r"\b(obs|s3)://models\b", rf"\1://{self.bucket.name}", text)
        text = text.replace("/mnt/", f"{self.home}/mnt/")
        server = self.bucket.server
        for url, endpoint in {
            "https://minio:9000": server.endpoint,
            "https://a.example:9000": server.endpoint,
            "https://b.example:9000": server.endpoint.replace("127.0.0.1", "localhost"),
        }.items():
            text = text.replace(url, endpoint)
        text = re.sub(r"(_AK|ACCESS_KEY_ID)=\.\.\.", rf"\1={server.access_key}", text)
        text = re.sub(r"(_SK|SECRET_ACCESS_KEY)=\.\.\.", rf"\1={server.secret_key}", text)
        return re.sub(r"^obsfs status$", "obsfs status || [ $? = 1 ]", text, flags=re.MULTILINE)

    def run(self, block: Block) -> None:
        text = self.here(block.text)
        if block.language == "sh":
            self._shell(text, block)
        elif block.language == "python":
            exec(compile(text, str(block), "exec"), self._names)
            # What was imported stays. A model goes, as with a reader's Python: its weights are maps of the mount.
            self._names = {name: value for name, value in self._names.items() if isinstance(value, ModuleType)}
            gc.collect()
        elif name := re.match(r"# (\w+\.(?:yaml|toml))\n", text):
            self._file(name[1], text)

    def _shell(self, text: str, block: Block) -> None:
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["obsfs"] and not _SHELL.intersection(line.partition("    #")[0]):
                done = self._obsfs(*words[1:], timeout=120)  # as a program of its own, sooner than bash would have it
                assert done.code == 0, f"{block}\n{line}\n{done.out}\n{done.err}"
            else:
                self._bash(line, block)

    def _bash(self, text: str, block: Block) -> None:
        after = self.home / "environment"
        script = f"set -eu -o pipefail\n{text}\nenv -0 > {after}\n"
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{block}\n{text}\n{done.stdout}\n{done.stderr}"
        for entry in after.read_text().split("\0"):
            name, is_set, value = entry.partition("=")
            if is_set and name not in ("_", "PWD", "OLDPWD", "SHLVL"):
                self._monkeypatch.setenv(name, value)

    def _file(self, name: str, text: str) -> None:
        if name == "config.toml":
            path = Path(os.environ["XDG_CONFIG_HOME"]) / "obsfs" / name
            path.parent.mkdir(parents=True)
            path.write_text(text)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                Settings.load()
        else:
            Path(name).write_text(text)
            load_config(read_yaml(Path(name)))

    def mounted(self) -> list[Path]:
        return [entry.mountpoint for entry in mountinfo.mounts() if entry.mountpoint.is_relative_to(self.home)]


@pytest.fixture
def session(
    bucket: Store, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obsfs: Callable[..., Result]
) -> Iterator[Session]:
    """A new user, with models and data in a bucket, a model in the directory, and something in the cache."""
    home = tmp_path / "home"
    home.mkdir()
    made = Session(home, bucket, monkeypatch, obsfs)
    for name in ("Qwen2-7B", "Qwen2-7B-Instruct"):
        bucket.server.upload(tiny, bucket.name, f"{name}/")
    bucket.put("Qwen2-7B-Instruct/consolidated.bin", bytes(8 * MIB))
    bucket.put("data/chat.jsonl", "".join(json.dumps(chat) + "\n" for chat in _CHATS).encode())
    pandas.DataFrame({"text": ["a", "b"]}).to_parquet(home / "train.parquet")
    bucket.put("data/train.parquet", (home / "train.parquet").read_bytes())
    shutil.copytree(tiny, "Qwen2-7B-tuned")
    OBSFileSystem.clear_instance_cache()
    OBSFileSystem().cat(f"{bucket.name}/data/chat.jsonl")
    yield made
    OBSFileSystem.clear_instance_cache()
    for path in made.mounted():
        channel.unmount(path, lazy=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", _RUN, ids=lambda page: str(page.name))
def test_each_block_does_what_the_page_says(page: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [block for block in blocks(page) if not block.reason]
    if any("=..." in block.text for block in own):  # the page gives keys itself
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for block in own:
        session.run(block)
    wait_for(lambda: session.mounted() == [])


def test_a_block_that_fails_is_seen(session: Session) -> None:
    for text in ("false\ntrue\n", "obsfs umount /mnt/models\n", "echo obsfs; exit 3\n"):
        with pytest.raises(AssertionError):
            session.run(Block(PAGES[0], 1, "sh", text))
