"""Context parallelism: one attention call whose sequence is divided over a mesh axis. The mirror of torch's `context_parallel`.

Batch and heads need nothing from here: under plain `jit` every call keeps them divided (`jax_sdpa.partition`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax

from jax_sdpa import check, dispatch
from jax_sdpa import device as devices
from jax_sdpa.functional import request_of
from jax_sdpa.request import DIFFERENTIABLE, SdpaRequest
from jax_sdpa.sharding import decode, plan, ring, ulysses
from jax_sdpa.sharding.layout import Axes, MeshAxes
from jax_sdpa.sharding.plan import METHODS, Plan
from jax_sdpa.sharding.zigzag import ORDERS, Order, from_zigzag, to_zigzag

__all__ = ["Plan", "context_parallel_attention", "explain_context_parallel", "from_zigzag", "to_zigzag"]


def _axes(names: str | Sequence[str] | None, what: str, mesh: Any, sequence: str) -> Axes:
    found = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if name not in mesh.axis_names or name == sequence:
            raise ValueError(f"{what} must name axes of the mesh {mesh.axis_names} other than {sequence!r}, got {name!r}.")
    return found


def _typed_axes(query: Any, dim: int, sequence: str) -> Axes:
    """Over which explicit axes the type of a query says that a dim is divided."""
    sharding = (query if isinstance(query, jax.ShapeDtypeStruct) else jax.typeof(query)).sharding
    if sharding is None:
        return ()
    entry = (*sharding.spec, *[None] * 4)[dim]
    names = entry if isinstance(entry, tuple) else (entry,)
    return tuple(str(name) for name in names if name in sharding.mesh.explicit_axes and name != sequence)


def _mesh_axes(request: SdpaRequest, mesh: Any, axis_name: str, batch_axis: Any, head_axis: Any) -> MeshAxes:
    if not isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}.")
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name must be an axis of the mesh, one of {mesh.axis_names}, got {axis_name!r}.")
    batch, heads = _axes(batch_axis, "batch_axis", mesh, axis_name), _axes(head_axis, "head_axis", mesh, axis_name)
    if batch_axis is None:
        batch = _typed_axes(request.query, 0, axis_name)
    if head_axis is None:
        heads = _typed_axes(request.query, request.heads_axis, axis_name)
    axes = MeshAxes(mesh, axis_name, batch, heads)
    if set(batch) & set(heads):
        raise ValueError(f"batch_axis and head_axis must be different axes, got {batch} and {heads}.")
    if request.batch % axes.size(batch):
        raise ValueError(f"the batch, {request.batch}, must be a multiple of the {axes.size(batch)} devices of {batch}.")
    for name, count in (("query", request.q_heads), ("key/value", request.kv_heads)):
        if count % axes.size(heads) and not (name == "key/value" and count == 1):
            raise ValueError(
                f"the {name} heads, {count}, must be a multiple of the {axes.size(heads)} devices of {heads} (or one for all): "
                "divide less of them, or repeat the key/value heads."
            )
    return axes


def _planned(
    request: SdpaRequest,
    mesh: Any,
    axis_name: Any,
    batch_axis: Any,
    head_axis: Any,
    method: Any,
    order: Any,
    device: devices.Device,
) -> tuple[MeshAxes, Order, Plan]:
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be None or one of {METHODS}, got {method!r}.")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")
    if check.is_empty(request):
        raise ValueError(f"context parallelism of no scores at all: got L={request.query_len}, S={request.key_len}.")
    axes = _mesh_axes(request, mesh, axis_name, batch_axis, head_axis)
    pieces = Order(order, axes.devices)
    return axes, pieces, plan.choose(request, axes, pieces, method, device)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attend(method: str, treedef: Any, axes: MeshAxes, order: Order, arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    if method == "all_to_all":
        return ulysses.attend(axes, treedef, arrays)
    if method == "decode":
        return decode.attend(axes, treedef, arrays)
    request = jax.tree.unflatten(treedef, arrays)
    return ring.attend(ring.Ring(treedef, axes, order, request.spec.returns_lse), arrays)


def context_parallel_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    mesh: Any,
    axis_name: str,
    batch_axis: str | Sequence[str] | None = None,
    head_axis: str | Sequence[str] | None = None,
    method: str | None = None,
    order: str = "contiguous",
    layout: str = "BHLE",
    scale: Any = None,
    enable_gqa: bool = False,
    dropout_rng: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    return_residual: bool = False,
) -> Any:
    """`scaled_dot_product_attention` of sequences that are divided over a mesh axis: the same numbers, no device holds them whole.

    ::

        ring        K and V go round by ppermute while each device computes; merged by lse   (B, Hq, L/n, E) on a device
        all_to_all  to heads-sharded whole sequences and back (Ulysses)                      (B, Hq/n, L, E) meanwhile
        decode      keys stay where they are, results are summed                             (B, Hq, L, E), keys S/n

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, dropout_rng: those of
            `scaled_dot_product_attention`, whole arrays as `jit` sees them, of rank 4; every structured mask. A dense mask's rows
            are divided as the queries are, and its columns are whole on every device.
        mesh, axis_name: a `jax.sharding.Mesh` and its axis that divides the sequence.
        batch_axis, head_axis: the mesh axes that divide batch and heads, if any; on a mesh with explicit axes those of the query's
            type. Other axes have copies.
        method: 'ring', 'all_to_all', 'decode'; None: by shape. Few queries (fewer numbers than the keys') take decode; heads
            that are a multiple of the axis take all_to_all; else the ring.
        order: 'contiguous', or 'zigzag' (ring only): every sequence axis, of ids and of dense masks too, is in the order of
            `to_zigzag`, which gives every device the same work under a causal mask. Positions, lengths, offsets and dropout are
            still those of the sequence.
        layout: 'BHLE' (torch's) or 'BLHE' (JAX's), of q, k, v and out.
        softcap, sinks: as in `dot_product_attention`.
        return_residual: also return lse, (B, Hq, L), float32 (float64).

    Returns:
        Like the query, with Ev for E; its length is divided over the axis (decode: whole on every device).

    Raises:
        As `scaled_dot_product_attention`; ValueError where a method cannot run the call (L and S of the ring are multiples of the
        devices, of twice as many in zig-zag), with every reason.

    Differentiable any number of times in every operand that the one-device call is differentiable in. The ring has a rule of its
    own, a `custom_vjp` that keeps 1/n of everything, and so refuses forward mode (`jvp`, `jacfwd`); the others have both modes.
    float16 and bfloat16: each part's result is rounded before it is merged in float32. The order of additions is the mesh's: bits
    differ from one device's, but not from run to run (except where the plan says so of FLASH's gradients); dropout drops the
    same weights.

    Source: torch.distributed.tensor.experimental.context_parallel, torch 2.13, which patches SDPA inside a context and shuffles its
    buffers. Differs: a function, any mask, grouped heads, dropout, gradients of bias and sinks, decode.

    >>> import jax, jax.numpy as jnp
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("sequence",))
    >>> q = jnp.ones((1, 8, 64, 16)); kv = jnp.ones((1, 2, 64, 16))
    >>> context_parallel_attention(q, kv, kv, is_causal=True, enable_gqa=True, mesh=mesh, axis_name="sequence").shape
    (1, 8, 64, 16)
    """
    request = check.sharded_request(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, dropout_rng=dropout_rng,
        softcap=softcap, sinks=sinks, layout=layout, returns_lse=return_residual,
    )  # fmt: skip
    axes, pieces, planned = _planned(request, mesh, axis_name, batch_axis, head_axis, method, order, devices.default())
    dispatch.check_viable(plan.part_of(planned.method, request, axes, pieces), devices.imaginable())
    arrays, treedef = jax.tree.flatten(request)
    out, lse = _attend(planned.method, treedef, axes, pieces, tuple(arrays))
    return (out, lse) if return_residual else out


def explain_context_parallel(*args: Any, device: str | None = None, grad: bool = False, **kwargs: Any) -> Plan:
    """Which method a call of `context_parallel_attention` takes, why no other, and which backend each device's calls run on.

    Args:
        *args, **kwargs: those of the call; arrays may be `jax.ShapeDtypeStruct`s.
        device, grad: as in `jax_sdpa.explain`.

    Returns:
        a `Plan`: `.method`, `.why`, `.rejected`, `.devices`, `.choice`; `print` it.

    Raises:
        What the call itself would raise.

    Source: `jax_sdpa.explain`, asked about the call that one device makes; torch has no such answer.

    >>> import jax
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("sequence",))
    >>> q = jax.ShapeDtypeStruct((1, 8, 4096, 64), "bfloat16")
    >>> plan = explain_context_parallel(q, q, q, is_causal=True, mesh=mesh, axis_name="sequence", method="ring", device="cpu")
    >>> plan.method, plan.choice.backend.name
    ('ring', 'EFFICIENT_ATTENTION')
    """
    signature = inspect.signature(context_parallel_attention)
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    options = dict(given.arguments)
    options["returns_lse"] = options.pop("return_residual")
    call = [options.pop(name) for name in list(signature.parameters)[:6]]
    names = ("mesh", "axis_name", "batch_axis", "head_axis", "method", "order")
    where = {name: options.pop(name) for name in names}
    request = request_of(check.sharded_request, tuple(call), options)
    if grad:
        request = request.with_spec(wrt=tuple(name for name in DIFFERENTIABLE if getattr(request, name) is not None))
    return _planned(request, **where, device=devices.default() if device is None else devices.parse(device))[2]
