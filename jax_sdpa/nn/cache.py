"""The keys and values of a sequence so far: a pytree of static size with a length per sequence.

A chunk of L tokens, of which each sequence may use only some (padding on the left or on the right), is written at each sequence's
own place; padding is not stored, so slot = position, or position modulo the window in a ring. What the chunk's queries may see is
then a structured mask of a few numbers per sequence, never an L x S array, and the same program serves every step:

    decode (L = 1)          the cache after the write, KeyLengths(lengths)
    chunk, plain cache      the cache after the write, KeyLengths(lengths) & Band(window, offset = position of the chunk's row 0)
    decode, ring            all slots hold the window, in whatever order: KeyLengths(min(lengths, slots))
    chunk, ring             the ring before the write, unrolled into the order of positions, and the chunk behind it
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_sdpa.masks import Band, KeyLengths, Mask


class View(NamedTuple):
    """What a chunk's queries attend to: key (B, S, H, E), value (B, S, H, Ev), and the mask of the call."""

    key: jax.Array
    value: jax.Array
    mask: Mask


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences, each of its own length; `layer.make_cache(batch, length)` makes one that fits a layer.

    Fields: key (B, slots, H, E), value (B, slots, H, Ev), lengths int32 (B,), the number of tokens so far; window (static):
    None, or the window whose last keys the slots hold as a ring. A pytree, to be carried through `jit`, `scan` and checkpoints;
    donate it to a jitted step (`donate_argnums`), and it is written in place.

    A plain cache has as many slots as a sequence may have tokens. Tokens beyond that are not stored, and the layer gives NaN for
    them: traced lengths cannot raise an error, and a wrong number must not look like a right one.

    >>> cache = KVCache.empty(2, 16, 1, 8)
    >>> key = jnp.ones((2, 5, 1, 8))
    >>> cache, view = cache.extend(key, key, Chunk.of(2, 5, jnp.array([5, 3])))
    >>> cache.lengths.tolist(), view.key.shape
    ([5, 3], (2, 16, 1, 8))
    """

    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

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
        """No tokens yet. length: the most that a sequence may have; with a smaller window the slots are a ring of that size."""
        ring = window is not None and window < length
        shape = (batch, window if ring else length, kv_heads)
        value = jnp.zeros((*shape, head_dim if value_head_dim is None else value_head_dim), dtype)
        return cls(jnp.zeros((*shape, head_dim), dtype), value, jnp.zeros(batch, jnp.int32), window if ring else None)

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

        window: the attention's own, None = unlimited; a ring must have been made for it.

        Raises:
            ValueError: a chunk that is longer than a plain cache; shapes, dtypes or a window that the cache was not made for.
        """
        L = key.shape[1]
        for name, new, held in (("key", key, self.key), ("value", value, self.value)):
            if (new.shape[0], *new.shape[2:], new.dtype) != (held.shape[0], *held.shape[2:], held.dtype):
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
            return jax.vmap(lambda held, slot, new: held.at[slot].set(new, mode="drop"))(held, slot, new)

        after = KVCache(write(self.key, key), write(self.value, value), new_lengths, self.window)
        if self.window is not None and L > 1:
            return after, self._unrolled(key, value, chunk)
        held = jnp.minimum(new_lengths, self.slots)
        if L == 1:
            starts = None if window is None or self.window is not None else jnp.maximum(new_lengths - window, 0)
            return after, View(after.key, after.value, KeyLengths(held, starts))
        band = Band(-1 if window is None else window - 1, 0, self.lengths - chunk.first)
        return after, View(after.key, after.value, band & KeyLengths(held))

    def _unrolled(self, key: jax.Array, value: jax.Array, chunk: Chunk) -> View:
        """The ring's keys from the oldest to the newest, then the chunk's own without its padding on the left."""
        L, N = key.shape[1], self.slots
        from_oldest = (self.lengths[:, None] + jnp.arange(N, dtype=jnp.int32)[None]) % N
        own = jnp.minimum(chunk.first[:, None] + jnp.arange(L, dtype=jnp.int32)[None], L - 1)

        def in_order(held: jax.Array, new: jax.Array) -> jax.Array:
            held, new = (jnp.take_along_axis(x, i[:, :, None, None], 1) for x, i in ((held, from_oldest), (new, own)))
            return jnp.concatenate([held, new], 1)  # (B, N + L, H, E): index N + i is the chunk's i-th token

        known = KeyLengths(N + chunk.count, N - jnp.minimum(self.lengths, N))
        return View(in_order(self.key, key), in_order(self.value, value), Band(N - 1, 0, N - chunk.first) & known)
