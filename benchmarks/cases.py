"""The named shapes that are measured, and where they come from."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call: (B, Hq, L, E) queries against (B, H, S, E) keys and values."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    query_len: int
    key_len: int
    head_dim: int
    causal: bool = False
    passes: tuple[str, ...] = ("forward", "forward+backward")

    def inputs(self, seed: int = 0) -> list[np.ndarray]:
        """Normal random (query, key, value, cotangent), float32, (B, H, L, E)."""
        rng = np.random.default_rng(seed)
        q = (self.batch, self.q_heads, self.query_len, self.head_dim)
        kv = (self.batch, self.kv_heads, self.key_len, self.head_dim)
        return [rng.standard_normal(shape, dtype=np.float32) for shape in (q, kv, kv, q)]


def _square(shape: tuple[int, int, int, int], causal: bool) -> Case:
    B, H, L, E = shape
    return Case(f"{B}x{H}x{L}x{E} {'causal' if causal else 'full'}", B, H, H, L, L, E, causal)


CPU_SHAPES = ((1, 8, 1024, 64), (1, 8, 4096, 64), (4, 8, 512, 128), (32, 8, 128, 64))
CPU_CASES = (
    *(_square(shape, causal) for shape in CPU_SHAPES for causal in (False, True)),
    Case("decode 8 x 32/8 heads, 1 x 4096, 128", 8, 32, 8, 1, 4096, 128, passes=("forward",)),
)
"""A training layer, a long one, a wide head, many short sequences (torch's docstring example), and Llama-3-like decode."""
CPU_DTYPES = ("float32", "bfloat16")
