"""Load a model from a bucket, and let it continue a text.

python load.py obs://models/Qwen2-7B-Instruct "The import statement"
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import obsfs


def main(url: str, prompt: str) -> None:
    """Mount the model on a temporary directory, load it, and print what it writes."""
    with obsfs.mount(url) as mount:
        tokenizer = AutoTokenizer.from_pretrained(mount.path)
        model = AutoModelForCausalLM.from_pretrained(mount.path, dtype="auto")
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        del model  # its weights are memory maps of the mount, which ends with this block


if __name__ == "__main__":
    main(*sys.argv[1:])
