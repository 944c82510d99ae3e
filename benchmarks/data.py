"""``python -m benchmarks.data DIRECTORY``: makes what is measured, as named below.

In a process of its own, so that the memory of torch is given back before anything is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

MODEL = "qwen2"
"""A Qwen2 of 0.5 billion parameters: 988 MB of bfloat16 in four shards, with a tokenizer."""
WEIGHTS = "weights.safetensors"
"""2 GiB in tensors of 8 MiB."""
LARGE = "large.safetensors"
"""4 GB in tensors of 8 MiB."""
SMALL = "small"
"""20,000 files of 100 bytes in one directory."""

TENSOR = 8 << 20
TENSORS = {WEIGHTS: 256, LARGE: 477}
SMALL_FILES = 20_000


def tensor_name(number: int) -> str:
    """The name of tensor `number` (from 0) in either file."""
    return f"model.layers.{number}.weight"


def main() -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from obsfs.demo.model import train_tokenizer

    home = Path(sys.argv[1])
    # The shape of Qwen2-0.5B: https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/config.json
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(home / MODEL, max_shard_size="260MB")
    train_tokenizer(2048).save_pretrained(home / MODEL)
    noise = torch.randint(-128, 127, (TENSOR,), dtype=torch.int8)
    for name, count in TENSORS.items():
        tensors = {tensor_name(n): noise.roll(n).view(torch.bfloat16).reshape(2048, 2048) for n in range(count)}
        save_file(tensors, home / name)
    (home / SMALL).mkdir()
    for number in range(SMALL_FILES):
        (home / SMALL / f"sample-{number:05}.json").write_bytes(b"%-99d\n" % number)


if __name__ == "__main__":
    main()
