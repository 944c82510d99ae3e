"""Make ``docs/images/terminal.svg``: a real session in a terminal, against a real server and a real mount.

    python -m docs.tools.terminal

Starts the embedded S3 server, puts a small model in it, and runs the commands of :data:`SESSION` on a
pseudo-terminal. Needs what ``obsfs demo`` needs: the extra `demo`, ``/dev/fuse``, and root or ``fusermount3``.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from obsfs.demo import model
from obsfs.demo.server import EmbeddedServer

OUTPUT = Path(__file__).resolve().parent.parent / "images" / "terminal.svg"
WIDTH = 96
SESSION = (
    "obsfs mount obs://models /mnt/models",
    "ls -sh /mnt/models/tiny-qwen2",
    "python load.py /mnt/models/tiny-qwen2",
    "obsfs status /mnt/models",
    "obsfs umount /mnt/models",
)
_LOAD = """\
import logging, sys
logging.disable()
from transformers import AutoModelForCausalLM
from transformers.utils import logging as chatter
chatter.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
size = sum(float(tensor.float().sum() * 0) + tensor.nbytes for tensor in model.state_dict().values())
print(f"{size / 1e6:.0f} MB of weights loaded, and each page of them read")
"""
_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""rich's own without its web font, which a page that shows an image does not load."""


def record(home: Path, environment: dict[str, str]) -> list[tuple[str, str]]:
    """Run each command on a pseudo-terminal. Return it with what it printed."""
    found: list[tuple[str, str]] = []
    for command in SESSION:
        ours, theirs = pty.openpty()
        # The paths of the picture are those of the documents; where the session runs has others.
        real = command.replace("/mnt/models", str(home / "mnt")).replace("load.py", str(home / "load.py"))
        process = subprocess.Popen(
            ["bash", "-c", real], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment, cwd=home
        )
        os.close(theirs)
        printed = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # EIO: nobody has the other end any more
                break
            if not piece:
                break
            printed += piece
        os.close(ours)
        if process.wait():
            raise SystemExit(f"{command} failed: {printed.decode()}")
        found.append((command, printed.decode().replace("\r\n", "\n")))
    return found


def shown(text: str, home: Path, endpoint: str) -> str:
    """What a command printed, with the places of the documents in place of those of this run."""
    text = text.replace(str(home / "mnt"), "/mnt/models").replace(str(home / "cache"), "/root/.cache")
    text = text.replace(str(home / "state"), "/root/.local/state").replace(endpoint, "https://s3.example")
    # A spinner writes its line again and again, and clears it in the end: the last one of each line counts.
    lines = (line.rpartition("\r")[2] for line in re.sub(r"\x1b\[\?25[lh]|\x1b\[\d?[AK]", "", text).split("\n"))
    return "\n".join(line for line in lines if line.strip())


def main() -> int:
    """Record the session and write the picture."""
    home = Path(tempfile.mkdtemp(prefix="obsfs-terminal-"))
    try:
        (home / "load.py").write_text(_LOAD)
        (home / "mnt").mkdir()
        with EmbeddedServer(home) as server:
            model.make_model(home / "tiny-qwen2")
            server.upload(home / "tiny-qwen2", "models", "tiny-qwen2/")
            places = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "STATE", "CONFIG")}
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            environment = {**os.environ, **server.environment, **places, "PATH": path, "COLUMNS": str(WIDTH)}
            session = record(
                home, environment | {"TERM": "xterm-256color", "TORCHINDUCTOR_CACHE_DIR": str(home / "torch")}
            )
            console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
            for command, printed in session:
                console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
                console.print(Text.from_ansi(shown(printed, home, server.endpoint).rstrip("\n")))
        OUTPUT.parent.mkdir(exist_ok=True)
        console.save_svg(str(OUTPUT), title="obsfs", theme=MONOKAI, code_format=_FORMAT, unique_id="obsfs")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
