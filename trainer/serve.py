"""Serve a model, with an adapter if given, by the OpenAI-compatible server of transformers, vLLM or SGLang."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from obsfs.plugin import (
    UsageError,
    child_environment,
    find_program,
    first_line,
    foreign_environment,
    python_command,
    state_dir,
    tell,
)
from trainer import bitsandbytes_cpu
from trainer.base_model import BaseModel, open_model, refuse_other_kinds
from trainer.merge import ADAPTER, merge, open_adapter
from trainer.temporary import temporary_directory

BACKENDS = ("transformers", "vllm", "sglang")
_START_SECONDS = 600.0
_END_SECONDS = 10.0


class Server(NamedTuple):
    """A running server: its URL (without ``/v1``), the name of the model in requests, and its process."""

    url: str
    model: str
    process: subprocess.Popen[bytes]


def choose_backend(given: str | None) -> str:
    """Return the given backend, or the fastest one installed. Raises UsageError if it is not installed."""
    if given is None:
        given = next((name for name in ("vllm", "sglang") if find_spec(name)), "transformers")
    needs = {"transformers": ("fastapi", "transformers[serving]")}.get(given, (given, given))
    if find_spec(needs[0]) is None:
        raise UsageError(f"--backend {given} needs {needs[1]}", f"pip install '{needs[1]}'")
    return given


def command_of(
    backend: str, model: Path, adapter: Path | None, where: Sequence[str], extra: Sequence[str]
) -> list[str]:
    """Return the command that starts a backend, in a directory with a link to the model.

    Args:
        backend: One of :data:`BACKENDS`.
        model: The directory of the model. Its name is the name of the model in requests.
        adapter: The directory of an adapter; None for transformers, which serves no adapters but a merged model.
        where: The options for host and port.
        extra: Further options.
    """
    named = [*where, "--served-model-name", model.name]
    if backend == "vllm":
        lora = ["--enable-lora", "--lora-modules", f"{adapter.name}={adapter}"] if adapter else []
        return ["vllm", "serve", str(model), *named, *lora, *extra]
    if backend == "sglang":
        lora = ["--lora-paths", f"{adapter.name}={adapter}"] if adapter else []
        return [*python_command("-m", "sglang.launch_server", "--model-path", str(model)), *named, *lora, *extra]
    # A module of ours runs it, which keeps the noise of libraries off the terminal.
    return [*python_command("-m", "trainer.backend"), "serve", model.name, *where, *extra]


@contextmanager
def serve(
    model: str,
    adapter: str | None,
    *,
    backend: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    extra: Sequence[str] = (),
    quiet: bool = False,
    settings: dict[str, Any] | None = None,
) -> Iterator[Server]:
    """Serve a model until the block ends.

    Args:
        model: The model: a directory, a URL, or a name in the library. An adapter is served with its base.
        adapter: An adapter for it.
        backend: One of :data:`BACKENDS`; by default the fastest one installed.
        host: The address to listen on.
        port: The port to listen on; 0 takes any free one.
        extra: Further options for the backend.
        quiet: Discard the server's output.
        settings: Settings of obsfs.

    Raises:
        UsageError: The server does not start.
    """
    settings = settings or {}
    chosen = choose_backend(backend)
    port = _free_port(host, port)  # before anything is loaded: a wrong port is reported at once
    with ExitStack() as stack:
        base, tuned = _open(stack, model, adapter, settings)
        if chosen == "transformers":
            refuse_other_kinds(base.path)
            bitsandbytes_cpu.refuse_unservable(base.path)
        _tell_of_template(base, tuned, is_chat=quiet, extra=extra)
        path, adapter_path = base.path, tuned.path if tuned else None
        if tuned is not None and chosen == "transformers":
            path = stack.enter_context(temporary_directory("obsfs-serve-")) / tuned.path.name
            merge(str(tuned.path), str(path), base=str(base.path), settings=settings)
            adapter_path = None
        command = command_of(chosen, path, adapter_path, ["--host", host, "--port", str(port)], extra)
        silence = subprocess.DEVNULL if quiet else None
        # The server runs in a directory of its own, because the model's may contain anything. A link there gives the
        # model its name: transformers has no option for it.
        home = stack.enter_context(temporary_directory("obsfs-serve-"))
        (home / path.name).symlink_to(path.absolute())
        process = subprocess.Popen(
            [find_program(command[0]), *command[1:]],
            cwd=home,
            env=child_environment() if command[0] == sys.executable else foreign_environment(),
            stdout=silence,
            stderr=silence,
        )
        stack.callback(_end, process)
        url = f"http://{host}:{port}"
        _wait(url, process)
        yield Server(url, (adapter_path or path).name, process)


def _open(
    stack: ExitStack, model: str, adapter: str | None, settings: dict[str, Any]
) -> tuple[BaseModel, BaseModel | None]:
    if adapter is not None:
        tuned, base = stack.enter_context(open_adapter(adapter, model, settings))
        return base, tuned
    found = stack.enter_context(open_model(model, settings))
    if (found.path / ADAPTER).exists() and not (found.path / "config.json").exists():
        tuned, base = stack.enter_context(open_adapter(model, None, settings))
        return base, tuned
    return found, None


def _tell_of_template(base: BaseModel, tuned: BaseModel | None, *, is_chat: bool, extra: Sequence[str]) -> None:
    """Warn at the start that chats will be refused without a chat template. Raises UsageError for ``obsfs chat``."""
    source = tuned if tuned and (tuned.path / "tokenizer_config.json").exists() else base
    if has_chat_template(source.path) or any("chat-template" in word for word in extra):
        return
    if is_chat:
        raise UsageError(
            f"{source.name} has no chat template, so it cannot be talked to",
            "put one into its directory as chat_template.jinja; obsfs serve completes text without one",
        )
    tell(
        f"{source.name} has no chat template: /v1/completions works, and /v1/chat/completions does not "
        "(put one into its directory as chat_template.jinja)",
        err=True,
    )


def has_chat_template(model: Path) -> bool:
    """Return whether a model or an adapter has a chat template."""
    if any(
        (model / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    ):
        return True
    try:
        found = json.loads((model / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and bool(found.get("chat_template"))


def _free_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0. Raises UsageError if it cannot be listened on."""
    try:
        with socket.create_server((host, port)) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        # Python adds the address to the system's message; an unknown host name has a negative error number.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or first_line(error)
        raise UsageError(f"cannot listen on {host}:{port} ({reason})", "choose another --host or --port") from None


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UsageError(
                "the server did not start", f"it ended with status {process.returncode}; obsfs serve shows why"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise UsageError(f"the server did not answer within {_START_SECONDS:.0f} s", "obsfs serve shows why")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def chat(server: Server, extra: Sequence[str]) -> int:
    """Chat with a server in the terminal by ``transformers chat``. Returns its exit status.

    It runs, and saves chats, in ``chat`` below the state directory.
    """
    home = state_dir() / "chat"
    home.mkdir(mode=0o700, exist_ok=True)
    command = [*python_command("-m", "trainer.backend"), "chat", server.model, server.url, *extra]
    # With HF_HUB_OFFLINE its client refuses to talk to any server, even one on this machine.
    environment = {name: value for name, value in child_environment().items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(command, cwd=home, env=environment, check=False).returncode
