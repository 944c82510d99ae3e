"""The verbs that this package adds to ``obsfs`` through the entry point group ``obsfs.commands``."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from obsfs.plugin import (
    BUCKET_SETTINGS,
    CACHE_SETTINGS,
    Command,
    UsageError,
    count,
    facts,
    first_line,
    human,
    remedy,
    settings_options,
    spinner,
    tell,
    tell_json,
    tell_path,
    terminal_width,
)

if TYPE_CHECKING:
    from trainer.config import TrainConfig

_PLACES = (*BUCKET_SETTINGS, "library", *CACHE_SETTINGS)
_PASSED = {"ignore_unknown_options": True, "allow_extra_args": True}


class _Verb(Command):
    """A verb that needs the extra ``train``, and says how to install it if it is missing."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if find_spec("trl") is None:
                raise ModuleNotFoundError(name="trl")
            return super().invoke(ctx)
        except ImportError as error:
            if str(error.name).partition(".")[0] in ("obsfs", "trainer"):
                raise
            missing = error.name or first_line(error)
            raise UsageError(f"obsfs {self.name} needs {missing}", remedy("train")) from None


_TRAIN = """\b
Examples:
  obsfs train --guide
  obsfs train run.yaml
  obsfs train run.yaml --learning_rate 1e-4 --lora_r 32 --resume
  obsfs train --model obs://models/Qwen2-7B --data alpaca-zh --output ./zh-1
  accelerate launch --num_processes 8 -m trainer run.yaml

\b
A run.yaml:
  model: /mnt/models/Qwen2-7B        # or obs://models/Qwen2-7B
  data: obs://models/data/chat.jsonl
  output: obs://models/adapters/run-1
  method: qlora                      # lora, qlora, dora, full
  task: sft                          # dpo, kto, orpo, cpo, simpo
  learning_rate: 2e-4                # any field of TRL's SFTConfig,
  lora_r: 16                         # of PEFT's LoraConfig,
  bnb_4bit_quant_type: nf4           # or of BitsAndBytesConfig
"""


