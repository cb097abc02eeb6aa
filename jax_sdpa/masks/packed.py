"""Packed sequences by their boundaries: `Packed` has what a call is given, `KeyRanges` the stretch of keys that each query sees."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from jax_sdpa.masks.base import Index, Mask, clip, int32, maximum, minimum
from jax_sdpa.masks.positions import Band
from jax_sdpa.masks.segments import at, longer


def _at_most(ascending: jax.Array, values: Any) -> jax.Array:
    """How many entries of ascending (batch..., n) are at most each of the values (...): int32 (batch..., ...).

    Its log2(n) steps are unrolled: of a loop, which is searchsorted's default, XLA launches every step by itself on a GPU.
    """
    values = jnp.asarray(values, jnp.int32)

    def of(row: jax.Array) -> jax.Array:
        return jnp.searchsorted(row, values, side="right", method="scan_unrolled").astype(jnp.int32)

    if ascending.ndim == 1:
        return of(ascending)
    flat = ascending.reshape(-1, ascending.shape[-1])
    found = jax.vmap(of)(flat)
    return found.reshape(*ascending.shape[:-1], *values.shape).astype(jnp.int32)


def _at_most_each(ascending: jax.Array, length: Any) -> jax.Array:
    """`_at_most` of every position, 0 to length - 1: int32 (batch..., length).

    Counted, not searched: an entry adds one at its position, and what is at most a position is the sum up to there. The steps of a
    search each leave an array of `length` behind where XLA does not fuse them (on a CPU 16 of them, where there are 300 000 entries
    and as many positions); here there are two, of a batch four, and no loop either. Integers add up to the same in whatever order
    the atomics of a GPU come.
    """

    def of(row: jax.Array) -> jax.Array:
        row = jnp.maximum(row, 0)  # before all positions: at most the first one; those behind all of them are dropped
        marks = jnp.zeros(length, jnp.int32).at[row].add(1, mode="drop", wrap_negative_indices=False)
        return jnp.cumsum(marks, dtype=jnp.int32)

    if ascending.ndim == 1:
        return of(ascending)
    *batch, entries = ascending.shape
    return jax.vmap(of)(ascending.reshape(math.prod(batch), entries)).reshape(*batch, length)


@dataclasses.dataclass(frozen=True)
class KeyRanges(Mask):
    """Query q sees the keys `first[q] <= k < stop[q]`, where neither decreases along the queries, and first <= stop.

    That both ascend makes it cheap: what a block of queries sees is read off its first and its last one, and the queries that see
    a key are a range as well, so that the transposed mask is of the same kind.

    Args:
        first, stop: integer arrays (batch..., L).
        keys: S, a static int; filled in by a call.

    >>> KeyRanges(jnp.array([0, 0, 2]), jnp.array([1, 2, 4])).materialise(3, 4).astype(int)
    Array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 1]], dtype=int32)
    """

    first: Any
    stop: Any
    keys: int | None = None
    arrays = ("first:1", "stop:1")

    def __post_init__(self) -> None:
        for name in ("first", "stop"):
            object.__setattr__(self, name, int32(getattr(self, name), f"KeyRanges.{name}"))

    def parts(self, L: Index, S: Index) -> tuple[Mask, ...]:
        if self.first.shape[-1:] != (L,) or self.stop.shape[-1:] != (L,):
            raise ValueError(
                f"KeyRanges must have one range per query, {L} here, got arrays of shape {self.first.shape} and {self.stop.shape}."
            )
        return (dataclasses.replace(self, keys=S if isinstance(S, int) else None),)

    def padded(self, more_q: Index, more_k: Index) -> Mask:
        """The additional queries see nothing, at the place where the last range stops: none may come before another."""
        end = self.stop[..., -1:]
        keys = self.keys + more_k if self.keys is not None and isinstance(more_k, int) else None
        return KeyRanges(longer(self.first, more_q, end), longer(self.stop, more_q, end), keys)

    def local(self, number: Callable[[Any], Any], by_query: Callable[[Any], Any], by_key: Callable[[Any], Any]) -> Self:
        return jax.tree.unflatten(jax.tree.structure(self), [by_query(self.first), by_query(self.stop)])

    def seen_from(self, q0: Index, k0: Index) -> KeyRanges:
        """`keys` stays: entries behind the part's own keys are never looked at."""
        return KeyRanges(self.first - k0, self.stop - k0, self.keys)

    def moved(self, by: Any) -> Mask:
        return _MovedRanges(self.first, self.stop, by)

    def transposed(self) -> KeyRanges:
        """`first[q] <= k` holds up to some query, `k < stop[q]` from some query on: those between the two see key k."""
        if self.keys is None:
            raise ValueError("KeyRanges needs keys=S, the number of keys, to be transposed.")
        return KeyRanges(*self._queries_of(self.keys), self.first.shape[-1])

    def _queries_of(self, keys: Index) -> tuple[jax.Array, jax.Array]:
        """[first, stop): the queries that see each of so many keys. Both are counted at once, which saves a GPU launches."""
        first, stop = _at_most_each(jnp.stack(jnp.broadcast_arrays(self.stop, self.first)), keys)
        return first, stop

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        return (k_idx >= at(self.first, q_idx)) & (k_idx < at(self.stop, q_idx))

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo, hi = clip(self._of(self.first, q_lo), S), clip(self._of(self.stop, q_hi - 1), S)
        return lo, maximum(lo, hi)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo, hi = clip(self._of(self.first, q_hi - 1), S), clip(self._of(self.stop, q_lo), S)
        return lo, maximum(lo, hi)

    @staticmethod
    def _of(ends: Any, q: Index) -> Any:
        """An end of one query's range, of the last one's behind them."""
        return jnp.take(jnp.asarray(ends), minimum(q, ends.shape[-1] - 1), axis=-1, mode="clip")

    def key_valid(self, L: Index, S: Index) -> Any:
        first, stop = self._queries_of(S)
        return first < stop


