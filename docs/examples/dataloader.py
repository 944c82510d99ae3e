"""Feed a PyTorch DataLoader from files on a mount: tensors of a safetensors file, and rows of a Parquet file.

python dataloader.py obs://models/data
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

import obsfs


class Tensors(Dataset[torch.Tensor]):
    """The tensors of one safetensors file. Each one costs its own blocks, not the whole file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self.names = sorted(file.keys())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:  # opened in the worker: no map crosses a fork
            return file.get_tensor(self.names[index])


def main(url: str) -> None:
    """Print what two workers have read from the mount."""
    with obsfs.mount(url) as mount:
        loader = DataLoader(Tensors(mount.path / "samples.safetensors"), batch_size=4, num_workers=2)
        print("tensors", sum(len(batch) for batch in loader))
        rows = pyarrow.parquet.read_table(mount.path / "train.parquet", memory_map=True).to_pylist()
        batches = DataLoader(rows, batch_size=8, collate_fn=list)
        print("rows", sum(len(batch) for batch in batches))
        print("fetched", mount.status()["bytes_fetched"], "bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
