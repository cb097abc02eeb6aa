"""Dense masks and biases: how XLA lays them out for a kernel, and what a kernel makes of a tile of them.

A dim of size 1 stays 1. By the dims that are left, an operand is one of four kinds, and only one is as large as the scores:

    kind      mask, packed                         bias
    tile      (B|1, Hq|1, pieces of S, L, 4)       (B|1, Hq|1, L, S), its own dtype, brought by TMA
    row       (B|1, Hq|1, 1, L, 1), all ones or 0  (B|1, Hq|1, L) float32
    column    (B|1, Hq|1, pieces of S, 1, 4)       (B|1, Hq|1, S) float32, by TMA as well
    scalar    (B|1, Hq|1, 1, 1, 1)                 (B|1, Hq|1, 1) float32

A mask is packed as the threads of a Hopper warpgroup want it. Of a row of an accumulator, thread t of four holds the columns
8j + 2t and 8j + 2t + 1. So a row's piece of 128 keys is four words, one for each of them: bit 2j + e of word t is key
8j + 2t + e. A tile whose keys are no multiple of 128 begins in the middle of a piece, or ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import visits

WORD = 32  # keys to a word
PIECE = 4 * WORD
HALF = PIECE // 2  # tiles are multiples of it


def kind(array: Any, *, transposed: bool = False) -> str:
    """Of a dense operand (B|1, Hq|1, L|1, S|1), or of it with queries and keys exchanged, by its last two sizes. A single query or
    key counts as broadcast."""
    rows, columns = array.shape[:1:-1] if transposed else array.shape[2:]
    return {(False, False): "tile", (False, True): "row", (True, False): "column", (True, True): "scalar"}[rows == 1, columns == 1]


def tile_bytes(bias: Any) -> int:
    """Of an element of a bias as large as the scores; 0 of any other, and without one."""
    return bias.dtype.itemsize if bias is not None and kind(bias) == "tile" else 0


def is_keyed(bias: Any) -> bool:
    """Whether there is a bias, and it has a number for each key that all queries share."""
    return bias is not None and kind(bias) == "column"


def readers(bias: Any, batch: int, heads: int) -> tuple[int, bool]:
    """(how many heads read the same rows of a bias as large as the scores, whether they are of several batch entries)."""
    if not tile_bytes(bias):
        return 1, False
    of_heads = heads // bias.shape[1]
    return (of_heads * batch, True) if bias.shape[0] < batch else (of_heads, False)


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


def bit(words: Sequence[Any], at: Any) -> Any:
    """Bool like at (int32, in [0, 64)): bits of two int32 words, the first one's first."""
    low, high = (jnp.full(at.shape, word, jnp.int32) for word in words)
    return lax.shift_right_logical(jnp.where(at < WORD, low, high), at & (WORD - 1)) & 1 == 1


def pack(keep: jax.Array, rows: int, block_k: int) -> jax.Array:
    """A bool mask as int32 words, lengths filled up to whole tiles and pieces with what is masked; see the table above."""
    _, _, L, S = keep.shape
    if L != 1:
        keep = jnp.pad(keep, ((0, 0), (0, 0), (0, visits.cdiv(L, rows) * rows - L), (0, 0)))
    if S == 1:
        return jnp.where(keep[:, :, None], jnp.int32(-1), jnp.int32(0))
    keep = jnp.pad(keep, ((0, 0), (0, 0), (0, 0), (0, visits.cdiv(visits.cdiv(S, block_k) * block_k, PIECE) * PIECE - S)))
    if L == 1:  # few: one reduction of XLA's; for many this takes three times as long
        apart = keep.reshape(*keep.shape[:2], -1, 1, PIECE // 8, 4, 2)  # of a piece: j, t, e
        places = np.uint32(1) << np.arange(WORD, dtype=np.uint32).reshape(1, 1, 1, 1, -1, 1, 2)
        words = jnp.where(apart, places, jnp.uint32(0)).sum((-3, -1), dtype=jnp.uint32)
        return lax.bitcast_convert_type(words, jnp.int32)
    words = bits(keep)  # of 32 keys: byte j, in it pair t; now byte t, in it pair j: a 4 x 4 matrix of pairs, turned
    for apart, mask in ((6, 0x00CC00CC), (12, 0x0000F0F0)):  # pairs (j, t + 1) and (j + 1, t); (j, t + 2) and (j + 2, t)
        other = (words ^ (words >> apart)) & jnp.uint32(mask)
        words = words ^ other ^ (other << apart)
    octets = lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:3], -1, PIECE // WORD, WORD // 8)
    return lax.bitcast_convert_type(jnp.transpose(octets, (0, 1, 3, 2, 5, 4)), jnp.int32)