@dataclasses.dataclass(frozen=True)
class _MovedRanges(Mask):
    """Ranges where keys count from `by`: what is subtracted is a number per query, not an index per score."""

    first: Any
    stop: Any
    by: Any

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        return (k_idx >= at(self.first, q_idx) - self.by) & (k_idx < at(self.stop, q_idx) - self.by)


@dataclasses.dataclass(frozen=True)
class Packed(Mask):
    """Sequences that stand one behind the other, by their boundaries: a query sees the keys of its own sequence, in a window.

    With n the sequence of query q, i = q - cu_seq_q[n] its place there and d = (keys of n) - (queries of n), ::

        keep = (k in sequence n) & (j - i - d >= -left) & (j - i - d <= right),    j = k - cu_seq_k[n]

    so windows are aligned to the bottom right of each sequence, as in FlashAttention: its last query stands at its last key. -1 =
    unlimited, on either side; (-1, 0) is causal. Tokens outside of all sequences (behind cu_seq[-1]) take part in nothing. The
    arrays may be traced: other boundaries are other numbers of the same program.

    Args:
        cu_seq_q: integer array (batch..., N + 1), ascending: sequence n is the queries cu_seq_q[n] to cu_seq_q[n + 1] - 1.
        cu_seq_k: the same for the keys; default: the queries' (self-attention).
        left, right: static ints >= -1, inclusive distances in keys.
        used_q, used_k: integer (batch..., N): of each sequence only so many first queries, or keys, exist; default: all of them. d
            is made of these.

    >>> Packed(jnp.array([0, 2, 3]), right=0).materialise(4, 4).astype(int)
    Array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 0, 0]], dtype=int32)
    """

    cu_seq_q: Any
    cu_seq_k: Any = None
    left: int = -1
    right: int = -1
    used_q: Any = None
    used_k: Any = None
    arrays = ("cu_seq_q:1", "cu_seq_k:1", "used_q:1", "used_k:1")

    def __post_init__(self) -> None:
        if self.cu_seq_k is None:
            object.__setattr__(self, "cu_seq_k", self.cu_seq_q)
        window = Band(self.left, self.right)  # checks the distances; what is longer than any sequence becomes -1
        object.__setattr__(self, "left", window.left)
        object.__setattr__(self, "right", window.right)
        for name, rest in (("cu_seq_q", 1), ("cu_seq_k", 1), ("used_q", 0), ("used_k", 0)):
            if getattr(self, name) is None:
                continue
            object.__setattr__(self, name, int32(getattr(self, name), f"Packed.{name}"))
            if getattr(self, name).ndim == 0 or getattr(self, name).shape[-1] != self.sequences + rest:
                raise ValueError(
                    f"Packed.{name} must have shape (batch..., {'N + 1' if rest else 'N'}), N = {self.sequences} sequences by "
                    f"cu_seq_q, got {getattr(self, name).shape}."
                )

    @property
    def sequences(self) -> int:
        shape = getattr(self.cu_seq_q, "shape", ())
        if not shape or shape[-1] == 0:
            raise ValueError(f"Packed.cu_seq_q must have shape (batch..., N + 1), got {shape}.")
        return shape[-1] - 1

    def parts(self, L: Index, S: Index) -> tuple[Mask, ...]:
        """A range of keys for each query of the call."""
        begun = _at_most_each(jnp.asarray(self.cu_seq_q), L)
        first, stop = (clip(end, S) for end in self._ranges(jnp.arange(L, dtype=jnp.int32), begun))
        return (KeyRanges(first, stop, S if isinstance(S, int) else None),)

    def _ranges(self, q_idx: Any, begun: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(first, stop) of queries, int32 (batch..., *q_idx.shape), by how many of cu_seq_q are at most each of them (`begun`).

        Both ascend, whatever is hidden.
        """
        cu_q, cu_k = jnp.asarray(self.cu_seq_q), jnp.asarray(self.cu_seq_k)
        batch = jnp.broadcast_shapes(*(x.shape[:-1] for x in jax.tree.leaves(self)))
        q_idx = jnp.asarray(q_idx, jnp.int32)
        n = jnp.broadcast_to(begun, (*batch, *q_idx.shape)) - 1  # -1 and N: outside of all sequences
        inside = (n >= 0) & (n < self.sequences)

        def of(per_sequence: jax.Array) -> jax.Array:
            """A number of each query's sequence."""
            flat = jnp.broadcast_to(per_sequence, (*batch, per_sequence.shape[-1]))
            places = jnp.clip(n, 0, per_sequence.shape[-1] - 1).reshape(*batch, -1)
            return jnp.take_along_axis(flat, places, axis=-1).reshape(n.shape)

        if self.sequences == 0:
            return jnp.zeros_like(n), jnp.zeros_like(n)
        slots_q, slots_k = cu_q[..., 1:] - cu_q[..., :-1], cu_k[..., 1:] - cu_k[..., :-1]
        used_q = slots_q if self.used_q is None else clip(self.used_q, slots_q)
        used_k = slots_k if self.used_k is None else clip(self.used_k, slots_k)
        keys, i = jnp.where(inside, of(used_k), 0), q_idx - of(cu_q)
        position, start = i + of(used_k - used_q), of(cu_k)
        first = 0 if self.left < 0 else jnp.clip(position - self.left, 0, keys)
        stop = keys if self.right < 0 else jnp.clip(position + self.right + 1, 0, keys)
        stop = jnp.where(i < of(used_q), stop, keys)
        return start + jnp.where(i < of(used_q), jnp.minimum(first, stop), keys), start + stop

    def transposed(self) -> Packed:
        """The last query stands at the last key from both sides."""
        return Packed(self.cu_seq_k, self.cu_seq_q, self.right, self.left, self.used_k, self.used_q)

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        first, stop = self._ranges(q_idx, _at_most(jnp.asarray(self.cu_seq_q), q_idx))
        rank = jnp.ndim(q_idx)
        if first.ndim > rank:  # a heads dim behind the batch dims
            first, stop = (jnp.expand_dims(x, first.ndim - rank) for x in (first, stop))
        return (k_idx >= first) & (k_idx < stop)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return self.parts(L, S)[0].kv_range(q_lo, q_hi, L, S)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return self.parts(L, S)[0].full_range(q_lo, q_hi, L, S)

    def key_valid(self, L: Index, S: Index) -> Any:
        return self.parts(L, S)[0].key_valid(L, S)
