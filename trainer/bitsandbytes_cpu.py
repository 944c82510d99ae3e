"""How bitsandbytes differs on processors with AVX512-BF16 (Sapphire Rapids, Zen 4 and later).

There, the first forward pass in eval mode repacks each 4-bit weight in place for a kernel without a gradient
(bitsandbytes 0.50, ``nn/modules.py:Linear4bit.forward``). A repacked weight cannot be trained through again, and
merging or dequantising it silently gives garbage. Repacking fails if the number of rows is not a multiple of 32.

So this package never lets a model that it trains or merges be repacked. In a model that it writes for serving, it
leaves the weights that cannot be repacked unquantised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from obsfs.plugin import UsageError

_ROWS = 32
"""Rows that are packed together: ``block_n`` in bitsandbytes' ``_convert_weight_packed_for_cpu``."""
_BLOCK = 64
"""Columns that share a scale: bitsandbytes' default block size, which transformers keeps."""
_FLAG = "avx512_bf16"


def keep_as_loaded(model: Any) -> Any:
    """Stop bitsandbytes from repacking the weights of a model that was just loaded. Returns the model."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def can_be_repacked(rows: int, columns: int, block: int = _BLOCK) -> bool:
    """Return whether every processor can serve a 4-bit weight of this shape."""
    return rows % _ROWS == 0 and columns % block == 0


def never_quantised(model: Any) -> list[str]:
    """Return the names of the modules to leave unquantised in a 4-bit model for serving.

    Args:
        model: The model; it needs no weights (meta device).
    """
    from torch import nn

    kept = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not can_be_repacked(module.out_features, module.in_features)
    ]
    head = model.get_output_embeddings()
    return [*kept, *(name for name, module in model.named_modules() if module is head and name not in kept)]


def refuse_unservable(model: Path) -> None:
    """Raise UsageError if this machine cannot serve the 4-bit weights of a model, before the server finds out."""
    if _has_gpu() or not _has_avx512_bf16():
        return
    for name, (rows, columns), block in _quantised(model):
        if not can_be_repacked(rows, columns, block):
            raise UsageError(
                f"{name} of {model} has {rows} x {columns} weights of 4 bits, which bitsandbytes cannot serve on a"
                " processor with AVX512-BF16",
                "serve it on a GPU, or quantise the original by `obsfs merge --quantize bnb-4bit`, which leaves such"
                " weights as they are",
            )


def _quantised(model: Path) -> list[tuple[str, tuple[int, int], int]]:
    """Return each 4-bit weight of a model with its shape and block size, as bitsandbytes recorded them."""
    from safetensors import safe_open

    try:
        config = json.loads((model / "config.json").read_bytes())
        if not config.get("quantization_config", {}).get("load_in_4bit"):
            return []
        found = []
        for shard in sorted(model.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    name, mark, _ = key.partition(".weight.quant_state.")
                    if mark:
                        state = json.loads(bytes(tensors.get_tensor(key).tolist()))
                        rows, columns = state["shape"]
                        found.append((name, (rows, columns), int(state["blocksize"])))
        return found
    except (OSError, ValueError, KeyError, AttributeError):
        return []  # the server will report what is wrong with it


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _has_avx512_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(_FLAG in line.split() for line in lines if line.startswith("flags"))