def summary(words: jax.Array, L: int, row_tiles: int, key_tiles: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """(some, every): whether a tile keeps some of its scores, and all those of rows below L; (B|1, Hq|1, row tiles|1, key tiles|1).

    Nobody looks at what the other rows see.
    """
    length, each = words.shape[3:]
    many = 1 if length == 1 else row_tiles  # a broadcast dim is the same for every tile
    beyond = jnp.where(jnp.arange(length, dtype=jnp.int32) < L, 0, -1)[:, None]
    by_tile = (*words.shape[:3], many, length // many, each)
    both = (
        lax.reduce(words.reshape(by_tile), np.int32(0), lax.bitwise_or, (4, 5)),
        lax.reduce((words | beyond).reshape(by_tile), np.int32(-1), lax.bitwise_and, (4, 5)),
    )
    some, every = (jnp.swapaxes(bits, 2, 3) for bits in both)  # (B|1, Hq|1, row tiles|1, pieces)
    if each == 1:
        return some != 0, every == -1
    of = PIECE
    if block_k % PIECE:
        some, every = (jnp.stack([bits << 16 >> 16, bits >> 16], -1).reshape(*bits.shape[:3], -1) for bits in (some, every))
        of = HALF
    some, every = (bits[..., : key_tiles * block_k // of].reshape(*bits.shape[:3], key_tiles, -1) for bits in (some, every))
    return (some != 0).any(-1), (every == -1).all(-1)


def listed(words: jax.Array, mask: Any, rows: int, L: int, S: int, block_k: int) -> jax.Array:
    """The list of a dense mask, packed (`pack`), and a structured one: its tiles without a kept key are left out, and those that
    are cut come first. Behind the entries stands, in each row, whether no row tile of any head has more than one that is cut."""
    row_tiles, key_tiles = visits.cdiv(L, rows), visits.cdiv(S, block_k)
    some, every = summary(words, L, row_tiles, key_tiles, block_k)
    found = visits.table(mask, rows, L, S, block_k)[:, None]  # (B|1, 1, row tiles, 4)
    if mask is None:  # the same for every row tile: sorted once, where the dense mask is, too
        found = found[:, :, :1]
    first, full_first, full_last, last = (found[..., n, None] for n in range(4))
    at = jnp.arange(key_tiles, dtype=jnp.int32)
    visited = some & (at >= first) & (at < last)  # (B|1, Hq|1, row tiles|1, key tiles)
    full = every & (at >= full_first) & (at < full_last)
    # one number for a tile's class and, in it, its place from behind: sorted alone, it says both again
    rank = jnp.where(visited, jnp.where(full, key_tiles, 0), 2 * key_tiles) + key_tiles - 1 - at
    rank = lax.sort(rank, is_stable=False)
    whole = (rank >= key_tiles) & (rank < 2 * key_tiles)  # a row that sees nothing visits a tile that is not
    entries = 2 * (key_tiles - 1 - rank % key_tiles) + jnp.where(whole, 0, 1)
    count = jnp.maximum((rank < 2 * key_tiles).sum(-1, keepdims=True, dtype=jnp.int32), 1)
    once = (rank[..., 1:2] >= key_tiles).all()
    return jnp.concatenate([count, entries, jnp.broadcast_to(once.astype(jnp.int32), count.shape)], axis=-1)


def unpack(words: Sequence[Any], block_k: int) -> Any:
    """The bool tile (rows, block_k) of its words, (rows, 4) for each piece or, where block_k is no multiple of it, half a piece."""
    keys = PIECE if block_k % PIECE == 0 else HALF
    column = lax.broadcasted_iota(jnp.int32, (words[0].shape[0], block_k), 1)
    chosen = jnp.zeros_like(column)
    for n, word in enumerate(words):
        for t in range(4):
            own = (lax.div(column, np.int32(keys)) == n) & (lax.rem(lax.div(column, np.int32(2)), np.int32(4)) == t)
            chosen = jnp.where(own, lax.broadcast_in_dim(word[:, t], column.shape, [0]), chosen)
    at = lax.div(lax.rem(column, np.int32(keys)), np.int32(8)) * np.int32(2) + lax.rem(column, np.int32(2))
    return lax.shift_right_logical(chosen, at) & 1 == 1


def lay_out(bias: jax.Array, rows: int, block_k: int) -> jax.Array:
    """A bias as the kernel reads it; see the table above. Only a broadcast one is made anew, and it is small."""
    what = kind(bias)
    if what == "tile":
        return bias
    B, H, L, S = bias.shape
    flat = bias.astype(jnp.float32).reshape(B, H, L * S)
    block = {"row": rows, "column": block_k, "scalar": 1}[what]
    return jnp.pad(flat, ((0, 0), (0, 0), (0, visits.cdiv(L * S, block) * block - L * S)))
