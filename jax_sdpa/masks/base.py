"""What every mask is, and how masks combine: `Mask`, arrays as masks, and the conjunction `&`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

Index = Any  # a Python int or an integer array
BatchShape = tuple[int, ...]


def minimum(a: Index, b: Index) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def maximum(a: Index, b: Index) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def clip(x: Index, S: Index) -> Index:
    return minimum(maximum(x, 0), S)


def size_if(condition: Any, size: Index) -> Index:
    """size where the condition holds, else 0; int32, as all positions in arrays, also under jax_enable_x64."""
    if isinstance(condition, bool):
        return size if condition else 0
    return jnp.where(condition, np.int32(size) if isinstance(size, int) else jnp.asarray(size, jnp.int32), np.int32(0))


def less(x: Any, by: Index) -> Any:
    """x - by for a number, or a number per batch entry, with a batch dim wherever it is an array."""
    if isinstance(x, int) and isinstance(by, int):
        return x - by
    return (jnp.atleast_1d(jnp.asarray(x, jnp.int32)) - jnp.asarray(by, jnp.int32)).astype(jnp.int32)


def spread(x: Any) -> Any:
    """A value per batch entry, (...) -> (..., 1, 1, 1), to stand beside (heads, queries, keys)."""
    return x if isinstance(x, int) or x.ndim == 0 else x[..., None, None, None]


def flatten_batch(x: Any, core_rank: int, batch: BatchShape, name: str) -> jax.Array:
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


def int32(x: Any, name: str) -> Any:
    """An integer array as int32, so that positions of any length can be compared with it; a list counts as an array."""
    x = np.asarray(x) if isinstance(x, (list, tuple)) else x
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {getattr(x, 'dtype', type(x).__name__)}.")
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x, jnp.int32)


class Mask:
    """What every mask is: a frozen pytree that combines with `&` and answers the questions of this package's docstring."""

    __array_ufunc__ = None  # numpy_array & mask comes to __rand__

    arrays: tuple[str, ...] = ()  # the fields that hold arrays, with their rank less the batch dims: "name:rank"
    title: ClassVar[str]  # what a user knows it by: its own name, where it does not say another

    def __init_subclass__(cls) -> None:
        """Every kind of mask is a pytree: its arrays are children, ints and absent fields are static."""
        cls.title = cls.__dict__.get("title", cls.__name__)

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
                changed[name] = flatten_batch(array, int(rank), batch, f"{self.title}.{name}")
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

    def seen_from(self, q0: Index, k0: Index) -> Mask:
        """The mask of a part of the call, whose queries count from q0 and whose keys from k0, ints or traced scalars:
        `seen_from(q0, k0).keep(q, k) == keep(q0 + q, k0 + k)`. Ids of positions are to be the part's own already (`local`)."""
        raise NotImplementedError

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

    slides = False
    """Whether `kv_range` is arithmetic on q_lo and q_hi that takes a number per batch entry for them."""

    def queries(self, q_lo: Index, q_hi: Index) -> tuple[Index, Index]:
        """Those of the block [q_lo, q_hi) that exist; none where the second is no larger than the first."""
        return q_lo, q_hi

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

    >>> from jax_sdpa.masks import KeyLengths, causal
    >>> (causal() & KeyLengths(2)).materialise(3, 3).astype(int)
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

    def seen_from(self, q0: Index, k0: Index) -> And:
        return And(tuple(mask.seen_from(q0, k0) for mask in self.masks))

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
        """Where it slides with the queries, that of those that exist: what is past the last one's is nobody's, and may be NaN."""
        some_lo, some_hi = q_lo, q_hi
        for mask in self.masks:
            some_lo, some_hi = mask.queries(some_lo, some_hi)
        return _common((mask.kv_range(*((some_lo, some_hi) if mask.slides else (q_lo, q_hi)), L, S) for mask in self.masks), S)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return _common((mask.full_range(q_lo, q_hi, L, S) for mask in self.masks), S)

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


def _common(ranges: Iterable[tuple[Index, Index]], S: Index) -> tuple[Index, Index]:
    lo, hi = 0, S
    for own_lo, own_hi in ranges:
        lo, hi = maximum(lo, own_lo), minimum(hi, own_hi)
    return lo, maximum(lo, hi)


def as_mask(value: Any) -> Mask:
    """A mask for what may stand beside `&`: a mask, or a bool or float array."""
    if isinstance(value, Mask):
        return value
    if isinstance(value, (jax.Array, np.ndarray)) and (value.dtype == bool or jnp.issubdtype(value.dtype, jnp.floating)):
        return Dense(value)
    raise TypeError(
        f"a mask combines with masks and with bool or float arrays, got {getattr(value, 'dtype', type(value).__name__)}."
    )
