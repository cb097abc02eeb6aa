"""Attention as JAX primitives of our own: abstract values, batching, derivatives, lowering per platform. Knows no mask, no kernel.

Three primitives share one form: the leaves of a request, then what else they need.

    forward (*request)                      -> out, lse
    tangent (*request, out, lse, *tangents) -> dout, dlse                linear in the tangents; its transpose is
    backward(*request, out, lse, *cts)      -> a cotangent per operand in `wrt`

The jvp of `forward` binds `tangent`; the derivatives of `tangent` and `backward` come from their plain JAX definitions, so jvp,
grad, second and third derivatives, vmap, remat and scan all work through every backend. The backend is chosen when a program
is lowered, once for each platform: one traced function, and one exported artefact, runs the right one on each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_sdpa import compat, partition
from jax_sdpa.device import PLATFORMS, Device, target
from jax_sdpa.dispatch import implementation_for
from jax_sdpa.implementations import DEFINITION
from jax_sdpa.implementations.base import Implementation
from jax_sdpa.request import DIFFERENTIABLE, SCALES, SdpaRequest

OUT_NAME, LSE_NAME = "sdpa_out", "sdpa_lse"
"""The names for `jax.checkpoint` policies: saved, they keep the forward from running twice."""

Evaluate = Callable[..., Sequence[jax.Array]]  # (implementation, request, *the other operands, **params)


def _evaluate_forward(implementation: Implementation, request: SdpaRequest) -> Sequence[jax.Array]:
    return implementation.run(request)


def _evaluate_tangent(
    implementation: Implementation, request: SdpaRequest, out: jax.Array, lse: jax.Array, *tangents: jax.Array, wrt: tuple[str, ...]
) -> Sequence[jax.Array]:
    return implementation.tangent(request, out, lse, dict(zip(wrt, tangents, strict=True)))


def _evaluate_backward(
    implementation: Implementation,
    request: SdpaRequest,
    out: jax.Array,
    lse: jax.Array,
    *cts: jax.Array,
    wrt: tuple[str, ...],
    has_ct: tuple[bool, bool],
) -> Sequence[jax.Array]:
    given = iter(cts)
    dout, dlse = (next(given) if has else None for has in has_ct)
    cotangents = implementation.backward(request, out, lse, dout, dlse, wrt)
    return [cotangents[name] for name in wrt]


def _split(args: Sequence[Any], treedef: Any) -> tuple[SdpaRequest, Sequence[Any]]:
    n = treedef.num_leaves
    return jax.tree.unflatten(treedef, args[:n]), args[n:]


def _lse_dtype(request: SdpaRequest) -> Any:
    return jnp.promote_types(request.query.dtype, jnp.float32)


def _out_avals(request: SdpaRequest, *rest: Any, **params: Any) -> list[Any]:
    query = request.query
    return [
        compat.typed_like(query, (0, 1, 2, None), request.out_shape, query.dtype),
        compat.typed_like(query, (0, request.heads_axis, request.length_axis), request.lse_shape, _lse_dtype(request)),
    ]


def _cotangent_avals(request: SdpaRequest, *rest: Any, wrt: tuple[str, ...], **params: Any) -> list[Any]:
    operands = [getattr(request, name) for name in wrt]
    return [compat.typed_like(operand, range(len(operand.shape)), operand.shape, operand.dtype) for operand in operands]


def _out_labels(request: SdpaRequest, **params: Any) -> list[str]:
    return list(partition.out_labels(request))


def _cotangent_labels(request: SdpaRequest, wrt: tuple[str, ...], **params: Any) -> list[str]:
    return [getattr(partition.request_labels(request), name) for name in wrt]


def _operand_labels(request: SdpaRequest, wrt: tuple[str, ...] | None = None, has_ct: tuple[bool, ...] | None = None) -> list[str]:
    """Labels of all operands of the primitive that has these parameters: request, out and lse, then tangents or cotangents."""
    labels = jax.tree.leaves(partition.request_labels(request))
    if wrt is None:
        return labels
    outs = _out_labels(request)
    last = _cotangent_labels(request, wrt) if has_ct is None else [out for out, has in zip(outs, has_ct, strict=True) if has]
    return [*labels, *outs, *last]


def _make(name: str, evaluate: Evaluate, avals: Callable[..., list[Any]], labels: Callable[..., list[str]]) -> Primitive:
    """A primitive that lowers to `evaluate` with the implementation that the platform's device chooses."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    compat.needs_devices(primitive)

    @functools.partial(jax.jit, static_argnames="params")
    def run(*args: jax.Array, params: tuple[tuple[str, Any], ...]) -> Any:
        return primitive.bind(*args, **dict(params))

    primitive.def_impl(lambda *args, **params: run(*args, params=tuple(params.items())))

    def abstract(*args: Any, treedef: Any, **params: Any) -> list[Any]:
        request, rest = _split(args, treedef)
        return avals(request, *rest, **params)

    primitive.def_abstract_eval(abstract)

    def lowering(device: Callable[[SdpaRequest], Device]) -> Callable[..., Any]:
        def rule(ctx: Any, *args: Any, treedef: Any, **params: Any) -> Any:
            request, _ = _split(ctx.avals_in, treedef)
            implementation = implementation_for(request, device(request))
            if (plainer := _plainer(implementation, request, forward=not params)) is not None:
                return compat.lower_untyped(functools.partial(_bind_changed, primitive, plainer, treedef, params), ctx, *args)

            def program(*args: jax.Array) -> Sequence[jax.Array]:
                request, rest = _split(args, treedef)
                with jax.named_scope(f"{name}_{implementation.backend.name.lower()}"):
                    return evaluate(implementation, request, *rest, **params)

            # grouped heads that are cut into more parts than there are key/value heads: XLA alone gathers them, in MATH too
            if compat.may_partition(ctx) and (implementation.needs_partitioning or request.q_heads != request.kv_heads):
                operands, results = _operand_labels(request, **params), labels(request, **params)
                identity = repr((name, implementation.backend.name, str(device(request)), treedef, sorted(params.items())))
                program = partition.partitioned(program, request, operands, results, identity)
            return compat.lower_untyped(program, ctx, *args)

        return rule

    mlir.register_lowering(primitive, lowering(lambda request: Device("other")))
    for platform in PLATFORMS:
        rule = lowering(lambda request, platform=platform: target(platform, request.spec.device))  # type: ignore[misc]
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _by_definition(evaluate: Evaluate) -> Callable[..., Any]:
    """The jvp of `tangent` and `backward`: that of their plain JAX definition, in the operands that do vary."""

    def rule(primals: Sequence[Any], tangents: Sequence[Any], *, treedef: Any, **params: Any) -> Any:
        varying = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

        def definition(*operands: jax.Array) -> Sequence[jax.Array]:
            args = list(primals)
            for i, operand in zip(varying, operands, strict=True):
                args[i] = operand
            request, rest = _split(args, treedef)
            return tuple(evaluate(DEFINITION, request.dequantised(), *rest, **params))

        outs, dots = jax.jvp(definition, [primals[i] for i in varying], [tangents[i] for i in varying])
        return list(outs), list(dots)

    return rule


