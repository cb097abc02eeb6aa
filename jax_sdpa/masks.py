"""Which keys a query may attend to: small frozen values that combine with `&`, and nothing about any backend.

A structured mask is integer arithmetic on positions, never an L x S array. Every backend asks it the same four questions:

* `keep(q_idx, k_idx)`: may query q attend to key k? (True = takes part). Plain operators: NumPy, XLA and kernels alike.
* `kv_range(q_lo, q_hi, L, S)`: `[lo, hi)`, outside of which no query of `[q_lo, q_hi)` keeps any key: blocks out there are EMPTY.
* `full_range(q_lo, q_hi, L, S)`: `[lo, hi)`, inside of which every query of the block keeps every key: blocks in there are FULL.
* `key_valid(L, S)`: the keys that some query may see; the others never reach the result, whatever they hold, NaN included.

Ranges are Python ints where the mask is static (its blocks are then skipped while tracing) and arrays with the mask's batch
dims where it holds arrays (a loop bound). A new kind of mask is one class here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

Index = Any  # a Python int or an integer array
BatchShape = tuple[int, ...]


def _minimum(a: Index, b: Index) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _maximum(a: Index, b: Index) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _clip(x: Index, S: Index) -> Index:
    return _minimum(_maximum(x, 0), S)


def _if(condition: Any, size: Index) -> Index:
    """size where the condition holds, else 0; int32, as all positions in arrays, also under jax_enable_x64."""
    if isinstance(condition, bool):
        return size if condition else 0
    return jnp.where(condition, np.int32(size) if isinstance(size, int) else jnp.asarray(size, jnp.int32), np.int32(0))


def _spread(x: Any) -> Any:
    """A value per batch entry, (...) -> (..., 1, 1, 1), to stand beside (heads, queries, keys)."""
    return x if isinstance(x, int) or x.ndim == 0 else x[..., None, None, None]


def _flatten_batch(x: Any, core_rank: int, batch: BatchShape, name: str) -> jax.Array:
    """(*own batch dims, *core) -> (1 or prod(batch), *core): own batch dims must broadcast into the call's."""
    own, core = x.shape[: x.ndim - core_rank], x.shape[x.ndim - core_rank :]
    if len(own) > len(batch) or any(o not in (1, b) for o, b in zip(own[::-1], batch[::-1], strict=False)):
        raise ValueError(
            f"{name} must have batch dims that broadcast to the call's {batch}, got {own} (shape {x.shape}); "
            "give one entry per batch element."
        )
    if all(o == 1 for o in own):
        return jnp.reshape(x, (1, *core))
    size = 1
    for b in batch:
        size = size * b
    return jnp.reshape(jnp.broadcast_to(x, (*batch, *core)), (size, *core))


def _int32(x: Any, name: str) -> Any:
    """An integer array as int32, so that positions of any length can be compared with it; a list counts as an array."""
    x = np.asarray(x) if isinstance(x, (list, tuple)) else x
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {getattr(x, 'dtype', type(x).__name__)}.")
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x, jnp.int32)


