"""All-to-all attention: from sequence-sharded to heads-sharded and back, and in between the engine's own call on whole sequences.

    (B, Hq, L/n, E)  all-to-all  (B, Hq/n, L, E)  attention  (B, Hq/n, L, Ev)  all-to-all  (B, Hq, L/n, Ev)

Four all-to-alls of 1/n of an operand each, whatever n is; every mask, dropout and sinks as on one device; derivatives by JAX. Fewer
key/value heads than devices are repeated until there is one for each. Source: DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa import primitive
from jax_sdpa.request import SdpaRequest
from jax_sdpa.sharding.layout import MeshAxes, leaves


def attend(axes: MeshAxes, treedef: Any, arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """(out, lse), the lengths of both divided over the axis as those of q, k and v are."""
    request, along = jax.tree.unflatten(treedef, arrays), (axes.sequence,)
    n, heads, length = axes.devices, request.heads_axis, request.length_axis
    specs = axes.specs(request, queries=(), keys=(), heads=(*axes.heads, axes.sequence), dense_rows=())
    lengths = axes.specs(request, queries=along, keys=along, heads=axes.heads, dense_rows=())
    specs = dataclasses.replace(specs, query=lengths.query, key=lengths.key, value=lengths.value)

    def to_heads(x: jax.Array) -> jax.Array:
        if x.shape[heads] % n:
            x = jnp.repeat(x, n // x.shape[heads], heads)
        return lax.all_to_all(x, axes.sequence, heads, length, tiled=True)

    def local(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        request: SdpaRequest = jax.tree.unflatten(treedef, arrays)
        q, k, v = (to_heads(x) for x in (request.query, request.key, request.value))
        out, lse = primitive.attend(dataclasses.replace(request, query=q, key=k, value=v))
        out = lax.all_to_all(out, axes.sequence, length, heads, tiled=True)
        return out, lax.all_to_all(lse, axes.sequence, 2, 1, tiled=True)

    out_specs = axes.out_specs(request, queries=along, heads=axes.heads)
    in_specs = tuple(leaves(specs))
    return jax.shard_map(local, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs)(*axes.placed(arrays, in_specs))
