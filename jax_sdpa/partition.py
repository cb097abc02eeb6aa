"""How a backend's program is cut over a mesh under plain `jit`: batch and heads stay where they are, nothing is gathered.

Left alone, XLA would gather the operands of a loop over heads, or of a kernel it cannot see into. `custom_partitioning` runs the
backend's own program on each device's part instead. The rule is written once, in labels per dim:

    b  batch            q  query heads      h  key/value heads      .  whole on every device
    B  one for the whole batch        Q  one for all query heads        H  one for all key/value heads

Lengths and head dims are whole on every device, and so is what is shared; the cotangent of a shared operand is summed over the
devices that split the rest. Where there are more devices than key/value heads, these are shared by the devices of a group: each
takes the head that its queries attend with, and the cotangents are summed over the group.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_sdpa import compat
from jax_sdpa.request import SCALES, SdpaRequest

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
    if request.pages is not None:  # pools, which any sequence may reach into
        named["key"] = named["value"] = f"..{kv}."
    shared = {"bias": "bq..", "keep_mask": "bq..", "scale": "b", "sinks": "bq", "dropout_seeds": "bq.", "pages": "b."}
    for name, dims in shared.items():
        array = getattr(request, name)
        named[name] = None if array is None else _labels(array, dims)  # type: ignore[assignment]
    for name in SCALES:  # of keys and values, heads before lengths
        array = getattr(request, name)
        named[name] = None if array is None else _labels(array, f"{'b' if request.pages is None else '.'}{kv}.")  # type: ignore[assignment]
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


@dataclasses.dataclass(frozen=True)
class _Split:
    """Over which mesh axes the batch, the query heads and the key/value heads are split, and which further axes split query heads
    alone: `kv_heads` are shared there, and a device takes one of them."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    kv: tuple[str, ...]
    sharing: tuple[str, ...] = ()
    kv_heads: int = 1  # on a device
    devices: int = 1  # that share them

    @classmethod
    def of(cls, mesh: Any, batch: tuple[str, ...], heads: tuple[str, ...], kv_heads: Any) -> _Split:
        parts = [math.prod(mesh.shape[axis] for axis in heads[:n]) for n in range(len(heads) + 1)]
        if kv_heads == 1 or kv_heads % parts[-1] == 0:
            return cls(batch, heads, heads)
        n = max(n for n, part in enumerate(parts) if kv_heads % part == 0)
        own, devices = kv_heads // parts[n], parts[-1] // parts[n]
        if devices % own:
            return cls(batch, (), ())  # a device's query heads belong to several: all heads are whole on each
        return cls(batch, heads, heads[:n], heads[n:], own, devices)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"b": self.batch, "q": self.heads, "h": self.kv}

    def head(self) -> Any:
        """Of the key/value heads that devices share, the one that this device's queries attend with; None where none are shared."""
        return lax.axis_index(self.sharing) // (self.devices // self.kv_heads) if self.sharing else None

    def own_head(self, array: jax.Array, labels: Labels, head: Any) -> jax.Array:
        """Keys or values of that head alone."""
        return array if head is None or "h" not in labels else lax.dynamic_slice_in_dim(array, head, 1, labels.index("h"))

    def among_all(self, array: jax.Array, labels: Labels, head: Any) -> jax.Array:
        """The cotangent of what `own_head` took: zeros for the other heads."""
        if head is None or "h" not in labels:
            return array
        axis = labels.index("h")
        zeros = jnp.zeros((*array.shape[:axis], self.kv_heads, *array.shape[axis + 1 :]), array.dtype)
        return lax.dynamic_update_slice_in_dim(zeros, array, head, axis)


def partitioned(
    program: Program, request: SdpaRequest, operands: Sequence[Labels], results: Sequence[Labels], identity: str
) -> Program:
    """`program` (a backend's, on arrays labelled `operands`), run on each device's part of the batch and the heads.

    On one device, and inside a `shard_map` that is manual over the whole mesh, it is the program itself.

    identity: everything static that the program hangs on, as text, the same in every process. Until XLA partitions it, the module
    has a Python pointer in the program's place. With `jax_remove_custom_partitioning_ptr_from_cache_key` JAX's persistent cache
    leaves that out of its key; a digest as one more operand, which nobody reads, is what then tells one program from another.
    """
    digest = np.frombuffer(hashlib.sha256(identity.encode()).digest(), np.uint32)
    operands = [*operands, "."]

    def split_of(mesh: Any, query: Any) -> _Split:
        entries = (*query.sharding.spec, *[None] * 4)
        batch, heads = (
            () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            for entry in (entries[0], entries[request.heads_axis])
        )
        return _Split.of(mesh, batch, heads, request.kv_heads)

    def shardings(mesh: Any, split: _Split, labelled: Sequence[Labels]) -> tuple[NamedSharding, ...]:
        axes = split.axes
        return tuple(NamedSharding(mesh, PartitionSpec(*(axes.get(label) or None for label in labels))) for labels in labelled)

    def infer(mesh: Any, args: Any, outs: Any) -> tuple[Any, ...]:
        if not isinstance(args[0].sharding, NamedSharding):
            return (compat.whole(args[0].sharding),) * len(results)
        return shardings(mesh, split_of(mesh, args[0]), results)

    def partition(mesh: Any, args: Any, outs: Any) -> Any:
        if not isinstance(args[0].sharding, NamedSharding):  # nothing in the whole program names a mesh: all is whole everywhere
            everywhere = compat.whole(args[0].sharding)
            own = compat.without_mesh(lambda *args: tuple(program(*args[:-1])))
            return mesh, own, (everywhere,) * len(results), (everywhere,) * len(operands)
        split = split_of(mesh, args[0])

        def local(*args: jax.Array) -> tuple[jax.Array, ...]:
            head = split.head()
            given = [split.own_head(array, labels, head) for array, labels in zip(args, operands, strict=True)][:-1]
            found = []
            for array, labels in zip(program(*given), results, strict=True):
                axes = tuple(axis for label in labels if label.isupper() for axis in split.axes[label.lower()])
                axes += split.sharing if "h" in labels else ()
                array = split.among_all(array, labels, head)
                found.append(lax.psum(array, axes) if axes else array)
            return tuple(found)

        return mesh, compat.without_mesh(local), shardings(mesh, split, results), shardings(mesh, split, operands)

    wrapped = custom_partitioning(lambda *args: tuple(program(*args[:-1])))
    rule = _rule(operands, results, request.group)
    wrapped.def_partition(partition=partition, infer_sharding_from_operands=infer, **rule)
    return lambda *args: wrapped(*args, jnp.asarray(digest))
