"""A small real model, made on the spot: Qwen2's architecture with random weights, and a tokenizer trained here.

torch and transformers are imported where they are used: they take seconds. ``python -m obsfs.demo.model DIRECTORY
PROMPT`` loads a model, lets it go on with the prompt, and prints ``{"seconds": ..., "text": ...}``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from obsfs.errors import UsageError
from obsfs.extras import remedy

_PAGE = 4096
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen2 writes it, without tools."""


def require() -> None:
    """Raise UsageError when torch or transformers are missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the Python package {error.name} is missing", remedy("demo")) from None


def make_model(
    directory: Path, *, hidden_size: int = 512, layers: int = 8, vocabulary: int = 2048, max_shard_size: str = "16MB"
) -> int:
    """Write a tiny Qwen2 with its tokenizer, in shards of safetensors. Returns its number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = train_tokenizer(vocabulary)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def train_tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of `vocabulary` tokens, trained on text that every Python has."""
    from pydoc_data import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.topics.values(), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


class Loaded(NamedTuple):
    """A model in memory: `seconds` from the call of from_pretrained until every page of every weight was read."""

    model: Any
    tokenizer: Any
    seconds: float
    size: int


def load_model(directory: Path) -> Loaded:
    """``from_pretrained``, and then one read of every page of every weight: transformers returns before it has read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    size = touch_tensors(model.state_dict().values())
    return Loaded(model, tokenizer, time.perf_counter() - started, size)


def touch_tensors(tensors: Iterable[Any]) -> int:
    """Read one byte of every page of every tensor; the number of bytes of them all."""
    import torch

    size = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        flat[::_PAGE].sum()
        size += flat.numel()
    return size


def generate(loaded: Loaded, prompt: str, tokens: int) -> str:
    """A continuation of `prompt` by a few tokens (greedy)."""
    inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(loaded.tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> int:
    """Load and generate in a process of its own, which can be ended in mid-load."""
    import transformers
    import transformers.models.qwen2.modeling_qwen2
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    loaded = load_model(Path(sys.argv[1]))
    print(json.dumps({"seconds": loaded.seconds, "text": generate(loaded, sys.argv[2], 12)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
