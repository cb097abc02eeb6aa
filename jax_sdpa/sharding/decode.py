"""Few queries against many keys, as in decoding: the keys stay cut over the devices, and every device has all the queries.

Each device attends to its own keys, with the mask moved to where they begin, and the results are merged by lse: sums over the
devices of as many numbers as out and lse have. No key travels; derivatives by JAX. Source: Flash-Decoding (Dao et al. 2023), over
devices instead of SMs. The largest number of a row's float bias is taken off first, as in `ring`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa import dropout, primitive
from jax_sdpa.implementations import scores
from jax_sdpa.request import SdpaRequest
from jax_sdpa.sharding import merge
from jax_sdpa.sharding.layout import MeshAxes, leaves


def attend(axes: MeshAxes, treedef: Any, arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """(out, lse), whole on every device of the axis."""
    request = jax.tree.unflatten(treedef, arrays)
    specs = axes.specs(request, queries=(), keys=(axes.sequence,), heads=axes.heads, dense_rows=())

    def local(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        request: SdpaRequest = jax.tree.unflatten(treedef, arrays)
        k0 = lax.axis_index(axes.sequence) * request.key_len
        L, S = request.query_len, request.key_len
        bias, keep = (scores.dense_tile(x, 0, L, k0, S) for x in (request.bias, request.keep_mask))
        top, seeds = merge.largest(request.bias), request.dropout_seeds
        part = dataclasses.replace(
            request,
            bias=merge.bias_less(bias, top),
            keep_mask=keep,
            masks=tuple(mask.seen_from(0, k0) for mask in request.masks),
            sinks=None,
            dropout_seeds=seeds if seeds is None else dropout.seeds_at(seeds, jnp.zeros_like(k0), k0),
        )
        out, lse = primitive.attend(part.with_spec(returns_lse=True))
        out, lse = merge.over_devices(out, lse, merge.sinks_less(request.sinks, top), axes.sequence, request.heads_axis)
        return out.astype(request.query.dtype), merge.whole(lse, top)

    out_specs = axes.out_specs(request, queries=(), heads=axes.heads)
    in_specs = tuple(leaves(specs))
    return jax.shard_map(local, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs)(*axes.placed(arrays, in_specs))
