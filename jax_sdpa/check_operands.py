"""The arrays of a call: what counts as one, the dtypes of query, key and value, and the scales of keys and values of 8 bits."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sdpa import compat
from jax_sdpa.request import EIGHT_BITS

DTYPES = ("float16", "bfloat16", "float32", "float64")


def as_array(x: Any, name: str) -> jax.Array:
    """A JAX array for an array-like operand; float64 is never silently halved."""
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        hint = " Convert it first: jnp.asarray(tensor.numpy())." if type(x).__module__.startswith("torch") else ""
        raise TypeError(f"{name} must be a JAX or NumPy array, got {type(x).__name__}.{hint}")
    if x.dtype == np.float64 and not compat.x64_enabled():
        raise TypeError(
            f"{name} is float64, which JAX would silently turn into float32: call jax.config.update('jax_enable_x64', True), "
            f"or pass {name}.astype(np.float32)."
        )
    return jnp.asarray(x)


def operands(
    query: Any, key: Any, value: Any, least_rank: int, key_scale: Any = None, value_scale: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """query, key and value as arrays of one dtype; key and value of 8 bits where they have scales."""
    arrays = as_array(query, "query"), as_array(key, "key"), as_array(value, "value")
    q, k, v = arrays
    if key_scale is not None or value_scale is not None:
        _check_eight_bits(k, v, key_scale, value_scale)
    elif not (q.dtype == k.dtype == v.dtype):
        narrow = k.dtype.name in EIGHT_BITS and v.dtype.name in EIGHT_BITS
        fix = " Keys and values of 8 bits need key_scale and value_scale, of a call that takes them." if narrow else ""
        raise TypeError(
            "Expected query, key and value to have the same dtype, but got "
            f"query.dtype: {q.dtype}, key.dtype: {k.dtype} and value.dtype: {v.dtype} instead. Cast them to one.{fix}"
        )
    if q.dtype.name not in DTYPES:
        raise TypeError(f"Expected query, key and value of dtype {', '.join(DTYPES)}, but got {q.dtype}. Cast them first.")
    if min(q.ndim, k.ndim, v.ndim) < least_rank:
        raise ValueError(
            f"Expected query, key and value to all be at least {least_rank} dimensional, but got query.ndim: {q.ndim}, "
            f"key.ndim: {k.ndim} and value.ndim: {v.ndim} instead."
        )
    return arrays


def _check_eight_bits(k: jax.Array, v: jax.Array, key_scale: Any, value_scale: Any) -> None:
    if key_scale is None or value_scale is None:
        given, other = ("value_scale", "key_scale") if key_scale is None else ("key_scale", "value_scale")
        raise ValueError(f"key_scale and value_scale go together, got {given} without {other}.")
    if k.dtype != v.dtype or k.dtype.name not in EIGHT_BITS:
        raise TypeError(
            f"Expected key and value of one dtype, {' or '.join(EIGHT_BITS)}, with key_scale and value_scale, but got key.dtype: "
            f"{k.dtype} and value.dtype: {v.dtype}. Without scales they have the query's dtype."
        )


def with_one_batch(array: jax.Array, batch: tuple[Any, ...]) -> jax.Array:
    """(…, *core), as many leading dims as the batch has, each 1 or its own -> (1|B, *core)."""
    if len(batch) == 1:
        return array
    own, core = array.shape[: len(batch)], array.shape[len(batch) :]
    if all(size == 1 for size in own):
        return jnp.reshape(array, (1, *core))
    return jnp.reshape(jnp.broadcast_to(array, (*batch, *core)), (math.prod(batch), *core))


def scales_of_keys(scale: Any, name: str, batch: tuple[Any, ...], heads: Any, repeated: Any, length: Any) -> jax.Array:
    """Scales that broadcast into (*batch, heads, length) as (1|B, 1|repeated, 1|length); heads: those that the caller's array has,
    repeated: as many as they are repeated to."""
    scale = as_array(scale, name)
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"{name} must be a float array, got {scale.dtype}.")
    full = (*batch, heads, length)
    fits = scale.ndim <= len(full) and all(own in (1, size) for own, size in zip(scale.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise ValueError(
            f"{name} must broadcast into {full} (batch..., heads, keys; with a block_table pages, heads, rows of a page) without "
            f"enlarging it, got {tuple(scale.shape)}. Heads stand before keys in either layout."
        )
    scale = with_one_batch(jnp.reshape(scale, (1,) * (len(full) - scale.ndim) + scale.shape), batch)
    return scale if scale.shape[1] in (1, repeated) else jnp.repeat(scale, repeated // scale.shape[1], axis=1)
