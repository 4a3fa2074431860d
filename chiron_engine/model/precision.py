"""What a model computes in, and what it stores its weights and its KV in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """name: as `--dtype` has it. compute: of activations, norms and the embedding. kv: of the pool.
    int8_weights: whether the matrices of linear layers are kept in 8 bits."""

    name: str
    compute: torch.dtype
    kv: torch.dtype
    int8_weights: bool = False

    def describe(self) -> str:
        """As `--dtype` has it, and what the pool holds where that is another choice."""
        if self.kv == PRECISIONS[self.name].kv:
            return self.name
        return f"{self.name}, KV {str(self.kv).removeprefix('torch.')}"


FLOAT32 = Precision("float32", torch.float32, torch.float32)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, torch.bfloat16)
FLOAT16 = Precision("float16", torch.float16, torch.float16)
INT8 = Precision("int8", torch.float32, torch.bfloat16, int8_weights=True)

PRECISIONS = {precision.name: precision for precision in (FLOAT32, BFLOAT16, FLOAT16, INT8)}
