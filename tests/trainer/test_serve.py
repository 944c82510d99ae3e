"""A model behind an OpenAI-compatible server, asked by the real client; and in the terminal."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from obsfs import ObsfsError
from tests.conftest import Result, Store, stop_group
from trainer.serve import choose_backend, command_of, has_chat_template, serve

_QUESTION: Any = [{"role": "user", "content": "name 3"}]


@pytest.mark.slow
def test_an_adapter_answers_the_openai_client(run: Callable[..., Any], rows: Path, bucket: Store) -> None:
    adapter = run(data=str(rows), method="lora", max_steps=60, learning_rate=1e-2, output=f"{bucket}/adapters/a").output
    command = [sys.executable, "-m", "obsfs", "serve", f"{bucket}/models/tiny", "--adapter", adapter, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--backend", "transformers"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "/v1  model " in line)
        url, _, model = line.strip().partition("  model ")
        assert model == "a"
        client = openai.OpenAI(base_url=url, api_key="none")
        options: Any = {"model": model, "messages": _QUESTION, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**options).choices[0].message.content
        pieces = [
            event.choices[0].delta.content or ""
            for event in client.chat.completions.create(**options, stream=True)
            if event.choices
        ]
        assert whole
        assert len(pieces) > 2
        assert "".join(pieces).strip() == whole.strip()
        assert "module" in whole  # it has learned something
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        rest = process.stderr.read()
        assert "Traceback" not in rest
        assert rest.splitlines()[-1] == "obsfs: interrupted"
    finally:
        stop_group(process)
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if f"{bucket}" in line]


@pytest.mark.slow
def test_chat_in_the_terminal(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as many machines have it
    done = subprocess.run(
        [sys.executable, "-m", "obsfs", "chat", model, "--backend", "transformers", "--", "max_new_tokens=4"],
        input="hello\nn\n", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "tokens in" in done.stdout, (done.stdout, done.stderr)
    # The input has come to its end, as by Ctrl-D: no word on it.
    assert (done.returncode, done.stderr) == (0, "")
    assert "Aborted" not in done.stdout


def test_backends(tmp_path: Path) -> None:
    assert choose_backend(None) == "transformers"
    for missing in ("vllm", "sglang"):
        with pytest.raises(ObsfsError, match=f"pip install '{missing}'"):
            choose_backend(missing)
    where = ["--port", "1"]
    vllm = command_of("vllm", tmp_path, Path("/a"), where, ["--max-model-len", "9"])
    lora = ["--enable-lora", "--lora-modules", "a=/a"]
    named = ["--served-model-name", tmp_path.name]
    assert vllm == ["vllm", "serve", str(tmp_path), *where, *named, *lora, "--max-model-len", "9"]
    sglang = command_of("sglang", tmp_path, Path("/a"), where, [])
    assert "--lora-paths" in sglang
    assert " ".join(named) in " ".join(sglang)


def test_a_model_without_a_chat_template_is_told_at_the_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny, plain)
    assert has_chat_template(plain)
    (plain / "chat_template.jinja").unlink()
    assert not has_chat_template(plain)
    monkeypatch.setattr("trainer.serve.command_of", lambda *_: ["false"])  # the words come before the server
    with pytest.raises(ObsfsError, match="did not start"), serve(str(plain), None, backend="transformers"):
        pass
    assert "plain has no chat template: /v1/completions works" in capsys.readouterr().err
    with (
        pytest.raises(ObsfsError, match="has no chat template, so it cannot be talked to"),
        serve(str(plain), None, backend="transformers", quiet=True),
    ):
        pass
    config = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    assert has_chat_template(plain)


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ObsfsError, match="did not start"), serve(str(tmp_path), None, backend="transformers"):
        pass


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (("--port", "99999"), "Invalid value for '--port'"),
        (("--port", "-1"), "Invalid value for '--port'"),
        (("--host", "nope.invalid"), "cannot listen on nope.invalid:8000"),
        (("--host", "203.0.113.1", "--port", "0"), "cannot listen on 203.0.113.1:0"),
        (("--port", "{taken}"), "cannot listen on 127.0.0.1:{taken} (Address already in use)"),
    ],
)
def test_where_nothing_can_listen_is_told_before_the_model_is_looked_at(
    where: tuple[str, ...], said: str, obsfs_command: Callable[..., Result]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        words = [word.replace("{taken}", taken) for word in where]
        done = obsfs_command("serve", "/nowhere", *words)
    assert done.code == 2
    assert done.err.startswith(f"obsfs: {said.replace('{taken}', taken)}")
