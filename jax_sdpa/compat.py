"""What moved between jax 0.10.2 and 0.12: the only file that looks at versions or at private modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax._src import dispatch as _dispatch
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # JAX's cuDNN attention: the backward from (out, lse) is not public
from jax.sharding import PartitionSpec

__all__ = ["JAX_VERSION", "cudnn", "cudnn_version", "is_symbolic", "may_partition", "needs_devices", "varying_like", "vary_together"]

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())


def is_symbolic(size: Any) -> bool:
    """True for a dimension that is not a number yet (`jax.export.symbolic_shape`)."""
    return not isinstance(size, int)


def _varying(aval: Any) -> frozenset[str]:
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset() if manual is None else manual.varying


def vary_together(arrays: Sequence[Any]) -> list[Any]:
    """Inside `shard_map(check_vma=True)`: all operands vary over the same mesh axes, so that transposes bring their psums."""
    axes = [_varying(jax.typeof(array)) for array in arrays]
    union = frozenset[str]().union(*axes)
    return [
        jax.lax.pcast(array, tuple(sorted(union - own)), to="varying") if union - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]


def varying_like(aval: Any, shape: tuple[Any, ...], dtype: Any) -> Any:
    """An abstract array that varies over the manual mesh axes over which `aval` varies."""
    if not _varying(aval):
        return jax.core.ShapedArray(shape, dtype)
    sharding = aval.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=aval.manual_axis_type)


def cudnn_version() -> int | None:
    """The version of the cuDNN that this jaxlib can load, as in 91600; None where there is none."""
    if cudnn.cuda_versions is None:
        return None
    return int(cudnn.cuda_versions.cudnn_get_version())


def may_partition(ctx: Any) -> bool:
    """Whether the program being lowered is for several devices that XLA itself divides the work among."""
    context = ctx.module_context.axis_context
    return getattr(context, "num_devices", 1) > 1 and getattr(context, "device_assignment", None) is not None


def needs_devices(primitive: Any) -> None:
    """Tell JAX that this primitive's lowering wants to know the devices (`custom_partitioning` does)."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)
