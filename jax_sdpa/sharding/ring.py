"""Ring attention: queries stay where they are; keys and values, cut over the devices of a mesh axis, go round by `ppermute`.

At step r a device has the keys of the device r before it. It asks for the next ones first and computes meanwhile; every visit is
one call of the engine, whose mask is moved, and the results are merged by lse (`merge`). Key, value and key ids alone travel.

The backward is a second ring, from what the forward kept: the local q, k, v, out and lse, 1/n of everything. A visit's gradients
follow from the whole softmax's out and lse (p = exp(s - lse)); dk and dv travel with the keys that they belong to, in float32, and
are home after n steps, dq stays.

Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers" (arXiv:2310.01889). The float bias of a row may be as low
as -1e9 throughout; its largest value is taken off first, else lse would lose the logarithm of the row's sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_sdpa import dropout, primitive
from jax_sdpa.implementations import scores
from jax_sdpa.implementations.efficient_backward import sinks_gradient
from jax_sdpa.masks import Mask
from jax_sdpa.request import DIFFERENTIABLE, SdpaRequest
from jax_sdpa.sharding import merge
from jax_sdpa.sharding.layout import MeshAxes, leaves
from jax_sdpa.sharding.merge import State
from jax_sdpa.sharding.visits import Pair, visit
from jax_sdpa.sharding.zigzag import Order

WRT = tuple(name for name in DIFFERENTIABLE if name != "sinks")  # of a visit; sinks join the softmax once, at the end


@dataclasses.dataclass(frozen=True)
class Ring:
    """What is static of a call: how its request is put together, where it lies, in which order. Hashable."""

    treedef: Any
    axes: MeshAxes
    order: Order
    with_dlse: bool

    def request(self, arrays: Sequence[Any]) -> SdpaRequest:
        return jax.tree.unflatten(self.treedef, arrays)

    def specs(self, request: SdpaRequest) -> SdpaRequest:
        along = (self.axes.sequence,)
        return self.axes.specs(request, queries=along, keys=along, heads=self.axes.heads, dense_rows=along)

    def out_specs(self, request: SdpaRequest) -> Any:
        return self.axes.out_specs(request, queries=(self.axes.sequence,), heads=self.axes.heads)


def _cut(x: Any, axis: int, n: int, pieces: int) -> Any:
    """The n-th of so many pieces of an axis, whole where the axis is shared."""
    if x is None or x.shape[axis] == 1 or pieces == 1:
        return x
    size = x.shape[axis] // pieces
    return lax.slice_in_dim(x, n * size, (n + 1) * size, axis=axis)


def _key_ids(mask: Mask) -> list[Any]:
    """What of a mask belongs to keys, one after the other."""
    found: list[Any] = []
    mask.local(lambda x: x, lambda x: x, lambda ids: found.append(ids) or ids)
    return found


def _with_key_ids(mask: Mask, ids: Sequence[Any]) -> Mask:
    given = iter(ids)
    return mask.local(lambda x: x, lambda x: x, lambda _: next(given))


class _Local:
    """A device's share of the call, inside the shard_map; `travel` is (key, value, key ids of every mask)."""

    def __init__(self, ring: Ring, request: SdpaRequest, top: Any) -> None:
        self.ring, self.request, self.top = ring, request, top
        self.order, self.axis = ring.order, ring.axes.sequence
        self.device = lax.axis_index(self.axis)
        self.pieces = range(self.order.pieces)

    @property
    def travel(self) -> Any:
        return self.request.key, self.request.value, [_key_ids(mask) for mask in self.request.masks]

    def passed_on(self, tree: Any) -> Any:
        n = self.order.devices
        return lax.ppermute(tree, self.axis, [(i, (i + 1) % n) for i in range(n)])

    def rows(self, x: Any, n: int, axis: int) -> Any:
        return _cut(x, axis, n, self.order.pieces)

    def pair(self, travel: Any, n_q: int, n_k: int, step: Any) -> tuple[Pair, SdpaRequest]:
        """The request of one visit but for its masks' places: pieces of everything, and dropout's positions."""
        request, pair, along = self.request, Pair(self.order, n_q, n_k), self.request.length_axis
        key, value, ids = travel
        key, value = (_cut(x, along, n_k, self.order.pieces) for x in (key, value))
        masks = tuple(
            _with_key_ids(mask, [_cut(x, 1, n_k, self.order.pieces) for x in own]).local(
                lambda x: x, lambda x: self.rows(x, n_q, 1), lambda x: x
            )
            for mask, own in zip(request.masks, ids, strict=True)
        )
        query, S = self.rows(request.query, n_q, along), key.shape[along]
        L, columns = query.shape[along], pair.stored(self.device, step, S)
        bias, keep = (scores.dense_tile(x, n_q * L, L, columns, S) for x in (request.bias, request.keep_mask))
        seeds = request.dropout_seeds
        if seeds is not None:
            seeds = dropout.seeds_at(seeds, *pair.starts(self.device, step, L, S))
        found = dataclasses.replace(
            request, query=query, key=key, value=value, bias=merge.bias_less(bias, self.rows(self.top, n_q, 2)), keep_mask=keep,
            masks=masks, sinks=None, dropout_seeds=seeds,
        )  # fmt: skip
        return pair, found.with_spec(part=True, wrt=tuple(name for name in WRT if getattr(request, name) is not None))

    def attend(self, travel: Any, states: list[State], steps: Sequence[int], step: Any) -> list[State]:
        """The states of the pieces of queries after the keys at hand."""
        states = list(states)
        for n_q in self.pieces:
            for n_k in self.pieces:
                pair, request = self.pair(travel, n_q, n_k, step)

                def run(state: State, masks: tuple[Mask, ...], request: SdpaRequest = request) -> State:
                    part = primitive.attend(dataclasses.replace(request, masks=masks))
                    return merge.merged(state, part, request.heads_axis)

                states[n_q] = visit(request, pair, steps, self.device, step, run, states[n_q])
        return states

    def gradients(
        self, travel: Any, sums: dict[str, Any], given: tuple[Any, ...], wrt: tuple[str, ...], steps: Sequence[int], step: Any
    ) -> tuple[dict[str, Any], tuple[Any, Any]]:
        """(sums with the visits' dq, dbias, dscale, the visits' (dk, dv)) of the keys at hand."""
        request = self.request
        along, keys = request.length_axis, {"key": [], "value": []}  # of each piece of keys
        sums = dict(sums)
        for n_k in self.pieces:
            own: dict[str, Any] = {}
            for n_q in self.pieces:
                pair, part = self.pair(travel, n_q, n_k, step)
                out, lse, dout, dlse = (
                    None if x is None else self.rows(x, n_q, along if x.ndim == 4 else 2) for x in given
                )  # fmt: skip
                found = {name: jnp.zeros_like(getattr(part, name)) for name in wrt}

                def run(_: Any, masks: tuple[Mask, ...], part: SdpaRequest = part, rows: Any = (out, lse, dout, dlse)) -> Any:
                    out, lse, dout, dlse = rows
                    return primitive.pull_back(dataclasses.replace(part, masks=masks), out, lse, dout, dlse, wrt)

                found = visit(part, pair, steps, self.device, step, run, found)
                for name in keys:
                    more = found[name].astype(self.dtype)
                    own[name] = own[name] + more if n_q else more
                columns = pair.stored(self.device, step, part.key_len)
                for name in ("query", "bias", "scale"):
                    if name in found:
                        sums[name] = self._added(name, sums[name], found[name], n_q, columns)
            for name, parts in keys.items():
                parts.append(own[name])
        return sums, (jnp.concatenate(keys["key"], along), jnp.concatenate(keys["value"], along))

    @property
    def dtype(self) -> Any:
        return jnp.promote_types(self.request.query.dtype, jnp.float32)

    def _added(self, name: str, total: jax.Array, part: jax.Array, n_q: int, columns: Any) -> jax.Array:
        """total with a visit's share added where its rows, and its columns, lie."""
        starts: list[Any] = [0] * total.ndim
        if name != "scale":
            axis = self.request.length_axis if name == "query" else 2
            starts[axis] = n_q * part.shape[axis] if total.shape[axis] != part.shape[axis] else 0
        if name == "bias" and total.shape[3] != 1:
            starts[3] = columns
        starts = [jnp.asarray(start, jnp.int32) for start in starts]
        own = lax.dynamic_slice(total, starts, part.shape)
        return lax.dynamic_update_slice(total, own + part.astype(total.dtype), starts)


