"""Read and write a bucket through fsspec, without a mount, over the same cache.

python with_fsspec.py obs://models
"""

from __future__ import annotations

import json
import sys

import fsspec
import pandas


def main(url: str) -> None:
    """List, read, read a part, write, and read a table."""
    files, root = fsspec.url_to_fs(url)
    configs = sorted(files.glob(f"{root}/*/config.json"))
    print("models", len(configs))
    print("architecture", json.loads(files.cat(configs[0]))["architectures"][0])
    weights = files.glob(f"{configs[0].removesuffix('config.json')}*.safetensors")
    header_size = int.from_bytes(files.cat_file(weights[0], start=0, end=8), "little")
    print("header", header_size, "bytes")
    with files.open(f"{root}/notes/hello.txt", "w") as file:
        file.write("written by fsspec\n")
    print(files.cat(f"{root}/notes/hello.txt").decode().strip())
    print("rows", len(pandas.read_parquet(f"{url}/data/train.parquet")))


if __name__ == "__main__":
    main(*sys.argv[1:])
