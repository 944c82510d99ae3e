"""Train a QLoRA adapter on a model in a bucket, and publish it there.

python train.py obs://models/Qwen2-7B obs://models/data/chat.jsonl obs://models/adapters/run-1
"""

from __future__ import annotations

import sys

import trainer


def main(model: str, data: str, output: str) -> None:
    """Train for a few steps, and print where the adapter is."""
    result = trainer.train(
        {
            "model": model,
            "data": data,
            "output": output,
            "method": "qlora",
            "learning_rate": 2e-4,
            "lora_r": 16,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "report_to": "none",
        }
    )
    print(result.output)


if __name__ == "__main__":
    main(*sys.argv[1:])