def _forward_local(ring: Ring, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """(out, lse less the bias's largest number) of a device's queries."""
    request = ring.request(arrays)
    local = _Local(ring, request, merge.largest(request.bias))
    n, travel = ring.order.devices, local.travel
    states = [merge.nothing(local.pair(travel, 0, 0, 0)[1]) for _ in local.pieces]
    if n > 1:
        coming = local.passed_on(travel)
        states, travel = local.attend(travel, states, (0,), 0), coming
    if n > 2:

        def step(carry: Any, r: Any) -> Any:
            travel, states = carry
            coming = local.passed_on(travel)
            return (coming, local.attend(travel, states, range(1, n - 1), r)), None

        (travel, states), _ = lax.scan(step, (travel, states), jnp.arange(1, n - 1, dtype=jnp.int32))
    states = local.attend(travel, states, (n - 1,), n - 1)
    finished = [
        merge.with_sinks(state, merge.sinks_less(request.sinks, local.rows(local.top, n_q, 2)), request.heads_axis)
        for n_q, state in zip(local.pieces, states, strict=True)
    ]
    out = jnp.concatenate([out for out, _ in finished], request.length_axis)
    return out.astype(request.query.dtype), jnp.concatenate([lse for _, lse in finished], 2)


def _backward_local(ring: Ring, specs: SdpaRequest, arrays: Sequence[Any], *given: Any) -> dict[str, Any]:
    """The cotangents of a device's share of the operands; given: out, lse (less the bias's largest number), dout, dlse or None."""
    request = ring.request(arrays)
    local = _Local(ring, request, merge.largest(request.bias))
    n, travel = ring.order.devices, local.travel
    wrt = tuple(name for name in WRT if getattr(request, name) is not None)
    sums = {name: jnp.zeros(getattr(request, name).shape, local.dtype) for name in ("query", "bias", "scale") if name in wrt}

    def visited(travel: Any, sums: Any, keys: Any, steps: Sequence[int], r: Any) -> Any:
        arrived = local.passed_on(keys)  # the sums of these same keys, from the device that had them before
        sums, more = local.gradients(travel, sums, given, wrt, steps, r)
        return sums, jax.tree.map(jnp.add, arrived, more)

    coming = local.passed_on(travel) if n > 1 else travel
    sums, keys = local.gradients(travel, sums, given, wrt, (0,), 0)
    if n > 2:

        def step(carry: Any, r: Any) -> Any:
            travel, sums, keys = carry
            coming = local.passed_on(travel)
            return (coming, *visited(travel, sums, keys, range(1, n - 1), r)), None

        (coming, sums, keys), _ = lax.scan(step, (coming, sums, keys), jnp.arange(1, n - 1, dtype=jnp.int32))
    if n > 1:
        sums, keys = visited(coming, sums, keys, (n - 1,), n - 1)
        keys = local.passed_on(keys)  # home
    found = {**sums, "key": keys[0], "value": keys[1]}
    if request.sinks is not None:
        out, lse, dout, dlse = given
        delta, top = scores.row_deltas(request, out, lse, dout, dlse), 0 if local.top is None else local.top[..., 0]
        found["sinks"] = sinks_gradient(request, lse, delta, top)
    over = (ring.axes.sequence, *ring.axes.batch, *ring.axes.heads)
    return {name: ring.axes.summed(x, getattr(specs, name), over).astype(getattr(request, name).dtype) for name, x in found.items()}


def _forward(ring: Ring, arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    request = ring.request(arrays)
    specs = tuple(leaves(ring.specs(request)))
    mapped = jax.shard_map(
        functools.partial(_forward_local, ring),
        mesh=ring.axes.mesh,
        in_specs=specs,
        out_specs=ring.out_specs(request),
        check_vma=False,
    )
    return mapped(*ring.axes.placed(arrays, specs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(ring: Ring, arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of the request whose leaves are `arrays`, laid out as `ring.specs` says."""
    out, low = _forward(ring, arrays)
    return out, merge.whole(low, merge.largest(ring.request(arrays).bias))


def _attend_fwd(ring: Ring, arrays: tuple[Any, ...]) -> Any:
    out, low = _forward(ring, arrays)
    out, low = checkpoint_name(out, primitive.OUT_NAME), checkpoint_name(low, primitive.LSE_NAME)
    return (out, merge.whole(low, merge.largest(ring.request(arrays).bias))), (arrays, out, low)


def _attend_bwd(ring: Ring, residuals: Any, cotangents: Any) -> Any:
    arrays, out, low = residuals
    dout, dlse = cotangents
    request = ring.request(arrays)
    specs, (out_spec, lse_spec) = ring.specs(request), ring.out_specs(request)
    names = tuple(name for name in DIFFERENTIABLE if getattr(request, name) is not None)
    given, given_specs = [out, low, dout], [out_spec, lse_spec, out_spec]
    if ring.with_dlse:
        given, given_specs = [*given, dlse], [*given_specs, lse_spec]

    def local(arrays: Any, *given: Any) -> dict[str, Any]:
        return _backward_local(ring, specs, arrays, *given, *([] if ring.with_dlse else [None]))

    mapped = jax.shard_map(
        local, mesh=ring.axes.mesh, in_specs=(tuple(leaves(specs)), *given_specs),
        out_specs={name: getattr(specs, name) for name in names}, check_vma=False,
    )  # fmt: skip
    placed = ring.axes.placed(arrays, leaves(specs))
    found = mapped(tuple(placed), *ring.axes.placed(given, given_specs))
    places = ring.request(range(len(arrays)))
    cotangents = [None] * len(arrays)
    for name, cotangent in found.items():
        cotangents[getattr(places, name)] = cotangent
    return (tuple(cotangents),)


attend.defvjp(_attend_fwd, _attend_bwd)
