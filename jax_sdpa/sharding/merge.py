"""Attention over parts of the keys, put together: each part's result counts by its share of the softmax's sum, exp(lse).

    lse = log(exp(lse_a) + exp(lse_b))        out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

In float32 (float64). A row that a part shows no key has lse = -inf there and counts for nothing; one that no part shows any keeps
out = 0 and lse = -inf. Source: FlashAttention's split over keys (arXiv:2205.14135, section 3.1); Ring Attention (arXiv:2310.01889).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa.implementations.scores import beside_out
from jax_sdpa.request import SdpaRequest

State = tuple[jax.Array, jax.Array]  # out in the layout of the queries and lse (B, Hq, L), both float32 or float64


def nothing(request: SdpaRequest) -> State:
    """Before any key."""
    dtype = jnp.promote_types(request.query.dtype, jnp.float32)
    return jnp.zeros(request.out_shape, dtype), jnp.full(request.lse_shape, -jnp.inf, dtype)


def largest(bias: jax.Array | None) -> Any:
    """The largest number of each row of a bias, (B|1, Hq|1, L|1, 1) in float32 (float64), 0 where it is not finite; no gradient.

    Taken off before results are merged: the lse of a row of -1e9 would have lost the logarithm of its sum.
    """
    if bias is None:
        return None
    found = jnp.max(lax.stop_gradient(bias), 3, keepdims=True).astype(jnp.promote_types(bias.dtype, jnp.float32))
    return jnp.where(jnp.isfinite(found), found, 0)


def bias_less(bias: jax.Array | None, top: Any) -> Any:
    """bias with the largest numbers of its rows taken off."""
    return None if bias is None else bias.astype(top.dtype) - top


def sinks_less(sinks: jax.Array | None, top: Any) -> Any:
    """sinks (B|1, Hq) as what they are beside scores whose bias comes less `top`: (B|1, Hq, L|1)."""
    return None if sinks is None else sinks[:, :, None] if top is None else sinks[:, :, None] - top[..., 0]


def whole(lse: jax.Array, top: Any) -> jax.Array:
    """lse with what was taken off."""
    return lse if top is None else lse + jnp.broadcast_to(top[..., 0], lse.shape).astype(lse.dtype)


def _share(lse: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.exp(lse - jnp.where(jnp.isneginf(total), 0, total))


def merged(a: State, b: State, heads_axis: int) -> State:
    """Two parts as one."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(jnp.isneginf(top), 0, top)
    total = top + jnp.log(jnp.exp(lse_a - top) + jnp.exp(lse_b - top))
    share_a, share_b = (beside_out(_share(lse, total), heads_axis) for lse in (lse_a, lse_b))
    return out_a * share_a + out_b.astype(out_a.dtype) * share_b, total


def with_sinks(state: State, sinks: jax.Array | None, heads_axis: int) -> State:
    """The sinks of a softmax, (B|1, Hq, L|1): keys without a value, and once for all parts."""
    if sinks is None:
        return state
    out, lse = state
    sinks = jnp.broadcast_to(sinks, lse.shape).astype(lse.dtype)
    return merged(state, (jnp.zeros_like(out), sinks), heads_axis)


def over_devices(out: jax.Array, lse: jax.Array, sinks: jax.Array | None, axis_name: str, heads_axis: int) -> State:
    """The parts that the devices of a mesh axis hold as one, on each of them; differentiable.

    Two sums over the devices, of as many numbers as out and lse have, after one maximum of lse: no key travels.
    """
    top = lax.pmax(lax.stop_gradient(lse), axis_name)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, lse.shape).astype(lse.dtype)
        top = jnp.maximum(top, lax.stop_gradient(sinks))
    top = jnp.where(jnp.isneginf(top), 0, top)
    share = jnp.exp(lse - top)
    out, total = lax.psum((out.astype(lse.dtype) * beside_out(share, heads_axis), share), axis_name)
    total = total if sinks is None else total + jnp.exp(sinks - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return out / beside_out(total, heads_axis), jnp.where(empty, -jnp.inf, top + jnp.log(total))
