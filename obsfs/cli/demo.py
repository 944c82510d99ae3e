"""``obsfs demo``."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import click

from obsfs import private, processes
from obsfs.cli.options import Command
from obsfs.cli.output import columns, fold, human, spinner, tell, terminal_width
from obsfs.errors import ObsfsError

_BUCKET = "models"
_NAME = "tiny-qwen2"
_PROMPT = "The import statement"


class _Run(NamedTuple):
    mount_seconds: float
    load_seconds: float
    text: str
    status: dict[str, Any]
    served_by: str


_EPILOG = """\b
Examples:
  obsfs demo
  obsfs demo --keep   # and look around, until Ctrl-C
"""


@click.command(cls=Command, short_help="See it work: a bucket, a model in it, two loads", epilog=_EPILOG)
@click.option("--keep", is_flag=True, help="Keep the bucket and a mount of it to play with, until Ctrl-C.")
def demo(keep: bool) -> None:
    """Show obsfs at work on a small model. Needs the extra `demo`.

    Starts an S3 server on this machine, makes and uploads a small Qwen2 model, mounts the bucket, and loads the model
    from it (cold). Then it unmounts, mounts again, and loads the model once more (warm). At the end everything is
    removed, or, with --keep, when you press Ctrl-C.
    """
    with ExitStack() as cleanup:
        with spinner("starting") as say:
            home = Path(tempfile.mkdtemp(prefix="obsfs-demo-"))
            cleanup.callback(shutil.rmtree, home, ignore_errors=True)
            cleanup.callback(_restore_environment, dict(os.environ))
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home / "torch")  # else torch leaves one in TMPDIR
            say("importing transformers")
            from obsfs.demo import model as models

            models.require()
            _silence_transformers()
            say("starting an S3 server (SeaweedFS)")
            from obsfs.demo.server import EmbeddedServer

            server = cleanup.enter_context(EmbeddedServer(home))
            say("making a model")
            parameters = models.make_model(home / _NAME)
            size = server.upload(home / _NAME, _BUCKET, f"{_NAME}/")
            about = f"A Qwen2 of {parameters / 1e6:.0f} million parameters (random weights), {human(size)}, is in"
            tell(*fold(f"{about} obs://{_BUCKET}/{_NAME}", terminal_width()))
            shutil.rmtree(home / _NAME)
            variables = {**server.environment, "XDG_STATE_HOME": str(home / "state")}
            variables["OBSFS_CACHE_DIR"] = str(home / "cache")
            os.environ.update(variables)
            say("loading from the bucket")
            cold = _run(home)
            say("mounting again, and loading from the cache")
            warm = _run(home)
        _report(cold, warm)
        if keep:
            _wait(home, variables)
    tell("server, mount, cache and model are removed")


def _wait(home: Path, variables: dict[str, str]) -> None:
    """Mount once more, say how to use it and how to end it, and wait for Ctrl-C (or SIGTERM)."""
    import obsfs

    file = home / "environment"
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    private.write_file(file, "".join(lines).encode())
    with obsfs.mount(f"obs://{_BUCKET}", home / "mnt") as mount:
        installed = Path(sys.executable).with_name("obsfs")
        program = shlex.join([str(installed)] if installed.exists() else [sys.executable, "-m", "obsfs"])
        tell(
            "",
            f"The bucket obs://{_BUCKET} stays mounted on {mount.path}. In another terminal:",
            f"  ls -l {mount.path}/{_NAME}",
            f"  . {file}      # keys and endpoint of the bucket",
            f"  {program} status {mount.path}",
            f"  {program} models obs://{_BUCKET}",
            "Ctrl-C here unmounts it, ends the server and removes everything.",
        )
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def _silence_transformers() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _restore_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _run(home: Path) -> _Run:
    import obsfs

    mountpoint = home / "mnt"
    mountpoint.mkdir(exist_ok=True)
    started = time.perf_counter()
    with obsfs.mount(f"obs://{_BUCKET}", mountpoint) as mount:
        mounted = time.perf_counter() - started
        loaded = _load(mountpoint / _NAME)
        shard = next(iter(sorted((mountpoint / _NAME).glob("*.safetensors"))))
        served_by = os.getxattr(shard, "user.obsfs.served_by").decode()
        return _Run(mounted, loaded["seconds"], loaded["text"], mount.status(), served_by)


def _load(directory: Path) -> dict[str, Any]:
    """Load the model in a child process: a process that waits for a mapped page cannot be interrupted."""
    child = subprocess.Popen(
        processes.python_command("-m", "obsfs.demo.model", str(directory), _PROMPT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        env=processes.child_environment(),
    )
    try:
        out, err = child.communicate()
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        raise ObsfsError("the model could not be loaded", err.decode(errors="replace")[-500:])
    loaded: dict[str, Any] = json.loads(out)
    return loaded


def _report(cold: _Run, warm: _Run) -> None:
    runs = (cold, warm)
    rows = [
        ("mount until it answers", *(f"{run.mount_seconds:.2f} s" for run in runs)),
        ("load, every weight read", *(f"{run.load_seconds:.2f} s" for run in runs)),
        ("fetched from the bucket", *(human(run.status["bytes_fetched"]) for run in runs)),
        ("range requests", *(str(run.status["requests"]) for run in runs)),
        ("weights served by", *(run.served_by for run in runs)),
    ]
    width = terminal_width()
    tell("", *columns(("", ">cold (from the bucket)", ">warm (from the SSD)"), rows, width), "")
    tell(f"The model continues {_PROMPT!r} (random weights produce nonsense):")
    tell(*(f"  {line}" for line in fold(repr(warm.text), width and width - 2)))
    same = "the same text both times" if warm.text == cold.text else "NOT the same text both times: please report it"
    tell(same)