@click.command(
    cls=_Verb, short_help="Train an adapter, or a whole model, and publish it", context_settings=_PASSED, epilog=_TRAIN
)
@click.argument("words", nargs=-1, metavar="[CONFIG.yaml] [--KEY VALUE]...", type=click.UNPROCESSED)
@click.option("--guide", "is_guided", is_flag=True, help="Ask a few questions and write the YAML file.")
@click.option("--check", "only_check", is_flag=True, help="Check model, data, output and memory. Do not train.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: one object per log entry, and the result at the end."
)
def train(words: tuple[str, ...], *, is_guided: bool, only_check: bool, as_json: bool) -> None:
    """Train an adapter or a whole model from a mount or a bucket, and publish it.

    Give any key of the YAML file as --KEY VALUE, too. --resume continues an interrupted run from its newest complete
    checkpoint, on disk or in the bucket.
    """
    import psutil

    from trainer.config import load_config, parse_overrides, read_yaml, refuse_unknown

    started = psutil.Process().create_time()
    path = Path(words[0]) if words and not words[0].startswith("--") else None
    if path and len(words) > 1 and not words[1].startswith("-"):
        raise UsageError(f"{words[1]} follows the configuration {path}", "give one configuration, then --KEY VALUE")
    overrides = parse_overrides(words[1:] if path else words)
    refuse_unknown(overrides, ("check", "guide", "json", "help"))
    if path is None and (
        later := [word for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    ):
        raise UsageError(f"{later[0]} comes too late", f"write obsfs train {later[0]} --KEY VALUE")
    if is_guided:
        from trainer.guide import guide

        if path is not None:
            raise UsageError(f"--guide writes a configuration, and {path} is one", "leave one of them out")
        asked = load_config({"model": "asked", "data": "asked", "output": "asked"}, overrides)  # refuses wrong keys
        path, is_wanted = guide(
            {name: value for name, value in vars(asked).items() if name in overrides} | asked.options
        )
        if not is_wanted:
            tell(f"obsfs train {path}")
            return
    elif path is None and not overrides:
        raise UsageError("there is nothing to train", "give CONFIG.yaml, or --guide (see --help)")
    config = load_config(read_yaml(path) if path else {}, {} if is_guided else overrides)
    from trainer.run import train as run

    outcome = run(config, as_json=as_json, only_check=only_check, started=started)
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if as_json:
        tell_json(dataclasses.asdict(outcome), indent=None)
        return
    if only_check:
        tell(*facts(_checked(config, outcome.metrics), terminal_width()))
        is_well = len(outcome.notes) < 2
        said = "all is well" if is_well else "it can start, but see above what was found in the data"
        tell(f"{said}: nothing was trained")
        return
    if (total := outcome.seconds.get("to first step")) is not None:
        parts = [f"{name} {s:.1f} s" for name, s in outcome.seconds.items() if name not in ("to first step", "publish")]
        tell(f"first step after {total:.1f} s: {', '.join(parts)} (partly at the same time)", err=True)
    if outcome.reason:
        tell(f"nothing was trained: {outcome.reason}", err=True)
        tell_path(outcome.output)
        return
    loss = outcome.metrics.get("train_loss")
    shown = f", loss {loss:.4f} on average" if loss else ""
    tell(f"{outcome.steps} steps{shown}", err=True)
    tell_path(outcome.output)


def _checked(config: TrainConfig, found: dict[str, float]) -> list[tuple[str, str]]:
    """Return the rows that --check prints about a run that can start."""
    records = f", {int(found['records']):,} records" if "records" in found else ", streamed"
    return [
        ("model", f"{config.model}, {count(int(found['parameters']))} parameters, {human(int(found['bytes']))}"),
        ("method", f"{config.method}, {count(int(found['trainable']))} parameters to train"),
        ("data", f"{', '.join(config.data)}{records}"),
        ("memory", f"about {human(int(found['memory']))} of the {human(int(found['memory_free']))} that are free"),
        ("output", f"{config.output}, can be written"),
    ]


@click.command(
    cls=_Verb,
    short_help="Merge an adapter into its base model",
    epilog="""\b
Examples:
  obsfs merge obs://models/adapters/run-1 obs://models/Qwen2-7B-tuned@v1
  obsfs merge ./run-1 ./merged --base /mnt/models/Qwen2-7B --quantize bnb-4bit
  obsfs merge ./run-1 ./merged --quantize awq --calibrate chats.jsonl
""",
)
@click.argument("adapter")
@click.argument("output", metavar="OUT")
@click.option("--base", metavar="MODEL", help="The base model. Default: the one that the adapter names.")
@click.option(
    "--quantize",
    metavar="FORMAT",
    help="Quantize the result: bnb-4bit, bnb-8bit, fp8 (GPU), gptq (gptqmodel, optimum) or awq (llmcompressor, GPU).",
)
@click.option(
    "--calibrate", metavar="DATA", help="Calibration data for gptq (default: C4) and awq, as in train's --data."
)
@click.option(
    "--dequantize", is_flag=True, help="Merge into the dequantized 4-bit base, the weights that QLoRA trained against."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options(*_PLACES)
def merge(
    adapter: str,
    output: str,
    *,
    base: str | None,
    quantize: str | None,
    calibrate: str | None,
    dequantize: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Merge ADAPTER into its base model and write the result to OUT.

    The result is sharded bfloat16 safetensors that transformers, vLLM and others load. ADAPTER, OUT and the base are
    directories, obs:// URLs, or names in the library. By default the base is the published one, also for a QLoRA
    adapter.
    """
    from trainer import merge as merging

    with spinner(f"merging {adapter}", quiet=as_json):
        done = merging.merge(
            adapter,
            output,
            base=base,
            quantize=quantize,
            calibrate=calibrate,
            dequantize=dequantize,
            settings=_settings(given),
        )
    if as_json:
        tell_json(done._asdict(), indent=None)
    else:
        tell(
            f"{done.base} + {adapter}: logits differ by {done.mean:.2g} on average, {done.largest:.2g} at most",
            err=True,
        )
        if done.kept:
            ends = sorted({name.rpartition(".")[2] for name in done.kept})
            some = f"{', '.join(ends)} ({len(done.kept)} in all)"
            tell(f"left as they are, since not every processor could serve them quantised: {some}", err=True)
        tell_path(done.output)


_BACKEND = click.option(
    "--backend", type=click.Choice(["transformers", "vllm", "sglang"]), help="Default: the fastest one installed."
)
_ADAPTER = click.option(
    "--adapter", metavar="A", help="An adapter for MODEL: a directory, a URL, or a name in the library."
)


@click.command(
    cls=_Verb,
    short_help="Serve a model over HTTP, with OpenAI's API",
    context_settings=_PASSED,
    epilog="""\b
Examples:
  obsfs serve obs://models/Qwen2-7B --port 8000
  obsfs serve /mnt/models/Qwen2-7B --adapter obs://models/adapters/run-1
  obsfs serve obs://models/Qwen2-7B --backend vllm -- --max-model-len 8192
  curl localhost:8000/v1/models
""",
)
@click.argument("model")
@_ADAPTER
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes any free port.",
)
@_BACKEND
@settings_options(*_PLACES)
def serve(model: str, *, adapter: str | None, host: str, port: int, backend: str | None, **given: Any) -> None:
    """Serve MODEL over HTTP, with OpenAI's API, until Ctrl-C. Arguments after `--` go to the backend."""
    from trainer import serve as serving

    with serving.serve(
        model,
        adapter,
        backend=backend,
        host=host,
        port=port,
        extra=click.get_current_context().args,
        settings=_settings(given),
    ) as server:
        tell(f"{server.url}/v1  model {server.model}", err=True)
        sys.stderr.flush()
        if server.process.wait():
            raise UsageError("the server ended", f"status {server.process.returncode}; see what it said above")


@click.command(
    cls=_Verb,
    short_help="Chat with a model in the terminal",
    context_settings=_PASSED,
    epilog="""\b
Examples:
  obsfs chat obs://models/Qwen2-7B
  obsfs chat obs://models/Qwen2-7B --adapter obs://models/adapters/run-1
  obsfs chat obs://models/Qwen2-7B -- max_new_tokens=200 temperature=0.7
""",
)
@click.argument("model")
@_ADAPTER
@_BACKEND
@settings_options(*_PLACES)
def chat(model: str, *, adapter: str | None, backend: str | None, **given: Any) -> None:
    """Chat with MODEL in the terminal. Arguments after `--` go to `transformers chat`."""
    from trainer import serve as serving

    with ExitStack() as stack:
        with spinner(f"loading {model}"):
            server = stack.enter_context(
                serving.serve(model, adapter, backend=backend, quiet=True, settings=_settings(given))
            )
        click.get_current_context().exit(serving.chat(server, click.get_current_context().args))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
