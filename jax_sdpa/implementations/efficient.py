"""EFFICIENT: blockwise attention in plain XLA, memory O(L) for every mask, bias and dropout included, forward and backward.

The forward is the online softmax of Milakov and Gimelshein (arXiv:1805.02867) by blocks, as in FlashAttention-2
(arXiv:2307.08691, algorithm 1): for each block of rows a running maximum m, sum l and accumulator, rescaled as m grows.
`plans.py` cuts a request, `chunks.py` hands out the pieces, `efficient_backward.py` has the derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa import compat
from jax_sdpa.context import SDPBackend
from jax_sdpa.device import Device
from jax_sdpa.implementations import efficient_backward, plans, scores
from jax_sdpa.implementations.base import Implementation, Tangents
from jax_sdpa.implementations.chunks import Chunks, as_bits, from_bits, loop
from jax_sdpa.implementations.tiles import Tiles, block_at, blocks_to_visit, loop_over_keys, pad, pieces
from jax_sdpa.request import SdpaRequest

hold = lax.optimization_barrier  # keeps XLA from recomputing a tile in each of its consumers, and from fusing what is faster apart


def attention(request: SdpaRequest, plan: plans.Plan, seen: Any = None) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a request, by one of the two walks; seen: `scores.seen` of it, None: all values are numbers."""
    padded = _padded(request, plan)
    out, lse = _walk(padded, plan, _store, _no_keys(padded), seen)
    out = from_bits(out, request.query.dtype)
    if padded is request:
        return out, lse
    return lax.slice_in_dim(out, 0, request.query_len, axis=request.length_axis), lse[:, :, : request.query_len]


