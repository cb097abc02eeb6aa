"""Where each array of a request lies on the mesh: which axes divide its batch, its heads and its lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_sdpa.request import SdpaRequest

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which mesh axes divide batch and heads, and the one that is the call's own: that of the sequence. Hashable."""

    mesh: Any
    sequence: str
    batch: Axes = ()
    heads: Axes = ()

    def size(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def devices(self) -> int:
        """Of the sequence's axis."""
        return self.mesh.shape[self.sequence]

    def specs(self, request: SdpaRequest, *, queries: Axes, keys: Axes, heads: Axes, dense_rows: Axes) -> SdpaRequest:
        """The request with a PartitionSpec in place of each array.

        queries, keys: the axes over which the lengths of the queries, of the keys are divided; heads: those of the heads;
        dense_rows: those of the rows of a bias and a dense mask, whose columns are whole everywhere.
        """
        kv_heads = None if request.kv_heads == 1 else heads or None

        def entry(size: Any, axes: Axes | None) -> Any:
            return None if size == 1 or not axes else axes

        def laid_out(length: Axes, own_heads: Any) -> PartitionSpec:
            entries = [self.batch or None, own_heads, length or None, None]
            if request.spec.layout == "BLHE":
                entries[1:3] = entries[2:0:-1]
            return PartitionSpec(*entries)

        def spec(array: Any, *axes: Axes) -> PartitionSpec | None:
            return (
                None if array is None else PartitionSpec(*(entry(size, own) for size, own in zip(array.shape, axes, strict=True)))
            )

        masks = tuple(
            mask.local(
                lambda array: spec(array, self.batch),
                lambda ids: PartitionSpec(entry(ids.shape[0], self.batch), queries or None),
                lambda ids: PartitionSpec(entry(ids.shape[0], self.batch), keys or None),
            )
            for mask in request.masks
        )
        return SdpaRequest(
            query=laid_out(queries, heads or None),
            key=laid_out(keys, kv_heads),
            value=laid_out(keys, kv_heads),
            bias=spec(request.bias, self.batch, heads, dense_rows, ()),
            keep_mask=spec(request.keep_mask, self.batch, heads, dense_rows, ()),
            masks=masks,
            scale=spec(request.scale, self.batch),
            sinks=spec(request.sinks, self.batch, heads),
            dropout_seeds=spec(request.dropout_seeds, self.batch, heads, ()),
            spec=request.spec,
        )

    def out_specs(self, request: SdpaRequest, *, queries: Axes, heads: Axes) -> tuple[PartitionSpec, PartitionSpec]:
        """Those of out and lse."""
        entries = [self.batch or None, heads or None, queries or None]
        out = entries if request.spec.layout == "BHLE" else [entries[0], entries[2], entries[1]]
        return PartitionSpec(*out, None), PartitionSpec(*entries)

    def placed(self, arrays: Sequence[Any], specs: Sequence[PartitionSpec]) -> list[Any]:
        """The arrays where the specs say. `shard_map` moves them there itself, but not what explicit axes divide."""
        found = []
        for array, spec in zip(arrays, specs, strict=True):
            mesh = jax.typeof(array).sharding.mesh
            found.append(jax.sharding.reshard(array, NamedSharding(mesh, spec)) if mesh.explicit_axes else array)
        return found

    def summed(self, array: jax.Array, spec: PartitionSpec, over: Axes) -> jax.Array:
        """The cotangent of an operand that lies as `spec` says: the sum over those axes of `over` that do not divide it."""
        own = {axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
        axes = tuple(axis for axis in over if axis not in own)
        return lax.psum(array, axes) if axes else array


def leaves(specs: SdpaRequest) -> list[PartitionSpec]:
    """The PartitionSpecs in the order of the request's arrays."""
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
