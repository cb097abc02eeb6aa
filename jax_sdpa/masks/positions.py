"""Masks that compare positions: bands around a diagonal (causal, sliding windows) and lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_sdpa.masks.base import Index, Mask, clip, int32, less, maximum, minimum, size_if, spread


@dataclasses.dataclass(frozen=True)
class Band(Mask):
    """Query q sits at position `q + offset` and sees the keys from `left` before to `right` behind it, both inclusive.

    `keep = (k - q - offset >= -left) & (k - q - offset <= right)`; -1 = unlimited, on either side.

    Args:
        left, right: static ints >= -1, inclusive distances in keys, as in `jax.nn` and FlashAttention. A window of W keys
            that ends with the query itself (Mistral, Gemma) is `left = W - 1, right = 0`.
        offset: how far the queries stand behind the first key: an int, or an integer array with the call's batch dims
            (chunked prefill at different depths). 0 is torch's upper-left alignment, S - L the lower-right one.

    >>> Band(1, 0).materialise(4, 4).astype(int)
    Array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]], dtype=int32)
    """

    left: int = -1
    right: int = -1
    offset: Any = 0
    arrays = ("offset:0",)
    slides = True

    def __post_init__(self) -> None:
        for name, distance in (("left", self.left), ("right", self.right)):
            if not isinstance(distance, int) or isinstance(distance, bool) or distance < -1:
                raise ValueError(f"{name} must be an int >= -1 (-1 = unlimited), got {distance!r}.")
            if distance >= 2**30:  # no sequence is that long, and positions in int32 would wrap
                object.__setattr__(self, name, -1)
        if isinstance(self.offset, bool):
            raise TypeError("offset must be an int or an integer array, got a bool.")
        if not isinstance(self.offset, int):
            object.__setattr__(self, "offset", int32(self.offset, "offset"))

    @property
    def is_prefix(self) -> bool:
        return self.left < 0 and self.right < 0

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        position = q_idx + spread(self.offset)  # bounds on the query's side: a tile's key indices may be constants
        if self.left < 0 and self.right < 0:
            return k_idx - position == k_idx - position
        if self.left < 0:
            return k_idx <= position + self.right
        if self.right < 0:
            return k_idx >= position - self.left
        return (k_idx >= position - self.left) & (k_idx <= position + self.right)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo = 0 if self.left < 0 else clip(q_lo + self.offset - self.left, S)
        hi = S if self.right < 0 else clip(q_hi + self.offset + self.right, S)
        return lo, maximum(lo, hi)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo = 0 if self.left < 0 else clip(q_hi - 1 + self.offset - self.left, S)
        hi = S if self.right < 0 else clip(q_lo + self.offset + self.right + 1, S)
        return lo, maximum(lo, hi)

    def seen_from(self, q0: Index, k0: Index) -> Band:
        return Band(self.left, self.right, less(self.offset, k0 - q0))

    def transposed(self) -> Band:
        return Band(self.right, self.left, -self.offset)


def causal(offset: Any = 0) -> Band:
    """Query q sees the keys up to and with `q + offset`: `keep = k <= q + offset`. An int, or an array with the batch dims.

    >>> causal().materialise(3, 5).astype(int)
    Array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0]], dtype=int32)
    """
    return Band(-1, 0, offset)


def sliding_window(left: int, right: int, offset: Any = 0) -> Band:
    """Query q sees the keys from `q + offset - left` to `q + offset + right`, inclusive; -1 = unlimited. See `Band`."""
    return Band(left, right, offset)


@dataclasses.dataclass(frozen=True)
class KeyLengths(Mask):
    """Only the keys `starts[b] <= k < lengths[b]` exist: padding behind (and, with `starts`, before) each sequence.

    Args:
        lengths: integer array with the call's batch dims, `(B,)`, or an int for all.
        starts: the same, default 0: the number of keys of left padding.

    >>> KeyLengths([2, 3]).materialise(1, 4).astype(int).tolist()
    [[[[1, 1, 0, 0]]], [[[1, 1, 1, 0]]]]
    """

    lengths: Any
    starts: Any = None
    arrays = ("lengths:0", "starts:0")

    def __post_init__(self) -> None:
        for name in ("lengths", "starts"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                object.__setattr__(self, name, int32(value, name))

    @property
    def is_prefix(self) -> bool:
        return self.starts is None

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        kept = k_idx + 0 * q_idx < spread(self.lengths)
        return kept if self.starts is None else kept & (k_idx >= spread(self.starts))

    def moved(self, by: Any) -> Mask:
        return _Between(None if self.starts is None else self.starts - by, self.lengths - by)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo = 0 if self.starts is None else clip(self.starts, S)
        return lo, maximum(lo, clip(self.lengths, S))

    full_range = kv_range

    def seen_from(self, q0: Index, k0: Index) -> KeyLengths:
        return KeyLengths(less(self.lengths, k0), None if self.starts is None else less(self.starts, k0))

    def transposed(self) -> QueryLengths:
        return QueryLengths(self.lengths, self.starts)


@dataclasses.dataclass(frozen=True)
class QueryLengths(Mask):
    """Only the queries `starts[b] <= q < lengths[b]` exist; the rows behind (and before) them attend to nothing, so they give 0.

    Args:
        lengths: integer array with the call's batch dims, `(B,)`, or an int for all.
        starts: the same, default 0: the number of rows of left padding.

    >>> QueryLengths(1).materialise(2, 3).astype(int).tolist()
    [[1, 1, 1], [0, 0, 0]]
    """

    lengths: Any
    starts: Any = None
    arrays = ("lengths:0", "starts:0")

    __post_init__ = KeyLengths.__post_init__

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        kept = q_idx + 0 * k_idx < spread(self.lengths)
        return kept if self.starts is None else kept & (q_idx >= spread(self.starts))

    def moved(self, by: Any) -> Mask:
        return _Between(None if self.starts is None else self.starts - by, self.lengths - by, of_queries=1)

    def queries(self, q_lo: Index, q_hi: Index) -> tuple[Index, Index]:
        return q_lo if self.starts is None else maximum(q_lo, self.starts), minimum(q_hi, self.lengths)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        some_lo, some_hi = self.queries(q_lo, q_hi)
        return 0, size_if(some_lo < some_hi, S)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        every = q_hi <= self.lengths
        return 0, size_if(every if self.starts is None else every & (q_lo >= self.starts), S)

    def seen_from(self, q0: Index, k0: Index) -> QueryLengths:
        return QueryLengths(less(self.lengths, q0), None if self.starts is None else less(self.starts, q0))

    def transposed(self) -> KeyLengths:
        return KeyLengths(self.lengths, self.starts)


@dataclasses.dataclass(frozen=True)
class _Between(Mask):
    """Lengths, moved: `lo <= index < hi` with bounds that broadcast with the indices as they are."""

    lo: Any
    hi: Any
    of_queries: int = 0

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        index = q_idx if self.of_queries else k_idx
        return index < self.hi if self.lo is None else (index < self.hi) & (index >= self.lo)