def decode(request: SdpaRequest, plan: plans.Plan) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a step with few rows and traced ranges of keys: in place where these are most of the keys, else by `plan`.

    What is hidden is read in place as well. Its scores are selected away, and a value that is a number counts nothing, as its
    weight is 0. One that is none makes a result that is none: then, too, the call goes by blocks, which clear such values.
    """
    L, S = request.query_len, request.key_len
    lo, hi = request.mask.kv_range(0, L, L, S)
    visited = jnp.mean(jnp.asarray(hi - lo, jnp.float32))

    def all_at_once() -> tuple[jax.Array, jax.Array]:
        return attention(request, plans.in_place(request))

    def nothing() -> tuple[jax.Array, jax.Array]:
        lse_dtype = scores.compute_dtype(request)
        return jnp.full(request.out_shape, jnp.nan, request.query.dtype), jnp.zeros(request.lse_shape, lse_dtype)

    out, lse = lax.cond(visited > S / 2, all_at_once, nothing)
    return lax.cond(jnp.isfinite(out).all(), lambda: (out, lse), lambda: attention(request, plan, scores.seen(request)))


def row_sums(request: SdpaRequest, lse: jax.Array, plan: plans.Plan) -> tuple[jax.Array, jax.Array]:
    """(m, l), (B, Hq, L), with p = exp(s - m) / l exactly: what lse = m + log(l) cannot hold where m is large.

    A row whose mask is -1e9 throughout has lse = -1e9 whatever the number of its keys: in float32 log(l) is lost, and exp(s - lse)
    would be 1 for each. Only a float mask makes such rows, and only if the lse of some row is that large is the pass made again.
    """
    ordinary = lse, jnp.ones_like(lse)
    if request.bias is None or request.spec.part:  # whoever takes a softmax apart keeps its lse small (`sharding.ring`)
        return ordinary
    one = dataclasses.replace(request, value=request.value[..., :1], dropout_seeds=None)
    padded = _padded(one, plan)

    def again() -> tuple[jax.Array, jax.Array]:
        shape, dtype = padded.lse_shape, lse.dtype
        carry = jnp.full(shape, jnp.finfo(dtype).min, dtype), jnp.zeros(shape, dtype)
        m, l = (x[:, :, : request.query_len] for x in _walk(padded, plan, _store_sums, carry))
        return jnp.where(jnp.isneginf(lse), -jnp.inf, m), jnp.where(l == 0, 1, l)

    lost = jnp.any((jnp.abs(lse) > LARGE_LSE) & jnp.isfinite(lse))
    return lax.cond(lost, again, lambda: ordinary)


LARGE_LSE = 256.0  # the step of float32 there is 3e-5: as much error in p as an lse of ordinary size has in a few products


Store = Callable[[Chunks, Any, Any, jax.Array, jax.Array, jax.Array, Any], Any]


def _padded(request: SdpaRequest, plan: plans.Plan) -> SdpaRequest:
    """Whole blocks of rows; keys are not copied for the sake of their last block, unless their number is symbolic."""
    if plan.whole:
        return request
    return pad(request, plan.block_q, plan.block_k if compat.is_symbolic(request.key_len) else 1)


def _walk(request: SdpaRequest, plan: plans.Plan, store: Store, carry: Any, seen: Any = None) -> Any:
    """carry after every row block is stored. seen: (B|1, S) bool, the keys of which values must be numbers; None: all are."""
    if seen is not None and seen.shape[1] != request.key_len:
        seen = lax.pad(seen, jnp.asarray(False), ((0, 0, 0), (0, request.key_len - seen.shape[1], 0)))
    return (_by_whole_rows if plan.whole else _by_blocks)(request, Chunks(request, plan.nb, plan.nh, seen), plan, store, carry)


def _no_keys(request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
    """What rows give that no block visits, the arrays to write the others into: 0 (as bits), and -inf or the sink."""
    lse_dtype = scores.compute_dtype(request)
    lse = jnp.full(request.lse_shape, -jnp.inf, lse_dtype)
    if request.sinks is not None:
        lse = jnp.broadcast_to(request.sinks[:, :, None].astype(lse_dtype), request.lse_shape)
    return as_bits(jnp.zeros(request.out_shape, request.query.dtype)), lse


def _store(chunks: Chunks, c: Any, q0: Any, m: jax.Array, l: jax.Array, acc: jax.Array, carry: Any) -> Any:
    """Write a finished row block: acc / l and m + log(l); a row with l = 0 has no keys and gives 0 and -inf."""
    out = acc * jnp.where(l == 0, 0, 1 / l)[..., None]
    lse = m + jnp.log(l)
    return chunks.put(carry[0], out, c, q0, chunks.request.group), chunks.put_row(carry[1], lse, c, q0)


def _store_sums(chunks: Chunks, c: Any, q0: Any, m: jax.Array, l: jax.Array, acc: jax.Array, carry: Any) -> Any:
    """Write m and l themselves."""
    return chunks.put_row(carry[0], m, c, q0), chunks.put_row(carry[1], l, c, q0)


def _by_whole_rows(request: SdpaRequest, chunks: Chunks, plan: plans.Plan, store: Store, carry: Any) -> Any:
    """Each row block against its whole range of keys, in pieces of which only the partial ones are masked."""
    tiles = Tiles(chunks)
    L = request.query_len
    for q0 in range(0, L, plan.block_q):
        bq = min(plan.block_q, L - q0)
        ranges = pieces(request, q0, bq)
        if not ranges:
            continue

        def body(c: Any, carry: Any, q0: int = q0, bq: int = bq, ranges: Any = ranges) -> Any:
            shared = chunks.shared(c)
            lo, hi = ranges[0][0], ranges[-1][1]
            rows, keys = chunks.rows(c, shared, q0, bq), chunks.keys(c, lo, hi - lo)
            values = chunks.values(c, lo, hi - lo, any(masked for _, _, masked in ranges))
            s = hold([tiles.scores(shared, rows, keys[:, a - lo : b - lo], q0, a, masked) for a, b, masked in ranges])
            m, l = tiles.first_state(shared, bq)
            for tile in s:
                m = jnp.maximum(m, tile.max(-1))
            m = hold(m)
            l = l * jnp.exp(tiles.first_state(shared, bq)[0] - m) if request.sinks is not None else l
            p = hold([jnp.exp(tile - m[..., None]) for tile in s])
            l = hold(l + sum(tile.sum(-1) for tile in p))
            acc = jnp.zeros((), chunks.dtype)
            for tile, (a, b, _) in zip(p, ranges, strict=True):
                acc = acc + tiles.products.times(tiles.drop(shared, tile, q0, a), values[:, a - lo : b - lo])
            return store(chunks, c, q0, m, l, acc, carry)

        carry = chunks.each(body, carry)
    return carry


def _by_blocks(request: SdpaRequest, chunks: Chunks, plan: plans.Plan, store: Store, carry: Any) -> Any:
    """Loops over row blocks and the key blocks that their mask leaves to visit, with an online softmax."""
    tiles = Tiles(chunks)
    bq, bk = plan.block_q, plan.block_k
    R = request.group

    def body(c: Any, carry: Any) -> Any:
        shared = chunks.shared(c)

        def row_block(i: Any, carry: Any) -> Any:
            q0 = i * bq
            rows = chunks.rows(c, shared, q0, bq)

            def step(j: Any, state: Any, masked: bool) -> Any:
                m, l, acc = state
                k0, after = block_at(request, j, bk)
                s = tiles.scores(shared, rows, chunks.keys(c, k0, bk), q0, k0, masked, after)
                m_new = jnp.maximum(m, s.max(-1))
                p = jnp.exp(s - m_new[..., None])
                shrink = jnp.exp(m - m_new)
                values = chunks.values(c, k0, bk, masked)
                acc = acc * shrink[..., None] + tiles.products.times(tiles.drop(shared, p, q0, k0), values)
                return m_new, l * shrink + p.sum(-1), acc

            state = (*tiles.first_state(shared, bq), jnp.zeros((chunks.n, R * bq, request.value_head_dim), chunks.dtype))
            state = loop_over_keys(blocks_to_visit(shared, q0, bq, bk), step, state)
            m, l, acc = state
            return store(chunks, c, q0, m, l, acc, carry)

        return loop(0, request.query_len // bq, row_block, carry)

    return chunks.each(body, carry)


def sanitised(request: SdpaRequest) -> SdpaRequest:
    """The request with zeros in place of the keys that a structured mask hides from every query."""
    if not request.masks:
        return request
    return dataclasses.replace(request, key=scores.seen_only(request, request.key), value=scores.seen_only(request, request.value))


@dataclasses.dataclass(frozen=True)
class Efficient(Implementation):
    """Blockwise attention in plain XLA: everywhere, every dtype, every mask."""

    on_cpu: bool = True
    backend = SDPBackend.EFFICIENT_ATTENTION
    heading = "Memory efficient kernel not used because:"

    def for_device(self, device: Device) -> Implementation:
        return Efficient(on_cpu=device.platform == "cpu")

    def reasons_against(self, request: SdpaRequest, device: Device) -> list[str]:
        if compat.is_symbolic(request.kv_heads) or compat.is_symbolic(request.q_heads):
            return ["Memory efficient attention needs a number of heads that is a number; here it is symbolic."]
        return []

    def takes_eight_bits(self, request: SdpaRequest) -> bool:
        return True  # a block at a time

    def _plan(self, request: SdpaRequest, direction: str) -> plans.Plan:
        return plans.cpu_plan(request, direction) if self.on_cpu else plans.wide_plan(request)

    def run(self, request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
        plan = self._plan(request, "forward")
        if self.on_cpu and not plan.whole and request.masks and plans.reads_in_place(request):
            return decode(request, plan)
        return attention(request, plan, scores.seen(request))

    def row_sums(self, request: SdpaRequest, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`row_sums` by this device's plan."""
        return row_sums(request, lse, self._plan(request, "forward"))

    def tangent(self, request: SdpaRequest, out: jax.Array, lse: jax.Array, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
        request = sanitised(request)
        plan = dataclasses.replace(self._plan(request, "backward"), whole=False)
        sums = self.row_sums(request, lse)
        return efficient_backward.tangent(request, out, lse, sums, tangents, plan)

    def backward(
        self, request: SdpaRequest, out: jax.Array, lse: jax.Array, dout: Any, dlse: Any, wrt: tuple[str, ...]
    ) -> Tangents:
        request = sanitised(request)
        sums = self.row_sums(request, lse)
        return efficient_backward.backward(request, out, lse, sums, dout, dlse, wrt, self._plan(request, "backward"))