class Mask:
    """What every mask is: a frozen pytree that combines with `&` and answers the questions of this module's docstring."""

    __array_ufunc__ = None  # numpy_array & mask comes to __rand__

    arrays: tuple[str, ...] = ()  # the fields that hold arrays, with their rank less the batch dims: "name:rank"

    def __init_subclass__(cls) -> None:
        """Every kind of mask is a pytree: its arrays are children, ints and absent fields are static."""

        def flatten(mask: Mask) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            fields = [getattr(mask, field.name) for field in dataclasses.fields(mask)]  # type: ignore[arg-type]
            is_data = tuple(field is not None and not isinstance(field, int) for field in fields)
            children = tuple(field for field, data in zip(fields, is_data, strict=True) if data)
            return children, (is_data, tuple(None if data else field for field, data in zip(fields, is_data, strict=True)))

        def unflatten(static: tuple[Any, ...], children: Any) -> Mask:
            mask, rest = object.__new__(cls), iter(children)  # no checks: JAX unflattens with placeholders too
            for field, data, value in zip(dataclasses.fields(cls), *static, strict=True):  # type: ignore[arg-type]
                object.__setattr__(mask, field.name, next(rest) if data else value)
            return mask

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)

    def __and__(self, other: Any) -> Mask:
        return And((self, as_mask(other)))

    def __rand__(self, other: Any) -> Mask:
        return And((as_mask(other), self))

    def parts(self, L: Index, S: Index) -> tuple[Mask, ...]:
        """The masks whose conjunction this is, checked against the call's lengths."""
        return (self,)

    def with_batch(self, batch: BatchShape) -> Self:
        """The same mask with one leading dim, 1 or prod(batch), on each of its arrays."""
        changed = {}
        for name, rank in (entry.split(":") for entry in self.arrays):
            array = getattr(self, name)
            if array is not None and not isinstance(array, int):
                changed[name] = _flatten_batch(array, int(rank), batch, f"{type(self).__name__}.{name}")
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[type-var]

    def padded(self, more_q: Index, more_k: Index) -> Mask:
        """The same mask for longer arrays, whose additional positions somebody else masks."""
        return self

    @property
    def is_prefix(self) -> bool:
        """Whether every query keeps the same keys, and these are the first ones: no block but their last one is cut."""
        return False

    def moved(self, by: Any) -> Mask:
        """The same mask for positions of queries and keys that both count from `by`."""
        return self

    def transposed(self) -> Mask:
        """The mask with queries and keys exchanged, `transposed().keep(k, q) == keep(q, k)`: its ranges of keys say which queries
        see a block of keys."""
        raise NotImplementedError

    def local(self, number: Callable[[Any], Any], by_query: Callable[[Any], Any], by_key: Callable[[Any], Any]) -> Self:
        """The mask of one tile in a kernel: each array with a number per batch entry replaced by `number(array)`, ids of
        queries and of keys by `by_query` and `by_key` of theirs. Nothing is checked: the arrays may be references to memory."""
        arrays, structure = jax.tree.flatten(self)
        return jax.tree.unflatten(structure, [number(array) for array in arrays])

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        raise NotImplementedError

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        raise NotImplementedError

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        raise NotImplementedError

    def key_valid(self, L: Index, S: Index) -> Any:
        """(batch..., S) or (S,) bool: the keys that some query of the call may see; None where that is all of them."""
        lo, hi = self.kv_range(0, L, L, S)
        if isinstance(lo, int) and isinstance(hi, int) and (lo, hi) == (0, S):
            return None
        rank = max(jnp.ndim(bound) for bound in (lo, hi))
        k_idx = jnp.arange(S).reshape((1,) * rank + (-1,))  # ranks match: numpy_rank_promotion may be forbidden
        lo, hi = (bound if isinstance(bound, int) or bound.ndim == 0 else bound[..., None] for bound in (lo, hi))
        return (k_idx >= lo) & (k_idx < hi)

    def materialise(self, L: int, S: int) -> jax.Array:
        """(L, S), or (batch..., 1, L, S) where the mask has batch dims: `keep` over aranges. For people and for MATH."""
        return jnp.asarray(self.keep(np.arange(L)[:, None], np.arange(S)[None, :]))


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

    def __post_init__(self) -> None:
        for name, distance in (("left", self.left), ("right", self.right)):
            if not isinstance(distance, int) or isinstance(distance, bool) or distance < -1:
                raise ValueError(f"{name} must be an int >= -1 (-1 = unlimited), got {distance!r}.")
            if distance >= 2**30:  # no sequence is that long, and positions in int32 would wrap
                object.__setattr__(self, name, -1)
        if isinstance(self.offset, bool):
            raise TypeError("offset must be an int or an integer array, got a bool.")
        if not isinstance(self.offset, int):
            object.__setattr__(self, "offset", _int32(self.offset, "offset"))

    @property
    def is_prefix(self) -> bool:
        return self.left < 0 and self.right < 0

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        position = q_idx + _spread(self.offset)  # bounds on the query's side: a tile's key indices may be constants
        if self.left < 0 and self.right < 0:
            return k_idx - position == k_idx - position
        if self.left < 0:
            return k_idx <= position + self.right
        if self.right < 0:
            return k_idx >= position - self.left
        return (k_idx >= position - self.left) & (k_idx <= position + self.right)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo = 0 if self.left < 0 else _clip(q_lo + self.offset - self.left, S)
        hi = S if self.right < 0 else _clip(q_hi + self.offset + self.right, S)
        return lo, _maximum(lo, hi)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo = 0 if self.left < 0 else _clip(q_hi - 1 + self.offset - self.left, S)
        hi = S if self.right < 0 else _clip(q_lo + self.offset + self.right + 1, S)
        return lo, _maximum(lo, hi)

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

    >>> KeyLengths(jnp.array([2, 3])).materialise(1, 4).astype(int).tolist()
    [[[[1, 1, 0, 0]]], [[[1, 1, 1, 0]]]]
    """

    lengths: Any
    starts: Any = None
    arrays = ("lengths:0", "starts:0")

    def __post_init__(self) -> None:
        for name in ("lengths", "starts"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                object.__setattr__(self, name, _int32(value, name))

    @property
    def is_prefix(self) -> bool:
        return self.starts is None

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        kept = k_idx + 0 * q_idx < _spread(self.lengths)
        return kept if self.starts is None else kept & (k_idx >= _spread(self.starts))

    def moved(self, by: Any) -> Mask:
        return _Between(None if self.starts is None else self.starts - by, self.lengths - by)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        lo = 0 if self.starts is None else _clip(self.starts, S)
        return lo, _maximum(lo, _clip(self.lengths, S))

    full_range = kv_range

    def transposed(self) -> QueryLengths:
        return QueryLengths(self.lengths, self.starts)


@dataclasses.dataclass(frozen=True)
class QueryLengths(Mask):
    """Only the queries `starts[b] <= q < lengths[b]` exist; the rows behind (and before) them attend to nothing, so they give 0.

    Args:
        lengths: integer array with the call's batch dims, `(B,)`, or an int for all.
        starts: the same, default 0: the number of rows of left padding.

    >>> QueryLengths(jnp.array(1)).materialise(2, 3).astype(int).tolist()
    [[1, 1, 1], [0, 0, 0]]
    """

    lengths: Any
    starts: Any = None
    arrays = ("lengths:0", "starts:0")

    __post_init__ = KeyLengths.__post_init__

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        kept = q_idx + 0 * k_idx < _spread(self.lengths)
        return kept if self.starts is None else kept & (q_idx >= _spread(self.starts))

    def moved(self, by: Any) -> Mask:
        return _Between(None if self.starts is None else self.starts - by, self.lengths - by, of_queries=1)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        some = q_lo < self.lengths
        return 0, _if(some if self.starts is None else some & (q_hi > self.starts), S)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        every = q_hi <= self.lengths
        return 0, _if(every if self.starts is None else every & (q_lo >= self.starts), S)

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


@dataclasses.dataclass(frozen=True)
class SegmentIds(Mask):
    """Packed sequences: query q sees the keys with its own id; a negative id is padding and takes part in nothing.

    Args:
        query: integer array (batch..., L).
        key: integer array (batch..., S); default: the query's ids (self-attention).

    >>> SegmentIds(jnp.array([0, 0, 1, -1])).materialise(4, 4).astype(int)
    Array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 0, 0]], dtype=int32)
    """

    query: Any
    key: Any = None
    arrays = ("query:1", "key:1")

    def __post_init__(self) -> None:
        if self.key is None:
            object.__setattr__(self, "key", self.query)
        for name in ("query", "key"):
            object.__setattr__(self, name, _int32(getattr(self, name), f"SegmentIds.{name}"))
            if getattr(self, name).ndim == 0:
                raise ValueError(f"SegmentIds.{name} must have one id per position, (batch..., length), got a scalar.")

    def parts(self, L: Index, S: Index) -> tuple[Mask, ...]:
        if (self.query.shape[-1], self.key.shape[-1]) != (L, S):
            raise ValueError(
                f"SegmentIds must have one id per query and per key, {L} and {S} here, got {self.query.shape[-1]} and "
                f"{self.key.shape[-1]}."
            )
        return (self,)

    def padded(self, more_q: Index, more_k: Index) -> Mask:
        def longer(ids: Any, more: Index) -> Any:
            return jax.lax.pad(jnp.asarray(ids), jnp.asarray(-1, ids.dtype), [(0, 0, 0)] * (ids.ndim - 1) + [(0, more, 0)])

        return SegmentIds(longer(self.query, more_q), longer(self.key, more_k))

    def local(self, number: Callable[[Any], Any], by_query: Callable[[Any], Any], by_key: Callable[[Any], Any]) -> Self:
        return jax.tree.unflatten(jax.tree.structure(self), [by_query(self.query), by_key(self.key)])

    def transposed(self) -> SegmentIds:
        return SegmentIds(self.key, self.query)

    @staticmethod
    def _at(ids: Any, index: Index) -> Any:
        taken = ids[..., index]  # (batch..., *index.shape)
        return taken if ids.ndim == 1 else jnp.expand_dims(taken, ids.ndim - 1)  # a heads dim behind the batch dims

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        q, k = self._at(self.query, q_idx), self._at(self.key, k_idx)
        return (q == k) & (q >= 0)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        """The stretch of keys between the first and the last whose id lies between the block's smallest and largest id."""
        position, big = jnp.arange(L), jnp.iinfo(self.query.dtype).max
        inside = (position >= q_lo) & (position < q_hi) & (self.query >= 0)
        smallest = jnp.where(inside, self.query, big).min(-1, keepdims=True)
        largest = jnp.where(inside, self.query, -1).max(-1, keepdims=True)
        hit = (self.key >= smallest) & (self.key <= largest)
        found = hit.any(-1)
        lo = jnp.where(found, jnp.argmax(hit, -1), 0)
        hi = jnp.where(found, S - jnp.argmax(hit[..., ::-1], -1), 0)
        return lo.astype(jnp.int32), hi.astype(jnp.int32)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return 0, 0  # which keys share the one id of a block would cost as much to find as to mask

    def key_valid(self, L: Index, S: Index) -> Any:
        """A key is seen if some query bears its id: in the sorted run of each id, queries come first; no L x S comparison."""
        query, key = jnp.asarray(self.query), jnp.asarray(self.key)
        batch = jnp.broadcast_shapes(query.shape[:-1], key.shape[:-1])
        query, key = (jnp.broadcast_to(ids, (*batch, ids.shape[-1])) for ids in (query, key))
        ids, axis = jnp.concatenate([query, key], -1), query.ndim - 1
        position = jax.lax.broadcasted_iota(jnp.int32, ids.shape, axis)
        ids, origin = jax.lax.sort((ids, position), num_keys=1, is_stable=True)
        first = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], -1)
        run = jax.lax.cummax(jnp.where(first, position, 0), axis)  # where each id's run begins
        seen = (jnp.take_along_axis(origin, run, -1) < L).astype(jnp.int32)
        return (jax.lax.sort((origin, seen), num_keys=1)[1][..., L:] == 1) & (key >= 0)


