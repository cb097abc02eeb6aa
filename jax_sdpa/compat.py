"""What moved between jax 0.10.2 and 0.12: the only file that looks at versions or at private modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch as _dispatch
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # JAX's cuDNN attention: the backward from (out, lse) is not public
from jax._src.mesh import get_concrete_mesh
from jax._src.sharding_impls import GSPMDSharding
from jax.core import ShapedArray
from jax.interpreters import ad, mlir
from jax.sharding import PartitionSpec

__all__ = [
    "JAX_VERSION",
    "batch_over",
    "cudnn_attention",
    "cudnn_attention_backward",
    "cudnn_version",
    "default_device",
    "default_matmul_precision",
    "is_symbolic",
    "lower_untyped",
    "may_partition",
    "needs_devices",
    "typed_like",
    "vary_together",
    "whole",
    "without_mesh",
    "x64_enabled",
    "zero_tangent",
]

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


def typed_like(aval: Any, dims: Sequence[int | None], shape: tuple[Any, ...], dtype: Any) -> Any:
    """An abstract array with the type that `aval` has beyond shape and dtype: the manual mesh axes over which it varies, and, on a
    mesh with explicit axes, for each dim the sharding of the dim of `aval` that `dims` names (None: not sharded)."""
    if aval.sharding.mesh.empty:
        return ShapedArray(shape, dtype)
    entries = (*aval.sharding.spec, *[None] * len(aval.shape))
    spec = PartitionSpec(*(None if dim is None else entries[dim] for dim in dims))
    return ShapedArray(shape, dtype, sharding=aval.sharding.update(spec=spec), manual_axis_type=aval.manual_axis_type)


def batch_over(x: Any, axes: tuple[str, ...]) -> Any:
    """x with its first dim divided among mesh axes, the others as XLA likes: where a mesh that has them is set (`jax.set_mesh`) and
    leaves them to XLA. Inside a `shard_map` over them there is nothing left to divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(axes) <= set(mesh.auto_axes):
        return x
    spec = PartitionSpec(axes, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def lower_untyped(program: Any, ctx: Any, *args: Any) -> Any:
    """Lower `program` as if there were no mesh: its loops' first values need not vary as its operands do, nor be sharded as they
    are. What varies and what is sharded is said by the avals of the primitive around it. Nor does the caller's ban on rank
    promotion, which is about the caller's own code, hold inside."""
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    ctx = _told_of_mesh(ctx.replace(avals_in=plain))
    return mlir.lower_fun(without_mesh(program), multiple_results=True)(ctx, *args)


def _told_of_mesh(ctx: Any) -> Any:
    """ctx with the mesh of `jax.set_mesh` where no operand of the whole program names one: `custom_partitioning` would know no
    sharding by name then."""
    module, mesh = ctx.module_context, get_concrete_mesh()
    context = module.axis_context
    if not may_partition(ctx) or context.abstract_mesh is not None or mesh.empty:
        return ctx
    if tuple(context.device_assignment) != tuple(mesh.devices.flat):
        return ctx
    return ctx.replace(module_context=module.replace(axis_context=dataclasses.replace(context, abstract_mesh=mesh.abstract_mesh)))


def whole(sharding: Any) -> Any:
    """The sharding of an array that is whole on each of the devices of another's."""
    return GSPMDSharding.get_replicated(sharding._device_assignment)


def without_mesh(program: Any) -> Any:
    """`program`, traced as if no mesh were around it."""

    def run(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.numpy_rank_promotion("allow"):
            return program(*args)

    return run


def cudnn_version() -> int | None:
    """The version of the cuDNN that this jaxlib can load, as in 91600; None where there is none."""
    if cudnn.cuda_versions is None:
        return None
    try:
        return int(cudnn.cuda_versions.cudnn_get_version())
    except RuntimeError:  # JAX's answer where its CUDA plugin is installed and cuDNN is not
        return None


def may_partition(ctx: Any) -> bool:
    """Whether the program being lowered is for several devices that XLA itself divides the work among."""
    context = ctx.module_context.axis_context
    return getattr(context, "num_devices", 1) > 1 and getattr(context, "device_assignment", None) is not None


def needs_devices(primitive: Any) -> None:
    """Tell JAX that this primitive's lowering wants to know the devices (`custom_partitioning` does)."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)


def x64_enabled() -> bool:
    """`jax.config.jax_enable_x64` as it holds at this point."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def default_matmul_precision() -> str | None:
    """`jax.default_matmul_precision` as it holds at this point; None where nobody asked for any."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return None if precision is None else str(precision)


def default_device() -> Any:
    """`jax.default_device` as it holds at this point: a device, a platform's name or None."""
    return jax.config.jax_default_device  # type: ignore[attr-defined]


def zero_tangent(primal: Any) -> Any:
    """The symbolic zero in the tangent space of a value."""
    return ad.Zero.from_primal_value(primal)  # pyright: ignore


_NO_SCORE_MOD: dict[str, Any] = {"score_mod_name": None, "score_mod_jaxpr": None} if JAX_VERSION >= (0, 12) else {}


def _cudnn_operands(query: Any, bias: Any, q_lengths: Any, kv_lengths: Any) -> list[Any]:
    """bias, lengths, and in place of offsets and page tables (packed and paged attention) JAX's mark for "not used"."""
    not_used = jnp.zeros(0, query.dtype)
    return [not_used if x is None else x for x in (bias, q_lengths, kv_lengths, None, None, None, None)]


def _cudnn_params(
    scale: float, causal: bool, window: int | None, padded: bool, layout: str, has_bias: bool, has_dbias: bool
) -> dict[str, Any]:
    kinds = cudnn.MaskType
    masks = {
        (False, False): kinds.NO_MASK,
        (True, False): kinds.CAUSAL,
        (False, True): kinds.PADDING,
        (True, True): kinds.PADDING_CAUSAL,
    }
    return {
        "scale": scale, "seed": 0, "dropout_rate": 0.0, "variadic_args": (has_bias, has_dbias), "mask_type": masks[causal, padded],
        "layout": cudnn.AttentionLayout[layout].value, "sliding_window_length": window, **_NO_SCORE_MOD,
    }  # fmt: skip


def cudnn_attention(
    query: Any, key: Any, value: Any, bias: Any, q_lengths: Any, kv_lengths: Any, *, scale: float, causal: bool,
    window: int | None, layout: str,
) -> tuple[Any, Any]:  # fmt: skip
    """(out, lse (B, N, T) float32) by cuDNN; nothing is checked, no device is asked.

    layout: 'BNTH' or 'BTNH'. bias: (B|1, N|1, T, S) or None. q_lengths, kv_lengths: int32 (B,), both or none.
    causal: k <= q; window: also k > q - window.

    The primitive below JAX's own wrapper: the wrapper asks for the devices of this host and brings a partitioning of its own.
    """
    params = _cudnn_params(scale, causal, window, q_lengths is not None, layout, bias is not None, False)
    operands = _cudnn_operands(query, bias, q_lengths, kv_lengths)
    out, lse = cudnn._dot_product_attention_fwd_p.bind(query, key, value, *operands, **params, is_training=True)
    return out, lse


def cudnn_attention_backward(
    query: Any, key: Any, value: Any, bias: Any, q_lengths: Any, kv_lengths: Any, out: Any, lse: Any, dout: Any, *, scale: float,
    causal: bool, window: int | None, layout: str, with_dbias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """(dq, dk, dv), and dbias if asked for, by cuDNN from the forward's results. Arguments as in `cudnn_attention`."""
    params = _cudnn_params(scale, causal, window, q_lengths is not None, layout, bias is not None, with_dbias)
    operands = _cudnn_operands(query, bias, q_lengths, kv_lengths)
    return tuple(cudnn._dot_product_attention_bwd_p.bind(query, key, value, *operands, lse, out, dout, **params))