Change = Callable[[SdpaRequest], SdpaRequest]


def _plainer(implementation: Implementation, request: SdpaRequest, forward: bool) -> Change | None:
    """What makes the next plainer request of one that the implementation does not take as it is; None: it does."""
    if request.pages is not None and not implementation.takes_pages(request):
        return SdpaRequest.gathered
    if request.key_scale is not None and not (forward and implementation.takes_eight_bits(request)):
        return SdpaRequest.dequantised
    return None


def _bind_changed(
    primitive: Primitive, change: Change, treedef: Any, params: dict[str, Any], *args: jax.Array
) -> Sequence[jax.Array]:
    """The same call of the changed request: the one place that gathers pages, and that widens keys and values of 8 bits."""
    request, rest = _split(args, treedef)
    leaves, treedef = jax.tree.flatten(change(request))
    return primitive.bind(*leaves, *rest, treedef=treedef, **params)


# --- derivatives of the forward


def _forward_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, treedef: Any) -> Any:
    request, _ = _split(primals, treedef)
    moving, _ = _split(tangents, treedef)
    if moving.key_scale is not None:
        _refuse_derivatives(moving)
    wrt = tuple(name for name in DIFFERENTIABLE if getattr(moving, name) is not None and type(getattr(moving, name)) is not ad.Zero)
    wrt = tuple(name for name in DIFFERENTIABLE if name in {*wrt, *request.spec.wrt})
    leaves, treedef = jax.tree.flatten(request.with_spec(wrt=wrt))
    out, lse = forward_p.bind(*leaves, treedef=treedef)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    named = tuple(name for name in wrt if type(getattr(moving, name)) is not ad.Zero)
    if not named:
        return [out, lse], [compat.zero_tangent(out), compat.zero_tangent(lse)]
    dots = [getattr(moving, name) for name in named]
    return [out, lse], tangent_p.bind(*leaves, out, lse, *dots, treedef=treedef, wrt=named)


def _refuse_derivatives(moving: SdpaRequest) -> None:
    """moving: the tangents of a request with scales. (The tangents of integers are none.)"""
    for name in ("key", "value", *SCALES):
        tangent = getattr(moving, name)
        if type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0:
            raise ValueError(
                f"{name} has no derivative where keys and values are of 8 bits; query, bias, sinks and an array scale have theirs. "
                f"Pass jax.lax.stop_gradient({name}), or differentiate a call whose keys and values have the query's dtype."
            )


def _tangent_transpose(cts: Sequence[Any], *args: Any, treedef: Any, wrt: tuple[str, ...]) -> list[Any]:
    n = treedef.num_leaves + 2
    residuals, tangents = args[:n], args[n:]
    wanted = tuple(name for name, tangent in zip(wrt, tangents, strict=True) if ad.is_undefined_primal(tangent))
    has_ct = tuple(type(ct) is not ad.Zero for ct in cts)
    given = [ct for ct, has in zip(cts, has_ct, strict=True) if has]
    operands = compat.vary_together([*residuals, *given])
    found = dict(zip(wanted, backward_p.bind(*operands, treedef=treedef, wrt=wanted, has_ct=has_ct), strict=True)) if given else {}
    return [None] * n + [found.get(name) for name in wrt]


