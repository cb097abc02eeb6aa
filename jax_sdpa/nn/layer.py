"""A decoder's (or encoder's) attention layer for flax.nnx: projections, rotation, the cache, and one call of the engine."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jax_sdpa.functional import dot_product_attention
from jax_sdpa.masks import Band, KeyLengths, Mask, SegmentIds, as_mask, conjunction
from jax_sdpa.nn.cache import Chunk, KVCache
from jax_sdpa.nn.rope import Rope, positions_in_segments


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which mesh axes the batch and the heads (and features between two products) are divided among; None = neither.

    Names of axes of the mesh that `jax.set_mesh` has set when a layer is made and called.
    """

    data: str | None = "data"
    tensor: str | None = "tensor"


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, divided among the axes of the current mesh: by a constraint for automatic axes, by resharding for explicit ones."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(axis is None for axis in axes):
        return x
    if mesh.empty:
        raise _no_mesh(axes)
    explicit = AxisType.Explicit in mesh.axis_types
    return (jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint)(x, PartitionSpec(*axes))


def _no_mesh(axes: Any) -> ValueError:
    return ValueError(f"mesh axes {axes} are asked for, but there is no mesh: wrap the call in `with jax.set_mesh(mesh)`.")


class Attention(nnx.Module):
    """Self-attention as decoders have it: grouped heads, RoPE, q/k norm, window, softcap, sinks, packing, a KV cache.

    ::

        q, k, v = x @ W_q, x @ W_k, x @ W_v                          # + biases; heads split off
        q, k = rope(norm(q), positions), rope(norm(k), positions)
        out = attention(q, cache + k, cache + v, causal & window & lengths & segments & mask)
        return out @ W_o

    Args:
        features: size F of the input and the output.
        q_heads, kv_heads: query heads, and key/value heads (a divisor; default: as many).
        head_dim, value_head_dim: default F / q_heads, and head_dim.
        rope: a `Rope`, or None.
        qk_norm: RMS norm, with a learned scale, over the head dim of q and k before the rotation (Qwen 3).
        window: a query sees itself and the window - 1 keys before it (Mistral, Gemma); without `is_causal` as many behind it.
        softcap: as in Gemma 2. sinks: a learned logit per query head without a value, as in gpt-oss.
        is_causal: False for an encoder.
        scale: default 1 / sqrt(head_dim).
        dropout_rate: of attention weights, while training (`deterministic=False`); the key comes from `rngs.dropout`.
        qkv_bias, out_bias: biases of the projections.
        dtype, param_dtype: of the computation (None: as the input and the parameters promote) and of the parameters.
        precision: of the projections.
        mesh_axes: a `MeshAxes`: parameters, heads and the cache are then divided among the mesh that is set. Key/value heads
            that the tensor axis does not divide are kept whole on each device, and repeated for the query heads there.
        rngs: `nnx.Rngs` with "params", and "dropout" where there is dropout.

    Call: `layer(x)` with x (..., L, F) gives (..., L, F); `layer(x, cache=cache)` with x (B, L, F) appends L tokens to the cache
    and gives (out, cache): prefill, chunked prefill (L > 1) and decode (L = 1) are one such call each.

    A query that may attend to nothing, and padding, gives 0 before the output projection.

    >>> layer = Attention(64, q_heads=8, kv_heads=2, rope=Rope(), rngs=nnx.Rngs(0))
    >>> out, cache = layer(jnp.ones((2, 5, 64)), cache=layer.make_cache(2, 16))
    >>> out, cache = layer(jnp.ones((2, 1, 64)), cache=cache)
    >>> out.shape, cache.lengths.tolist()
    ((2, 1, 64), [6, 6])
    """

    def __init__(
        self,
        features: int,
        q_heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        *,
        rope: Rope | None = None,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        is_causal: bool = True,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 (a pure function)
        mesh_axes: MeshAxes | None = None,
        rngs: nnx.Rngs,
    ):
        self.features, self.q_heads = features, q_heads
        self.kv_heads = q_heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or q_heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide q_heads, got {self.kv_heads} and {q_heads}.")
        if head_dim is None and features % q_heads:
            raise ValueError(f"features must be a multiple of q_heads where head_dim is not given, got {features} and {q_heads}.")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 (the query's own key), got {window}.")
        self.head_dim = features // q_heads if head_dim is None else head_dim
        self.value_head_dim = self.head_dim if value_head_dim is None else value_head_dim
        self.rope, self.window, self.softcap, self.is_causal, self.scale = rope, window, softcap, is_causal, scale
        self.dropout_rate, self.dtype, self.param_dtype = dropout_rate, dtype, param_dtype
        self.mesh_axes = mesh_axes
        self.axes = axes = _Axes.of(mesh_axes, q_heads, self.kv_heads)

        def project(heads: int, size: int, axis: str | None) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                features, (heads, size), use_bias=qkv_bias, dtype=dtype, param_dtype=param_dtype, precision=precision,
                kernel_init=kernel_init, kernel_metadata=axes.metadata(None, axis, None),
                bias_metadata=axes.metadata(axis, None), rngs=rngs,
            )  # fmt: skip

        self.query = project(q_heads, self.head_dim, axes.q)
        self.key = project(self.kv_heads, self.head_dim, axes.kv)
        self.value = project(self.kv_heads, self.value_head_dim, axes.kv)
        self.out = nnx.LinearGeneral(
            (q_heads, self.value_head_dim), features, axis=(-2, -1), use_bias=out_bias, dtype=dtype, param_dtype=param_dtype,
            precision=precision, kernel_init=kernel_init, kernel_metadata=axes.metadata(axes.q, None, None),
            bias_metadata=axes.metadata(None), rngs=rngs,
        )  # fmt: skip
        norm = {"epsilon": norm_epsilon, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query_norm = nnx.data(nnx.RMSNorm(self.head_dim, **norm) if qk_norm else None)
        self.key_norm = nnx.data(nnx.RMSNorm(self.head_dim, **norm) if qk_norm else None)
        self.sinks = nnx.data(nnx.Param(jnp.zeros(q_heads, param_dtype), **axes.metadata(axes.q)) if sinks else None)
        self.rngs = nnx.data(rngs.dropout.fork() if dropout_rate > 0 else None)

    def make_cache(self, batch: int, length: int, dtype: Any = None) -> KVCache:
        """An empty cache for `batch` sequences of at most `length` tokens each: a ring where the window is shorter.

        dtype: of the keys and values; default: the layer's dtype, or its parameters'. int8 or float8_e4m3fn: in 8 bits, with a
            float32 scale per token and head; see `KVCache` for what that loses.
        """
        if not self.is_causal:
            raise ValueError("a cache is for causal attention: an encoder's later tokens change what earlier ones see.")
        dtype = dtype or self.dtype or self.param_dtype
        cache = KVCache.empty(batch, length, self.kv_heads, self.head_dim, self.value_head_dim, dtype=dtype, window=self.window)
        return self._divided(cache)

    def __call__(
        self,
        x: jax.Array,
        *,
        cache: KVCache | None = None,
        lengths: Any = None,
        padding: str = "right",
        segment_ids: Any = None,
        positions: Any = None,
        mask: Any = None,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> Any:
        """The layer's output, and with a cache (output, the extended cache).

        Args:
            x: (..., L, F); with a cache (B, L, F).
            cache: from `make_cache`, or the one that the last call gave.
            lengths: integers (B,), 0 to L: how many of the L tokens exist, the others being padding; None = all. With a cache,
                padding is not stored, and a sequence with 0 keeps what it has.
            padding: the side of the padding, 'right' or 'left' (static).
            segment_ids: integers (..., L), the sequence that each token of a packed row belongs to, negative = padding. Rotary
                positions then begin anew with each one. Not with a cache.
            positions: integers (..., L) for the rotation, in place of those that follow from the above.
            mask: bool, broadcastable to (..., q_heads, L, L), or a structured mask; not with a cache.
            deterministic: False applies dropout, by the key of `rngs` or of the layer's own stream.
        """
        if cache is not None and (x.ndim != 3 or segment_ids is not None or mask is not None or not self.is_causal):
            raise ValueError(
                "a cache takes x of shape (B, L, F) and is causal; segment_ids and mask belong to training, without a cache."
            )
        if lengths is not None and (x.ndim != 3 or segment_ids is not None):
            raise ValueError(
                "lengths take x of shape (B, L, F), and are no part of packed rows: give padding a negative segment id."
            )
        L, axes = x.shape[-2], self.axes
        chunk = Chunk.of(x.shape[0], L, lengths, padding) if x.ndim == 3 else None
        if positions is None:
            positions = self._positions(x, chunk, cache, segment_ids)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        if x.ndim == 3:
            q, k, v = (constrain(y, axes.data, None, axis, None) for y, axis in ((q, axes.q), (k, axes.kv), (v, axes.kv)))
        after = overflow = k_scale = v_scale = None
        if cache is not None and chunk is not None:
            overflow = cache.overflows(chunk, L)
            q, k, v = (y.astype(q.dtype if cache.scaled else cache.key.dtype) for y in (q, k, v))
            after, (k, v, mask, k_scale, v_scale) = cache.extend(k, v, chunk, self.window)
            after = self._divided(after)
        else:
            mask = self._mask(chunk if lengths is not None else None, L, padding, segment_ids, mask)
        if axes.repeats > 1:  # each device of a tensor axis wider than the kv heads takes a copy of the one that it needs
            k, v = (constrain(jnp.repeat(y, axes.repeats, -2), axes.data, None, axes.q, None) for y in (k, v))
            if k_scale is not None and v_scale is not None:
                k_scale, v_scale = (constrain(jnp.repeat(y, axes.repeats, 1), axes.data, axes.q, None) for y in (k_scale, v_scale))
        dropout = self._dropout(deterministic, rngs)
        sinks = None if self.sinks is None else self.sinks[...]
        out = dot_product_attention(
            q, k, v, mask=mask, scale=self.scale, softcap=self.softcap, sinks=sinks,
            key_scale=k_scale, value_scale=v_scale, **dropout,
        )  # fmt: skip
        if lengths is not None and chunk is not None:
            out = jnp.where(chunk.exists(L)[:, :, None, None], out, 0)
        if overflow is not None:
            out = jnp.where(overflow[:, :, None, None], jnp.nan, out)
        if x.ndim == 3:
            out = constrain(out, axes.data, None, axes.q, None)
        out = self.out(out.astype(x.dtype) if self.dtype is None else out, out_sharding=axes.of_output(x.ndim))
        return out if after is None else (out, after)

    def _positions(self, x: jax.Array, chunk: Chunk | None, cache: KVCache | None, segment_ids: Any) -> jax.Array:
        L = x.shape[-2]
        if segment_ids is not None:
            return positions_in_segments(segment_ids)
        if chunk is None:
            return jnp.arange(L, dtype=jnp.int32)
        if cache is not None:
            return cache.positions(chunk, L)
        return jnp.arange(L, dtype=jnp.int32)[None] - chunk.first[:, None]

    def _mask(self, chunk: Chunk | None, L: int, padding: str, segment_ids: Any, mask: Any) -> Mask:
        """What a call without a cache may see."""
        before = -1 if self.window is None else self.window - 1
        parts: list[Mask] = [Band(before, 0 if self.is_causal else before)]
        if chunk is not None:
            parts.append(KeyLengths(chunk.count) if padding == "right" else KeyLengths(L, chunk.first))
        if segment_ids is not None:
            parts.append(SegmentIds(segment_ids))
        if mask is not None:
            parts.append(as_mask(mask))
        return conjunction(tuple(parts))

    def _dropout(self, deterministic: bool, rngs: Any) -> dict[str, Any]:
        if deterministic or self.dropout_rate == 0.0:
            return {}
        source = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        if source is None:
            raise ValueError("dropout needs a stream of keys: pass rngs=nnx.Rngs(dropout=...).")
        return {"dropout_p": self.dropout_rate, "dropout_rng": source()}

    def _divided(self, cache: KVCache) -> KVCache:
        axes = self.axes
        key, value = (constrain(x, axes.data, None, axes.kv, None) for x in (cache.key, cache.value))
        key_scale, value_scale = (
            None if x is None else constrain(x, axes.data, axes.kv, None) for x in (cache.key_scale, cache.value_scale)
        )
        lengths = constrain(cache.lengths, axes.data)
        return dataclasses.replace(cache, key=key, value=value, lengths=lengths, key_scale=key_scale, value_scale=value_scale)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The mesh axes of the batch, of query heads and of key/value heads."""

    data: str | None = None
    q: str | None = None
    kv: str | None = None
    repeats: int = 1

    @classmethod
    def of(cls, axes: MeshAxes | None, q_heads: int, kv_heads: int) -> _Axes:
        if axes is None:
            return cls()
        if (mesh := jax.sharding.get_abstract_mesh()).empty:
            raise _no_mesh(axes)
        devices = 1 if axes.tensor is None else mesh.shape[axes.tensor]
        wanted = math.lcm(devices, kv_heads)  # heads, so that each device has the same number
        if q_heads % wanted:
            raise ValueError(f"q_heads must be a multiple of {wanted} for {kv_heads} kv_heads on {devices} devices, got {q_heads}.")
        return cls(axes.data, axes.tensor, axes.tensor if wanted == kv_heads else None, wanted // kv_heads)

    def of_output(self, rank: int) -> PartitionSpec | None:
        """How the output projection's sum over the heads is to be divided: to be said only where axes are explicit."""
        mesh = jax.sharding.get_abstract_mesh()
        if rank != 3 or self.q is None or AxisType.Explicit not in mesh.axis_types:
            return None
        return PartitionSpec(self.data, None, None)

    def metadata(self, *axes: str | None) -> dict[str, Any]:
        return {} if all(axis is None for axis in (self.data, self.q)) else {"out_sharding": axes}