@dataclasses.dataclass(frozen=True)
class Dense(Mask):
    """An array as torch's `attn_mask`: bool (True = take part) or float (added to the scores), broadcast into (..., L, S)."""

    array: Any

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        if self.array.dtype != bool:
            raise TypeError("a float mask adds to the scores: it has no keep(); use its array.")
        array = self.array.reshape((1,) * (2 - self.array.ndim) + self.array.shape)
        return array[..., q_idx * (array.shape[-2] != 1), k_idx * (array.shape[-1] != 1)]


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """The conjunction of masks: a key takes part if every one of them keeps it (and every float part adds).

    >>> (causal() & KeyLengths(jnp.array(2))).materialise(3, 3).astype(int)
    Array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 0]], dtype=int32)
    """

    masks: tuple[Mask, ...]

    def parts(self, L: Index, S: Index) -> tuple[Mask, ...]:
        return tuple(part for mask in self.masks for part in mask.parts(L, S))

    def with_batch(self, batch: BatchShape) -> And:
        return And(tuple(mask.with_batch(batch) for mask in self.masks))

    @property
    def is_prefix(self) -> bool:
        return all(mask.is_prefix for mask in self.masks)

    def padded(self, more_q: Index, more_k: Index) -> And:
        return And(tuple(mask.padded(more_q, more_k) for mask in self.masks))

    def moved(self, by: Any) -> And:
        return And(tuple(mask.moved(by) for mask in self.masks))

    def transposed(self) -> And:
        return And(tuple(mask.transposed() for mask in self.masks))

    def local(self, number: Callable[[Any], Any], by_query: Callable[[Any], Any], by_key: Callable[[Any], Any]) -> And:
        return And(tuple(mask.local(number, by_query, by_key) for mask in self.masks))

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        kept = self.masks[0].keep(q_idx, k_idx)
        for mask in self.masks[1:]:
            kept = kept & mask.keep(q_idx, k_idx)
        return kept

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return self._common(Mask.kv_range.__name__, q_lo, q_hi, L, S)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return self._common(Mask.full_range.__name__, q_lo, q_hi, L, S)

    def _common(self, question: str, *block: Index) -> tuple[Index, Index]:
        lo, hi = 0, block[-1]
        for mask in self.masks:
            own_lo, own_hi = getattr(mask, question)(*block)
            lo, hi = _maximum(lo, own_lo), _minimum(hi, own_hi)
        return lo, _maximum(lo, hi)

    def key_valid(self, L: Index, S: Index) -> Any:
        """The keys that every part lets somebody see, and that lie in the common range of all queries."""
        answers: list[Any] = [mask.key_valid(L, S) for mask in self.masks] + [Mask.key_valid(self, L, S)]
        valid = None
        for answer in answers:
            if answer is not None and valid is not None:
                rank = max(valid.ndim, answer.ndim)  # ranks match: numpy_rank_promotion may be forbidden
                valid, answer = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (valid, answer))
                answer = valid & answer
            valid = valid if answer is None else answer
        return valid


EVERYTHING = Band()  # keeps every key


def conjunction(masks: tuple[Mask, ...]) -> Mask:
    """One mask for a request's parts: none, one or several."""
    return EVERYTHING if not masks else masks[0] if len(masks) == 1 else And(masks)


def as_mask(value: Any) -> Mask:
    """A mask for what may stand beside `&`: a mask, or a bool or float array."""
    if isinstance(value, Mask):
        return value
    if isinstance(value, (jax.Array, np.ndarray)) and (value.dtype == bool or jnp.issubdtype(value.dtype, jnp.floating)):
        return Dense(value)
    raise TypeError(
        f"a mask combines with masks and with bool or float arrays, got {getattr(value, 'dtype', type(value).__name__)}."
    )