# --- batching: a mapped axis becomes the slow part of the batch


def _fold(x: Any, dim: int | None, n: Any, batch: Any, full: bool) -> Any:
    """(…n…, 1|B, …) -> (n * B, …), or unchanged where every batch element of every mapped entry shares it."""
    if not full:
        return x
    x = jnp.broadcast_to(x, (n, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    if x.shape[1] != batch:
        x = jnp.broadcast_to(x, (n, batch, *x.shape[2:]))
    return jnp.reshape(x, (n * batch, *x.shape[2:]))


def _unfold(x: jax.Array, n: Any) -> jax.Array:
    return jnp.reshape(x, (n, x.shape[0] // n, *x.shape[1:]))


def _batch_rule(primitive: Primitive, axis: Any, args: Sequence[Any], dims: Sequence[Any], *, treedef: Any, **params: Any) -> Any:
    if all(d is None for d in dims):
        results = primitive.bind(*args, treedef=treedef, **params)
        return results, [None] * len(results)
    n = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    shapes = [x.shape if d is None else x.shape[:d] + x.shape[d + 1 :] for x, d in zip(args, dims, strict=True)]
    positions, others = _split(range(len(args)), treedef)
    paged = positions.pages is not None
    pools = [getattr(positions, name) for name in ("key", "value", *SCALES) if getattr(positions, name) is not None]
    if paged and any(dims[i] is not None for i in pools):  # no table reaches into several pools
        gathered = functools.partial(_bind_changed, primitive, SdpaRequest.gathered, treedef, params)
        results = jax.vmap(gathered, tuple(dims), axis_size=n, spmd_axis_name=axis.spmd_name)(*args)
        return results, [0] * len(results)
    batch = shapes[positions.query][0]
    wrt = params.get("wrt", ())
    full = [d is not None or (shape[0] == batch and batch != 1) for shape, d in zip(shapes, dims, strict=True)]
    for i in (positions.query, positions.key, positions.value, *others[:2]):  # these and out, lse are never shared
        full[i] = True
    if paged:  # all of these entries' pages are in one pool
        full[positions.pages] = True
        for i in pools:
            full[i] = False
    if primitive is tangent_p:  # an operand and its tangent have one shape
        for name, i in zip(wrt, others[2:], strict=True):
            full[i] = full[getattr(positions, name)] = full[i] or full[getattr(positions, name)]
    if primitive is backward_p:  # a cotangent for each mapped entry; dout and dlse as out and lse
        for i in (*(getattr(positions, name) for name in wrt), *others[2:]):
            full[i] = True
    folded = [_fold(x, d, n, batch, f) for x, d, f in zip(args, dims, full, strict=True)]
    if axis.spmd_name is not None:  # `vmap(spmd_axis_name=…)`: the mapped entries lie on that mesh axis, so the folded batch does
        folded = [compat.batch_over(x, axis.spmd_name) if f else x for x, f in zip(folded, full, strict=True)]
    results = [_unfold(x, n) for x in primitive.bind(*folded, treedef=treedef, **params)]
    if primitive is backward_p:
        shared = [shapes[getattr(positions, name)][0] != batch for name in wrt]
        results = [x.sum(1, keepdims=True) if one else x for x, one in zip(results, shared, strict=True)]
    return results, [0] * len(results)


forward_p = _make("sdpa_forward", _evaluate_forward, _out_avals, _out_labels)
tangent_p = _make("sdpa_tangent", _evaluate_tangent, _out_avals, _out_labels)
backward_p = _make("sdpa_backward", _evaluate_backward, _cotangent_avals, _cotangent_labels)

ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _by_definition(_evaluate_tangent)
ad.primitive_jvps[backward_p] = _by_definition(_evaluate_backward)
ad.primitive_transposes[tangent_p] = _tangent_transpose
for _primitive in (forward_p, tangent_p, backward_p):
    batching.fancy_primitive_batchers[_primitive] = functools.partial(_batch_rule, _primitive)


def pull_back(
    request: SdpaRequest, out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array | None, wrt: tuple[str, ...]
) -> dict[str, jax.Array]:
    """The cotangents of the operands named in `wrt`, from the forward's results; with `request.spec.part` these, and their
    cotangents, are those of a softmax over more keys than the request's."""
    leaves, treedef = jax.tree.flatten(request)
    cts = [dout] if dlse is None else [dout, dlse]
    operands = compat.vary_together([*leaves, out, lse, *cts])
    found = backward_p.bind(*operands, treedef=treedef, wrt=wrt, has_ct=(True, dlse is not None))
    return dict(zip(wrt, found, strict=True))


def attend(request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a canonical request, by the backend that is chosen when the program is lowered."""
    leaves, treedef = jax.tree.flatten(request)
    out, lse = forward_p.bind(*compat.vary_together(leaves), treedef=treedef)
    return out, lse
