"""``python -m benchmarks.data MODEL FILE``: a Qwen2 of 0.5 billion parameters in four shards; 250 tensors of 8 MiB.

In a process of its own, so that the memory of torch is given back before anything is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from obsfs.demo.model import train_tokenizer


def main() -> None:
    model, file = Path(sys.argv[1]), sys.argv[2]
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
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(model, max_shard_size="260MB")
    train_tokenizer(2048).save_pretrained(model)
    noise = torch.randint(-128, 127, (8 << 20,), dtype=torch.int8)
    tensors = {f"model.layers.{n}.weight": noise.roll(n).view(torch.bfloat16).reshape(2048, 2048) for n in range(250)}
    save_file(tensors, file)


main()
