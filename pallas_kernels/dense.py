"""Dense masks and biases: how XLA lays them out for a kernel, and what a kernel makes of a tile of them.

A dim of size 1 stays 1. By the dims that are left, an operand is one of four kinds, and only one is as large as the scores:

    kind      mask, packed 32 keys to a word    bias
    tile      (B|1, Hq|1, words of S, L)        (B|1, Hq|1, L, S), its own dtype, brought by TMA
    row       (B|1, Hq|1, 1, L), all ones or 0  (B|1, Hq|1, L) float32
    column    (B|1, Hq|1, words of S, 1)        (B|1, Hq|1, S) float32
    scalar    (B|1, Hq|1, 1, 1)                 (B|1, Hq|1, 1) float32
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.visits import cdiv

WORD = 32  # keys to a word


def kind(array: Any) -> str:
    """Of a dense operand (B|1, Hq|1, L|1, S|1) by its last two sizes. A single query or key counts as broadcast."""
    return {(False, False): "tile", (False, True): "row", (True, False): "column", (True, True): "scalar"}[
        array.shape[2] == 1, array.shape[3] == 1
    ]


def tile_bytes(bias: Any) -> int:
    """Of an element of a bias as large as the scores; 0 of any other, and without one."""
    return bias.dtype.itemsize if bias is not None and kind(bias) == "tile" else 0


SWIZZLE = 32  # bytes: the narrowest that a tile can have in shared memory, and so what a bias's rows must be a multiple of


def padded(bias: jax.Array) -> jax.Array:
    """A bias as large as the scores as TMA wants it: rows in eights, each a multiple of SWIZZLE, or, made anew, of the widest."""
    rows, columns = bias.shape[2:]
    more = -rows % 8, 0 if columns * bias.dtype.itemsize % SWIZZLE == 0 else -columns % 64
    return jnp.pad(bias, ((0, 0), (0, 0), (0, more[0]), (0, more[1]))) if any(more) else bias


def bits(keep: jax.Array) -> jax.Array:
    """(..., n) bool as uint32 words (..., n / 32): the first one in the lowest bit."""
    # bytes first: XLA reduces 8 of them in 38 us where 32 words of 4 bytes take 62 (67 million bools, H200, 2026-11-25)
    each = keep.reshape(*keep.shape[:-1], -1, 8).astype(jnp.uint8) << jnp.arange(8, dtype=jnp.uint8)
    octets = each.sum(-1, dtype=jnp.uint8)
    return lax.bitcast_convert_type(octets.reshape(*octets.shape[:-1], -1, WORD // 8), jnp.uint32)


def pack(keep: jax.Array, rows: int, block_k: int) -> jax.Array:
    """A bool mask as int32 words, lengths filled up to whole tiles with what is masked; see the table above."""
    _, _, L, S = keep.shape
    if L != 1:
        keep = jnp.pad(keep, ((0, 0), (0, 0), (0, cdiv(L, rows) * rows - L), (0, 0)))
    if S == 1:
        words = jnp.where(jnp.swapaxes(keep, 2, 3), jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    else:
        keep = jnp.pad(keep, ((0, 0), (0, 0), (0, 0), (0, cdiv(S, block_k) * block_k - S)))
        words = jnp.swapaxes(bits(keep), 2, 3)
    return lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: list[Any], column: Any) -> Any:
    """The bool tile of int32 words, each a tile itself (its rows' word in every column); column: 0, 1, … along the tile's rows.

    A Hopper accumulator's thread holds columns 8j + 2t and 8j + 2t + 1: the compiler knows all bits of the index but 1 and 2. So
    a word is shifted by those two, once a thread, and what is left is one test of a known bit for each element.
    """
    chosen: Any = None
    for n, word in enumerate(words):
        shifted = lax.shift_right_logical(word, column & 6)
        chosen = shifted if n == 0 else jnp.where(column >= n * WORD, shifted, chosen)
    return (chosen & lax.shift_left(jnp.ones_like(column), column & 25)) != 0


def lay_out(bias: jax.Array, rows: int, block_k: int) -> jax.Array:
    """A bias as the kernel reads it; see the table above. Only a broadcast one is made anew, and it is small."""
    what = kind(bias)
    if what == "tile":
        return bias
    B, H, L, S = bias.shape
    flat = bias.astype(jnp.float32).reshape(B, H, L * S)
    block = {"row": rows, "column": block_k, "scalar": 1}[what]
    return jnp.pad(flat, ((0, 0), (0, 0), (0, cdiv(L * S, block) * block - L * S)))
