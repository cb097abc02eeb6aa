"""How a backend's program is cut over a mesh under plain `jit`: batch and heads stay where they are, nothing is gathered.

Left alone, XLA would gather the operands of a loop over heads, or of a kernel it cannot see into. `custom_partitioning` runs the
backend's own program on each device's part instead. The rule is written once, in labels per dim:

    b  batch            q  query heads      h  key/value heads      .  whole on every device
    B  one for the whole batch        Q  one for all query heads

Lengths and head dims are whole on every device, and so is what is shared; the cotangent of a shared operand is summed over the
devices that split the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_sdpa import compat
from jax_sdpa.request import SdpaRequest

Program = Callable[..., Sequence[jax.Array]]
Labels = str  # a letter per dim


def _labels(array: Any, dims: Labels) -> Labels:
    """The labels of an array that may be shared: capital where its size is 1."""
    return "".join(
        label if size != 1 else label.upper() for label, size in zip(dims.ljust(array.ndim, "."), array.shape, strict=True)
    )


def request_labels(request: SdpaRequest) -> SdpaRequest:
    """The request with labels in place of each array."""
    by_layout = request.spec.layout == "BHLE"
    kv = "h" if request.kv_heads != 1 else "Q"
    named = {
        "query": "bq.." if by_layout else "b.q.",
        "key": f"b{kv}.." if by_layout else f"b.{kv}.",
        "value": f"b{kv}.." if by_layout else f"b.{kv}.",
    }
    shared = {"bias": "bq..", "keep_mask": "bq..", "scale": "b", "sinks": "bq", "dropout_seeds": "bq."}
    for name, dims in shared.items():
        array = getattr(request, name)
        named[name] = None if array is None else _labels(array, dims)  # type: ignore[assignment]
    return SdpaRequest(**named, masks=jax.tree.map(lambda array: _labels(array, "b"), request.masks), spec=request.spec)


def out_labels(request: SdpaRequest) -> tuple[Labels, Labels]:
    """Those of out and of lse."""
    return ("bq.." if request.spec.layout == "BHLE" else "b.q."), "bq."


def _rule(operands: Sequence[Labels], results: Sequence[Labels], group: int) -> dict[str, Any]:
    """The einsum-like text of the Shardy rule, with a factor of its own for every dim that must be whole.

    Grouped query heads and key/value heads are two factors: as one compound factor, an axis larger than the number of key/value
    heads would be cut into sub-axes, which JAX's shardings can't express. `partition` puts the two together.
    """
    whole: list[str] = []
    factors = {"b": "b", "h": "h", "q": "h" if group == 1 else "q"}

    def factor(label: str) -> str:
        if label not in factors:
            whole.append(f"w{len(whole)}")
            return whole[-1]
        return factors[label]

    text = [", ".join(" ".join(map(factor, labels)) for labels in side) for side in (operands, results)]
    return {"sharding_rule": " -> ".join(text), "need_replication_factors": tuple(whole)}


def partitioned(program: Program, request: SdpaRequest, operands: Sequence[Labels], results: Sequence[Labels]) -> Program:
    """`program` (a backend's, on arrays labelled `operands`), run on each device's part of the batch and the heads.

    On one device, and inside a `shard_map` that is manual over the whole mesh, it is the program itself.
    """

    def axes_of(mesh: Any, query: Any) -> dict[str, tuple[str, ...]]:
        """Over which mesh axes each label is split, read off the query's sharding."""
        entries = (*query.sharding.spec, *[None] * 4)
        batch, heads = (
            () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            for entry in (entries[0], entries[request.heads_axis])
        )
        parts = 1
        for axis in heads:
            parts *= mesh.shape[axis]
        if request.kv_heads % parts and request.kv_heads > 1:
            heads = ()  # more devices than key/value heads: all heads are whole on each
        return {"b": batch, "q": heads, "h": heads}

    def shardings(mesh: Any, query: Any, labelled: Sequence[Labels]) -> tuple[NamedSharding, ...]:
        axes = axes_of(mesh, query)
        return tuple(NamedSharding(mesh, PartitionSpec(*(axes.get(label) or None for label in labels))) for labels in labelled)

    def infer(mesh: Any, args: Any, outs: Any) -> tuple[NamedSharding, ...]:
        return shardings(mesh, args[0], results)

    def partition(mesh: Any, args: Any, outs: Any) -> Any:
        axes = axes_of(mesh, args[0])

        def local(*args: jax.Array) -> tuple[jax.Array, ...]:
            found = []
            for array, labels in zip(compat.without_mesh(program)(*args), results, strict=True):
                split = tuple(axis for label in labels if label.isupper() for axis in axes[label.lower()])
                found.append(lax.psum(array, split) if split else array)
            return tuple(found)

        return mesh, local, shardings(mesh, args[0], results), shardings(mesh, args[0], operands)

    wrapped = custom_partitioning(lambda *args: tuple(program(*args)))
    rule = _rule(operands, results, request.group)
    wrapped.def_partition(partition=partition, infer_sharding_from_operands=infer, **rule)
    return wrapped
