"""The keys and values of a sequence so far: a pytree of static size with a length per sequence.

A chunk of L tokens, of which each sequence may use only some (padding on the left or on the right), is written at each sequence's
own place; padding is not stored, so slot = position, or position modulo the window in a ring. What the chunk's queries may see is
then a structured mask of a few numbers per sequence, never an L x S array, and the same program serves every step:

    decode (L = 1)          the cache after the write, KeyLengths(lengths)
    chunk, plain cache      the cache after the write, KeyLengths(lengths) & Band(window, offset = position of the chunk's row 0)
    decode, ring            all slots hold the window, in whatever order: KeyLengths(min(lengths, slots))
    chunk, ring             the ring before the write, unrolled into the order of positions, and the chunk behind it

A cache of 8 bits holds a scale per token and head beside them. A chunk's own keys are rounded before its queries see them, so that
a sequence's outputs do not depend on how it is cut into chunks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_sdpa.check_operands import DTYPES
from jax_sdpa.masks import Band, KeyLengths, Mask
from jax_sdpa.nn import eight_bits
from jax_sdpa.request import EIGHT_BITS


class View(NamedTuple):
    """What a chunk's queries attend to: key (B, S, H, E), value (B, S, H, Ev), the mask of the call, of 8 bits scales (B, H, S)."""

    key: jax.Array
    value: jax.Array
    mask: Mask
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Which of a chunk's L tokens exist: `count` of them from `first` on, (B,) int32 each."""

    first: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, batch: int, L: int, lengths: Any = None, padding: str = "right") -> Chunk:
        """From the sequences' lengths (B,) in the chunk, 0 to L, None = all L, and the side of the padding."""
        if padding not in ("left", "right"):
            raise ValueError(f"padding must be 'left' or 'right', got {padding!r}.")
        if lengths is None:
            return cls(jnp.zeros(batch, jnp.int32), jnp.full(batch, L, jnp.int32))
        lengths = jnp.asarray(lengths)
        if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths must be integers of shape ({batch},), got {lengths.dtype}{list(lengths.shape)}.")
        count = jnp.clip(lengths.astype(jnp.int32), 0, L)
        return cls(L - count if padding == "left" else jnp.zeros_like(count), count)

    def exists(self, L: int) -> jax.Array:
        """(B, L) bool."""
        index = jnp.arange(L, dtype=jnp.int32)[None]
        return (index >= self.first[:, None]) & (index < (self.first + self.count)[:, None])


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences, each of its own length; `layer.make_cache(batch, length)` makes one that fits a layer.

    Fields: key (B, slots, H, E), value (B, slots, H, Ev), lengths int32 (B,), the number of tokens so far; window (static):
    None, or the window whose last keys the slots hold as a ring; scaled (static): whether keys and values are of 8 bits and have
    key_scale and value_scale, float32 (B, H, slots), which are else None. A pytree, to be carried through `jit`, `scan` and
    checkpoints; donate it to a jitted step (`donate_argnums`), and it is written in place.

    A plain cache has as many slots as a sequence may have tokens. Tokens beyond that are not stored, and the layer gives NaN for
    them: traced lengths cannot raise an error, and a wrong number must not look like a right one.

    With dtype int8 or float8_e4m3fn each token is rounded when it is written, by a scale of its own in each head:
    key = key8 * key_scale, and so the values. int8 is off by at most 1/254 of the token's largest element in that head,
    float8_e4m3fn by 1/16 of each element, so that int8 is the better one unless a few elements are far larger than the others.
    A token with a NaN or an infinity in a head is NaN there as a whole. See `eight_bits.quantised`. It is for inference: a
    derivative through it is an error.

    >>> cache = KVCache.empty(2, 16, 1, 8)
    >>> key = jnp.ones((2, 5, 1, 8))
    >>> cache, view = cache.extend(key, key, Chunk.of(2, 5, jnp.array([5, 3])))
    >>> cache.lengths.tolist(), view.key.shape
    ([5, 3], (2, 16, 1, 8))
    >>> cache, view = KVCache.empty(2, 16, 1, 8, dtype=jnp.int8).extend(key, key, Chunk.of(2, 5))
    >>> cache.key.dtype.name, cache.key_scale.shape, float(cache.key[0, 0, 0, 0] * cache.key_scale[0, 0, 0])
    ('int8', (2, 1, 16), 1.0)
    """

    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    window: int | None = None
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None
    scaled: bool = False

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[int | None, bool]]:
        """Scales that are not there are no children: such a cache restores checkpoints made before there were any."""
        names = ("key", "value", "lengths", "key_scale", "value_scale")[: 5 if self.scaled else 3]
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], (self.window, self.scaled)

    @classmethod
    def tree_unflatten(cls, static: tuple[int | None, bool], children: Any) -> KVCache:
        (window, scaled), (key, value, lengths, *scales) = static, children
        return cls(key, value, lengths, window, *(scales or (None, None)), scaled=scaled)

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        dtype: Any = jnp.float32,
        window: int | None = None,
    ) -> KVCache:
        """No tokens yet. length: the most that a sequence may have; with a smaller window the slots are a ring of that size.

        dtype: float16, bfloat16, float32 or float64; or int8 or float8_e4m3fn, with scales.
        """
        if (name := jnp.dtype(dtype).name) not in (*DTYPES, *EIGHT_BITS):
            raise TypeError(f"a cache is of {', '.join((*DTYPES, *EIGHT_BITS))}, got {name}.")
        ring = window is not None and window < length
        shape = (batch, window if ring else length, kv_heads)
        key = jnp.zeros((*shape, head_dim), dtype)
        value = jnp.zeros((*shape, head_dim if value_head_dim is None else value_head_dim), dtype)
        scaled = name in EIGHT_BITS
        scales = [jnp.zeros((batch, kv_heads, shape[1]), jnp.float32) if scaled else None for _ in "kv"]
        return cls(key, value, jnp.zeros(batch, jnp.int32), window if ring else None, *scales, scaled=scaled)

    @property
    def slots(self) -> int:
        return self.key.shape[1]

    def positions(self, chunk: Chunk, L: int) -> jax.Array:
        """(B, L): where in its sequence each token of the next chunk stands; padding on the left is before it, negative or not."""
        if chunk.first.shape != self.lengths.shape:
            raise ValueError(
                f"the cache holds {len(self.lengths)} sequences, got {len(chunk.first)}: make the cache for this batch and dtype."
            )
        return (self.lengths - chunk.first)[:, None] + jnp.arange(L, dtype=jnp.int32)[None]

    def overflows(self, chunk: Chunk, L: int) -> jax.Array | None:
        """(B, L) bool: the tokens of the chunk that a plain cache has no slot for; None for a ring, which has always one."""
        if self.window is not None:
            return None
        return chunk.exists(L) & (self.positions(chunk, L) >= self.slots)

    def extend(self, key: jax.Array, value: jax.Array, chunk: Chunk, window: int | None = None) -> tuple[KVCache, View]:
        """The cache with a chunk's keys (B, L, H, E) and values written, and what the chunk's queries may see.

        key, value: of the cache's dtype; for a cache in 8 bits floating, of any dtype.
        window: the attention's own, None = unlimited; a ring must have been made for it.

        Raises:
            ValueError: a chunk that is longer than a plain cache; shapes, dtypes or a window that the cache was not made for.
        """
        L = key.shape[1]
        for name, new, held in (("key", key, self.key), ("value", value, self.value)):
            fits = jnp.issubdtype(new.dtype, jnp.floating) if self.scaled else new.dtype == held.dtype
            if (new.shape[0], *new.shape[2:]) != (held.shape[0], *held.shape[2:]) or not fits:
                raise ValueError(
                    f"the cache holds {name}s of {held.dtype}{list(held.shape)} (batch, slots, heads, head dim), got "
                    f"{new.dtype}{list(new.shape)}: make the cache for this batch and dtype."
                )
        if self.window is not None and window != self.window:
            raise ValueError(f"the cache is a ring for a window of {self.window}, the attention has window={window}.")
        if self.window is None and self.slots < L:
            raise ValueError(f"a chunk of {L} tokens does not fit a cache of {self.slots}.")
        new_lengths = self.lengths + chunk.count
        position = self.positions(chunk, L)
        stored = chunk.exists(L)
        if self.window is not None:
            stored &= position >= (new_lengths - self.slots)[:, None]  # of a chunk longer than the ring, its end
        slot = jnp.where(stored, position % self.slots if self.window else position, self.slots)  # slots and more: dropped

        def write(held: jax.Array, new: jax.Array) -> jax.Array:
            """(B, slots, H, E), or scales (B, H, slots)."""

            def one(held: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
                return held.at[slot if held.ndim == 3 else (slice(None), slot)].set(new, mode="drop")

            return jax.vmap(one)(held, slot, new)

        new = self._as_held(key, value)
        held_key, held_value, key_scale, value_scale = jax.tree.map(write, self._held, new)
        after = KVCache(held_key, held_value, new_lengths, self.window, key_scale, value_scale, self.scaled)
        if self.window is not None and L > 1:
            return after, self._unrolled(new, chunk)
        held = jnp.minimum(new_lengths, self.slots)
        if L == 1:
            starts = None if window is None or self.window is not None else jnp.maximum(new_lengths - window, 0)
            return after, View(after.key, after.value, KeyLengths(held, starts), key_scale, value_scale)
        band = Band(-1 if window is None else window - 1, 0, self.lengths - chunk.first)
        return after, View(after.key, after.value, band & KeyLengths(held), key_scale, value_scale)

    @property
    def _held(self) -> _Held:
        return self.key, self.value, self.key_scale, self.value_scale

    def _as_held(self, key: jax.Array, value: jax.Array) -> _Held:
        """A chunk's keys and values as the cache has them."""
        if not self.scaled:
            return key, value, None, None
        (key, key_scale), (value, value_scale) = (eight_bits.quantised(x, self.key.dtype) for x in (key, value))
        return key, value, jnp.swapaxes(key_scale, 1, 2), jnp.swapaxes(value_scale, 1, 2)

    def _unrolled(self, new: _Held, chunk: Chunk) -> View:
        """The ring's keys from the oldest to the newest, then the chunk's own without its padding on the left."""
        L, N = new[0].shape[1], self.slots
        from_oldest = (self.lengths[:, None] + jnp.arange(N, dtype=jnp.int32)[None]) % N
        own = jnp.minimum(chunk.first[:, None] + jnp.arange(L, dtype=jnp.int32)[None], L - 1)

        def in_order(held: jax.Array, new: jax.Array) -> jax.Array:
            """(B, N + L, H, E), or scales (B, H, N + L): index N + i is the chunk's i-th token."""
            axis = 1 if held.ndim == 4 else 2

            def take(x: jax.Array, i: jax.Array) -> jax.Array:
                return jnp.take_along_axis(x, i[:, :, None, None] if axis == 1 else i[:, None], axis)

            return jnp.concatenate([take(held, from_oldest), take(new, own)], axis)

        known = KeyLengths(N + chunk.count, N - jnp.minimum(self.lengths, N))
        key, value, key_scale, value_scale = jax.tree.map(in_order, self._held, new)
        return View(key, value, Band(N - 1, 0, N - chunk.first) & known, key_scale, value_scale)


_Held = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""key, value, key_scale, value_scale of a cache, or of a chunk as the cache has it."""
