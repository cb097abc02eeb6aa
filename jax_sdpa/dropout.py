"""The dropout mask: one bit for each (batch, query head, query, key), the same in every backend.

The mask is a function, not a stream: any tile of it can be computed anywhere, forward or backward, on any device, under any
tiling and sharding, and the bits agree. Nothing is stored between the forward and the backward but the key's two words for
each head. The definition, all in uint32 arithmetic modulo 2**32:

    s0, s1 = seeds(key, B, H)[b, h]                        Threefry-2x32 of the JAX key at (b, h)
    a, b   = query_words(s0, s1, query)                    Threefry-2x32 of (s0, s1) at (query, 0); a made odd
    c      = key_words(s1, key)                            a 32-bit mix of the key's index
    keep   = a * c + b >= round(p * 2**32)

So an element costs one multiply-add and one comparison. `h(c) = a*c + b`, read from its top bits, is multiply-shift hashing
(Dietzfelbinger 1996; Thorup, "High Speed Hashing for Integers and Strings", arXiv:1504.06804, section 3.3): over the random
(a, b) of the rows, any two keys of a row are decided independently, and rows are independent of one another because Threefry
draws each row's (a, b). `c` must be free of arithmetic structure, hence the mix: with c = key a row would be a Weyl sequence.

Why not Threefry for each element: about 70 integer operations, where a Hopper at full speed has room for about 10 beside the
matrix products. `pallas_kernels/NOTES.md`, "Dropout generator", has the variants tried and their figures.

Limits, by intent: two rows of a head share `a` with a chance of 2**-31 a pair, and then differ by a fixed shift of `b`; two
heads share the sequence c with a chance of 2**-32, under different a and b. Neither is visible in a mask's statistics.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DROPOUT_VERSION = 1  # counts up whenever a bit of any mask changes; it enters `seeds`, and the tests pin the bits

_U = np.uint32  # a strong type: with a Python int the result would hang on jax_enable_x64 and on NumPy's promotion
_TAG = 0x53445041  # "SDPA": keeps our counters apart from those that jax.random draws from the same key
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_GOLDEN = _U(0x9E3779B9)  # 2**32 / golden ratio, odd (Knuth, TAOCP 3, section 6.4)
_LOWBIAS = _U(0x7FEB352D)  # first multiplier of lowbias32 (Wellons, hash-prospector)
_LATTICE = 2891336453  # L'Ecuyer 1999, Math. Comp. 68, table 4, m = 2**32: best lattices up to dimension 8


def threefry2x32(k0, k1, x0, x1):
    """Threefry-2x32 with 20 rounds: two pseudorandom words for the key (k0, k1) at the counter (x0, x1).

    All uint32, NumPy or JAX, broadcasting together; x0 and x1 arrays. Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011. It is written out because it must also run inside kernels, where JAX's primitive does not lower;
    a test holds it to JAX's own.

    >>> [hex(int(w[0])) for w in threefry2x32(*np.zeros((2, 1), np.uint32), *np.zeros((2, 1), np.uint32))]
    ['0x6b200159', '0x99ba4efe']
    """
    ks = (k0, k1, k0 ^ k1 ^ _U(0x1BD11BDA))
    x0, x1 = x0 + ks[0], x1 + ks[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << _U(r)) | (x1 >> _U(32 - r))) ^ x0
        x0, x1 = x0 + ks[(i + 1) % 3], x1 + ks[(i + 2) % 3] + _U(i + 1)
    return x0, x1


_threefry2x32_jit = jax.jit(threefry2x32)  # `seeds` is called outside of jit too: one dispatch there instead of a hundred


def seeds(key, batch, heads, *, batch_offset=0, head_offset=0):
    """Two words for each batch and query head: `seeds(...)[b, h] = threefry(key', (batch_offset + b, head_offset + h))`.

    key: one JAX key, typed or a legacy uint32 vector, of any implementation; more than two words are folded into two.
    batch, heads: static sizes. The offsets may be traced; a manual shard_map gives its global ones. Returns uint32 (batch,
    heads, 2). Made once, outside of kernels: vmap and sharding then carry it along like any other operand.

    >>> seeds(jax.random.key(0), 1, 2).tolist()
    [[[3258769290, 3769757759], [4131996398, 589852147]]]
    """
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jnp.asarray(key)
    if words.ndim != 1 or words.dtype != jnp.uint32 or words.size < 2 or words.size % 2:
        raise ValueError(f"expected one JAX PRNG key, got key data {words.dtype}{list(words.shape)}: use one of jax.random.split's")
    k = words[0], words[1]
    for i in range(2, words.size, 2):
        k = _threefry2x32_jit(*k, words[i], words[i + 1])
    k = _threefry2x32_jit(*k, jnp.asarray(_U(_TAG)), jnp.asarray(_U(DROPOUT_VERSION)))
    b, h = jnp.broadcast_arrays(_indices(batch_offset, batch)[:, None], _indices(head_offset, heads)[None, :])
    return jnp.stack(_threefry2x32_jit(*k, b, h), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyAt:
    """A JAX key for a call that is a part of a larger one, with where the part begins in it: see `at`."""

    key: jax.Array
    batch: Any = 0
    head: Any = 0
    query_position: Any = 0
    key_position: Any = 0

    def seeds(self, batch: int, heads: int) -> jax.Array:
        """`seeds` of the part, `seeds_at` its positions."""
        own = seeds(self.key, batch, heads, batch_offset=self.batch, head_offset=self.head)
        begins = self.query_position, self.key_position
        return own if all(isinstance(n, int) and n == 0 for n in begins) else seeds_at(own, *begins)


def at(key, *, batch=0, head=0, query_position=0, key_position=0):
    """A `dropout_rng` for a part of a larger call: it drops what the larger call drops there.

    Args:
        key: the larger call's JAX key.
        batch, head, query_position, key_position: which batch entry, query head, query and key position of the larger call the
            part's first ones are; integers, or traced scalars, as in a manual `shard_map`:

            dropout_rng=at(key, batch=jax.lax.axis_index("data") * B_local, head=jax.lax.axis_index("tensor") * Hq_local)

    Under plain `jit`, whatever the sharding, and in `jax_sdpa.sharding` nothing is to be said: there the call is whole.

    Raises:
        TypeError: `key` is itself at some place.

    >>> from jax_sdpa import scaled_dot_product_attention as sdpa
    >>> q, key = jnp.ones((2, 3, 4, 8)), jax.random.key(0)
    >>> whole = sdpa(q, q, q, dropout_p=0.5, dropout_rng=key)
    >>> part = sdpa(q[1:], q[1:], q[1:], dropout_p=0.5, dropout_rng=at(key, batch=1))
    >>> bool((part == whole[1:]).all())
    True
    """
    if isinstance(key, KeyAt):
        raise TypeError("key must be a JAX key, got one that is at some place already: add up the offsets.")
    return KeyAt(key, batch, head, query_position, key_position)


def seeds_at(seeds, q_offset, k_offset):
    """The seeds of a part of a call, whose queries count from q_offset and whose keys from k_offset: four words for each head.

    seeds: uint32 (..., 2); the offsets may be traced scalars. Whoever is given four words adds the last two to his indices.

    >>> seeds_at(jnp.zeros((1, 1, 2), jnp.uint32), 256, 512).tolist()
    [[[0, 0, 256, 512]]]
    """
    offsets = jnp.stack([jnp.asarray(offset).astype(_U) for offset in (q_offset, k_offset)])
    return jnp.concatenate([seeds, jnp.broadcast_to(offsets, (*seeds.shape[:-1], 2))], axis=-1)


def threshold(p):
    """`round(p * 2**32)`: an element is dropped where its 32 bits are below it. A Python int in [0, 2**32]; 2**32 only for p = 1.

    >>> threshold(0.0), threshold(0.5) == 2**31, threshold(1.0) == 2**32, threshold(1 - 1e-16) == 2**32 - 1
    (0, True, True, True)
    """
    return 2**32 if p >= 1 else min(round(float(p) * 2**32), 2**32 - 1)


def rounded(p):
    """The probability that is really used, `threshold(p) / 2**32`: scale survivors by `1 / (1 - rounded(p))`; p = 1 has none.

    >>> abs(rounded(0.1) - 0.1) < 2**-33, rounded(0.25), rounded(1)
    (True, 0.25, 1.0)
    """
    return threshold(p) / 2**32


def query_words(seed0, seed1, q_idx):
    """A query's pair: `(a, b) = threefry((seed0, seed1), (query, 0))`, `a` made odd so that c -> a*c + b is a bijection.

    q_idx: integer array, absolute positions; returns two uint32 arrays of its shape (broadcast with the seeds'). About 75
    operations: a kernel computes them once for each row of its tile, or loads them as it loads lse.
    """
    q = q_idx.astype(_U)
    a, b = threefry2x32(seed0, seed1, q, q ^ q)
    return a | _U(1), b


KEY_BITS = 9
"""The bits of a key's index that are its own: keys which differ in these alone share a mix."""


def key_words(seed1, k_idx, own=None):
    """A key's word `c`: four keys share one 32-bit mix, and each takes its own multiple of it.

        x = (key & ~9) * GOLDEN + seed1;  x ^= x >> 16;  x *= LOWBIAS;  x ^= x >> 15
        c = x * LATTICE ** (2 * bit3(key) + bit0(key))

    k_idx: integer array, absolute positions; uint32 of its shape (broadcast with seed1's). own: their KEY_BITS, where k_idx has
    zeros for them: a kernel may know which are equal without. The mix is lowbias32 (Wellons)
    short of its last multiplication, whose place the query's `a` takes. Keys k, k^1, k^8 and k^9 share it because in a Hopper
    WGMMA accumulator one thread holds columns 8j+2t and 8j+2t+1 for all j, of two rows: the compiler knows bits 0 and 3 of
    the index, sees four equal mixes, and makes one for eight elements. In the transposed tile of a dk/dv kernel c is
    a row's word and leaves the loop. The four are consecutive values of a generator whose lattices in two to four dimensions
    are near the best possible, so they go together no more than others do.

    >>> key_words(np.uint32(1), np.arange(3)).tolist()
    [2146159355, 1751416807, 318393581]
    """
    k = k_idx.astype(_U)
    x = (k & ~_U(KEY_BITS)) * _GOLDEN + seed1
    k = k if own is None else own.astype(_U)
    x = x ^ (x >> _U(16))
    x = x * _LOWBIAS
    x = x ^ (x >> _U(15))
    # powers by arithmetic on the two bits: `where` would need to know whether this is NumPy, XLA or a kernel
    by_bit0 = (k & _U(1)) * _U(_LATTICE - 1) + _U(1)
    by_bit3 = ((k >> _U(3)) & _U(1)) * _U(_LATTICE**2 % 2**32 - 1) + _U(1)
    return x * (by_bit0 * by_bit3)


def keep_words(a, b, c, p):
    """The decision, `a*c + b >= threshold(p)`, on words that broadcast together: a tile's rows against its columns. bool.

    p: a Python number, static. p = 0 keeps everything, p = 1 nothing.
    """
    t = threshold(p)
    bits = a * c + b
    return bits < _U(0) if t == 2**32 else bits >= _U(t)


def keep(seed0, seed1, q_idx, k_idx, p):
    """True where the element stays: `a*c + b >= threshold(p)` with the words of its query and its key.

    seed0, seed1: uint32, one head's `seeds`; q_idx, k_idx: integer arrays that broadcast together, absolute positions.
    The same bits from NumPy, XLA and a Mosaic GPU kernel, with jax_enable_x64 on or off.

    >>> keep(np.uint32(1), np.uint32(2), np.arange(2)[:, None], np.arange(8)[None, :], 0.5).astype(int).tolist()
    [[1, 1, 0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0, 1, 1]]
    """
    return keep_words(*query_words(seed0, seed1, q_idx), key_words(seed1, k_idx), p)


def keep_block(seeds, q_start, q_len, k_start, k_len, p):
    """A block of the mask for XLA: `keep_block(...)[b, h, i, j] = keep(*seeds[b, h], q_start + i, k_start + j, p)`.

    seeds: uint32 (..., 2), or (..., 4) of `seeds_at`; the starts may be traced, the lengths are static. Returns bool
    (..., q_len, k_len).

    >>> keep_block(seeds(jax.random.key(0), 2, 3), 0, 4, 128, 5, 0.1).shape
    (2, 3, 4, 5)
    """
    s0, s1 = seeds[..., 0, None], seeds[..., 1, None]
    q_idx, k_idx = _indices(q_start, q_len), _indices(k_start, k_len)
    if seeds.shape[-1] == 4:
        q_idx, k_idx = q_idx + seeds[..., 2, None], k_idx + seeds[..., 3, None]
    words = *query_words(s0, s1, q_idx), key_words(s1, k_idx)
    a, b, c = jax.lax.optimization_barrier(words)  # else XLA fuses the words' making into each of the q_len * k_len elements
    return keep_words(a[..., :, None], b[..., :, None], c[..., None, :], p)


def _indices(start, size):
    """`start + arange(size)` in uint32, whatever integer type (or tracer) start is."""
    return jnp.asarray(start).astype(_U) + jnp.arange(size, dtype=_U)
