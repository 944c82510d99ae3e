"""``obsfs demo``."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click

from obsfs import processes
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


@click.command(cls=Command, short_help="See it work: a bucket, a model in it, two loads", epilog="Example: obsfs demo")
def demo() -> None:
    """See it work: a bucket, a model in it, and two loads from the mount. Needs the extra `demo`.

    Starts an S3 server on this machine, makes and uploads a small Qwen2 model, mounts the bucket, loads the model
    from it (cold), unmounts, mounts again and loads it once more (warm). Everything is removed afterwards.
    """
    with ExitStack() as cleanup, spinner("starting") as say:
        home = Path(tempfile.mkdtemp(prefix="obsfs-demo-"))
        cleanup.callback(shutil.rmtree, home, ignore_errors=True)
        cleanup.callback(_restore_environment, dict(os.environ))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home / "torch")  # else torch leaves one in the temporary directory
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
        os.environ.update(server.environment, XDG_STATE_HOME=str(home / "state"))
        say("loading from the bucket")
        cold = _run(home)
        say("mounting again, and loading from the cache")
        warm = _run(home)
    _report(cold, warm)


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
    with obsfs.mount(f"obs://{_BUCKET}", mountpoint, cache_dir=home / "cache") as mount:
        mounted = time.perf_counter() - started
        loaded = _load(mountpoint / _NAME)
        shard = next(iter(sorted((mountpoint / _NAME).glob("*.safetensors"))))
        served_by = os.getxattr(shard, "user.obsfs.served_by").decode()
        return _Run(mounted, loaded["seconds"], loaded["text"], mount.status(), served_by)


def _load(directory: Path) -> dict[str, Any]:
    """In a child: whoever has weights mapped cannot be interrupted while a page is on its way."""
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
    tell(f"{_PROMPT!r} goes on (random weights talk nonsense):")
    tell(*(f"  {line}" for line in fold(repr(warm.text), width and width - 2)))
    same = "the same text both times" if warm.text == cold.text else "NOT the same text both times: please report it"
    tell(f"{same}; server, mount, cache and model are removed")
