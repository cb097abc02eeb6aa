"""The call as one frozen value, and the value as the backends read it. `check.py` makes it from a user's arguments.

Canonical form: q (B, Hq, L, E), k (B, H, S, E), v (B, H, S, Ev) in the memory layout they came in; every other array has a
leading dim of 1 or B. So a mapped axis folds into the batch, a mesh axis shards it, and nobody below asks for ranks again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_sdpa.context import Allowed
from jax_sdpa.masks import Mask, conjunction

DIFFERENTIABLE = ("query", "key", "value", "bias", "scale", "sinks")
"""The operands that have cotangents, in the order in which they are listed everywhere."""

EIGHT_BITS = ("int8", "float8_e4m3fn")
"""The dtypes of keys and values that have scales."""

SCALES = ("key_scale", "value_scale")


@dataclasses.dataclass(frozen=True)
class SdpaSpec:
    """Everything about a call that is known while tracing; hashable, part of the primitive's parameters."""

    layout: str  # 'BHLE' (torch's face) or 'BLHE' (JAX's)
    allowed: Allowed  # what the caller allowed when the call was traced; the backward keeps to it
    scale: float | None  # None: a traced scale, among the operands
    softcap: float | None = None
    dropout_p: float = 0.0
    precision: str = "highest"  # of float32 products
    low_precision_math: bool = False  # torch's allow_fp16_bf16_reduction_math_sdp
    returns_lse: bool = False  # the caller asked for lse, so it may get a cotangent
    device: str | None = None  # an assumed device
    wrt: tuple[str, ...] = ()  # the operands that are being differentiated: a backend must be able to
    part: bool = False  # of the keys of a softmax: out and lse in the backward are those of all its keys
    longest_query: int | None = None  # of the sequences packed in a row: a row block wider than that sees several sequences' keys
    batch_invariant: bool = False  # a sequence must get the same bits alone and in any batch
    static_loops: bool = False  # loops with static bounds only: those are reverse-differentiable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SdpaRequest:
    """One attention call: `softmax(softcap(scale * q @ k.T) + bias, kept keys only) @ v`, with dropout on the probabilities.

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) for layout 'BHLE', with heads behind lengths for 'BLHE';
    bias, float, and keep_mask, bool (B|1, Hq|1, L|1, S|1); masks, structured ones with (B|1, …) arrays; scale (B|1,);
    sinks (B|1, Hq); dropout_seeds uint32 (B|1, Hq|1, 2), or 4 (`dropout.seeds_at`). What is absent is None.

    With pages, int32 (B, n), key and value are pools (pages, page, H, E) and (pages, page, H, Ev) in layout 'BLHE': key j of batch
    entry b is row j % page of page pages[b, j // page], S = n * page; entries whose keys the masks hide may be anything. For
    inference: such a request has no derivative.

    With key_scale and value_scale, float (B|1, H|1, S|1), key and value are of `EIGHT_BITS` and stand for what `dequantised` makes
    of them; with pages the scales are (pages|1, H|1, page|1). Such keys, values and scales have no derivative.
    """

    query: Any
    key: Any
    value: Any
    bias: Any = None
    keep_mask: Any = None
    masks: tuple[Mask, ...] = ()
    scale: Any = None
    sinks: Any = None
    dropout_seeds: Any = None
    pages: Any = None
    key_scale: Any = None
    value_scale: Any = None
    spec: SdpaSpec = dataclasses.field(default=None, metadata={"static": True})  # type: ignore[assignment]

    @property
    def heads_axis(self) -> int:
        return 1 if self.spec.layout == "BHLE" else 2

    @property
    def length_axis(self) -> int:
        return 3 - self.heads_axis

    @property
    def batch(self) -> Any:
        return self.query.shape[0]

    @property
    def q_heads(self) -> Any:
        return self.query.shape[self.heads_axis]

    @property
    def kv_heads(self) -> Any:
        return self.key.shape[self.heads_axis]

    @property
    def query_len(self) -> Any:
        return self.query.shape[self.length_axis]

    @property
    def key_len(self) -> Any:
        length = self.key.shape[self.length_axis]
        return length if self.pages is None else self.pages.shape[1] * length

    @property
    def head_dim(self) -> Any:
        return self.query.shape[3]

    @property
    def value_head_dim(self) -> Any:
        return self.value.shape[3]

    @property
    def group(self) -> Any:
        """Query heads per key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def out_shape(self) -> tuple[Any, ...]:
        return (*self.query.shape[:3], self.value_head_dim)

    @property
    def lse_shape(self) -> tuple[Any, ...]:
        return (self.batch, self.q_heads, self.query_len)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of its operands that have cotangents."""
        fixed = () if self.key_scale is None else ("key", "value")
        return tuple(name for name in DIFFERENTIABLE if getattr(self, name) is not None and name not in fixed)

    @property
    def mask(self) -> Mask:
        """The conjunction of the structured masks."""
        return conjunction(self.masks)

    def with_spec(self, **changes: Any) -> SdpaRequest:
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **changes))

    def gathered(self) -> SdpaRequest:
        """The same call without pages: every sequence's keys and values in a row, a copy of S of them for each."""
        if self.pages is None:
            return self
        shape = (self.batch, self.key_len)
        key, value = (taken(pool, self.pages).reshape(*shape, *pool.shape[2:]) for pool in (self.key, self.value))
        scales = {} if self.key_scale is None else {name: self._gathered_scales(getattr(self, name)) for name in SCALES}
        return dataclasses.replace(self, key=key, value=value, pages=None, **scales)

    def _gathered_scales(self, scale: jax.Array) -> jax.Array:
        """(pages|1, H|1, page|1) -> (B|1, H|1, S|1)."""
        pages, page = self.key.shape[:2]
        if scale.shape[0] == scale.shape[2] == 1:
            return scale
        found = taken(jnp.broadcast_to(scale, (pages, scale.shape[1], page)), self.pages)  # (B, n, H|1, page)
        return jnp.swapaxes(found, 1, 2).reshape(self.batch, scale.shape[1], self.key_len)

    def dequantised(self) -> SdpaRequest:
        """The same call without scales, keys and values copied in the query's dtype: float32(key) * key_scale, rounded once."""
        if self.key_scale is None:
            return self
        wide = jnp.promote_types(self.query.dtype, jnp.float32)

        def widened(x: jax.Array, scale: jax.Array) -> jax.Array:
            beside = scale if self.heads_axis == 1 else jnp.swapaxes(scale, 1, 2)
            return (x.astype(wide) * beside[..., None].astype(wide)).astype(self.query.dtype)

        key, value = widened(self.key, self.key_scale), widened(self.value, self.value_scale)
        return dataclasses.replace(self, key=key, value=value, key_scale=None, value_scale=None)


def taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], where an index outside stands for any entry: it is hidden."""
    if x.shape[0] == 0:
        return jnp.zeros((*index.shape, *x.shape[1:]), x.dtype)
    return jnp.take(x, index, axis=0, mode="clip")
