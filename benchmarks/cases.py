"""The named shapes that are measured, and where they come from."""

from __future__ import annotations

import dataclasses

import numpy as np

PACKED = np.linspace(100, 8000, 64).astype(int)
"""Lengths of the sequences of the packed case; they stand in a row, with 31 tokens of padding behind them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call: (B, Hq, L, E) queries against (B, H, S, E) keys and values.

    dtype: of a GPU case; those of the CPU are run in several. extra: what else a GPU case takes, in words (`gpu.operands`).
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    query_len: int
    key_len: int
    head_dim: int
    causal: bool = False
    passes: tuple[str, ...] = ("forward", "forward+backward")
    dtype: str = "bfloat16"
    extra: str = ""

    @property
    def flops(self) -> float:
        """Of the forward's two products, over what the mask leaves."""
        full = 4.0 * self.batch * self.q_heads * self.query_len * self.key_len * self.head_dim
        if self.extra == "window":
            return full * (self.query_len * 1024 - 1024 * 1023 / 2) / (self.query_len * self.key_len)
        if self.extra in ("lengths", "bool padding (B,1,1,S)"):
            return full * 7 / 8
        if self.extra == "segments":
            return full / 8
        if self.extra == "packed":
            full = 4.0 * self.q_heads * self.head_dim * float((PACKED.astype(float) ** 2).sum())
        return full / 2 if self.causal or self.extra.startswith("bool causal") else full

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


def _gpu(name: str, shape: tuple[int, int, int, int], causal: bool = False, kv_heads: int = 0, **more: str) -> Case:
    B, H, L, E = shape
    return Case(name, B, H, kv_heads or H, L, L, E, causal, ("forward",), **more)  # type: ignore[arg-type]


GPU_CASES = (
    *(_gpu(f"B{B} H{H} L{L} D{D} {'causal' if causal else 'full'}", (B, H, L, D), causal)
      for D, H in ((128, 16), (64, 32), (256, 8)) for B, L in ((1, 16384), (8, 2048), (32, 512)) for causal in (False, True)),
    *(_gpu(f"B4 H8 L4096 D192 {'causal' if causal else 'full'}", (4, 8, 4096, 192), causal) for causal in (False, True)),
    _gpu("Qwen2-7B 28/4 L4096 D128 causal", (1, 28, 4096, 128), True, 4),
    _gpu("Qwen2-7B 28/4 L32768 D128 causal", (1, 28, 32768, 128), True, 4),
    _gpu("Llama-3-8B 32/8 L8192 D128 causal", (1, 32, 8192, 128), True, 8),
    _gpu("seed 1: B32 H8 L128 D64 f16", (32, 8, 128, 64), dtype="float16"),
    _gpu("seed 2: B32 H32/8 L128 D64 f16", (32, 32, 128, 64), False, 8, dtype="float16"),
    _gpu("B64 H16 L64 D64 full", (64, 16, 64, 64)),
    *(_gpu(f"B1 H8 L1024 D{D} {'causal' if causal else 'full'}", (1, 8, 1024, D), causal)
      for D in (128, 64) for causal in (False, True)),
    *(_gpu(f"B4 H{H} L4096 D{D} {extra}", (4, H, 4096, D), extra=extra) for D, H in ((128, 16), (64, 32), (256, 8))
      for extra in ("", "bool (B,1,L,S)", "bool (B,1,1,S)", "bool padding (B,1,1,S)", "bool causal (1,1,L,S)", "lengths",
                    "bias16 (B,H,L,S)", "bias32 (1,H,L,S)", "bias16 (B,1,1,S)", "dropout")),
    *(_gpu(f"B4 H{H} L4096 D{D} causal {extra}", (4, H, 4096, D), True, extra=extra) for D, H in ((128, 16), (64, 32), (256, 8))
      for extra in ("", "dropout")),
    _gpu("BERT: B32 H12 L512 D64 bias16 (B,1,1,S)", (32, 12, 512, 64), extra="bias16 (B,1,1,S)"),
    _gpu("B4 H16 L4096 D128 segments", (4, 16, 4096, 128), extra="segments"),
    _gpu("B1 H16 L16384 D128 window 1024", (1, 16, 16384, 128), extra="window"),
    _gpu("64 sequences, 100 to 8000, H16 D128 causal packed", (1, 16, 259200, 128), True, extra="packed"),
)  # fmt: skip
"""Square training shapes at four head dims, heads of three models, torch's two docstring examples, grids that do not fill
the chip, and every kind of mask."""
