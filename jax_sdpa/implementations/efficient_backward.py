"""The derivatives of the blockwise backend, from (out, lse): nothing that the forward computed is kept but those.

With p = exp(s - lse), keep = the dropout multipliers and delta = sum(out * dout) - dlse per row (FlashAttention-2,
arXiv:2307.08691, algorithm 2; the cotangent of lse joins delta with the opposite sign):

    dv = (p * keep).T @ dout        dp = (dout @ v.T) * keep        ds = p * (dp - delta)
    dq = scale * ds @ k             dk = scale * ds.T @ q           dbias = ds summed over the dims that bias shares

Tiles are (keys, rows): all five products then have the left operand that XLA's CPU library wants (see `chunks.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa.implementations import scores
from jax_sdpa.implementations.base import Tangents
from jax_sdpa.implementations.chunks import Chunks, as_bits, from_bits, loop, slice_at, write_at
from jax_sdpa.implementations.plans import Plan
from jax_sdpa.implementations.tiles import Tiles, blocks_to_visit, loop_over_keys, pad, pieces
from jax_sdpa.request import SdpaRequest

hold = lax.optimization_barrier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """The cotangents under construction, whole arrays: dq, dk, dv in their operands' layout, dbias in its shape, dscale (B,)."""

    dq: Any
    dk: Any
    dv: Any
    dbias: Any = None
    dscale: Any = None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A row block of a chunk, with its share of what the backward starts from."""

    q0: Any
    rows: jax.Array  # (n, R * bq, E), scaled
    dout: jax.Array  # (n, R * bq, Ev)
    top: jax.Array  # (n, 1, R * bq): p = exp(s - top) * share; +inf in rows without keys, so that p is 0
    share: jax.Array | None  # (n, 1, R * bq); None: 1
    delta: jax.Array  # (n, 1, R * bq)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """A backward pass over one request, cut into chunks."""

    request: SdpaRequest
    chunks: Chunks
    dout: jax.Array
    top: jax.Array
    share: jax.Array | None  # None: lse is all there is to know, top
    delta: jax.Array

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.chunks)

    def row_block(self, c: Any, shared: SdpaRequest, q0: Any, bq: Any) -> _Rows:
        chunks = self.chunks
        return _Rows(
            q0,
            chunks.rows(c, shared, q0, bq),
            chunks.take(self.dout, c, q0, bq, self.request.group),
            chunks.take_row(self.top, c, q0, bq)[:, None],
            None if self.share is None else chunks.take_row(self.share, c, q0, bq)[:, None],
            chunks.take_row(self.delta, c, q0, bq)[:, None],
        )

    def tile(
        self, shared: SdpaRequest, block: _Rows, keys: jax.Array, values: jax.Array, k0: Any, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(dk, dv, dq.T, ds) of one tile: (n, bk, E) unscaled by the keys' factor, (n, bk, Ev), (n, E, R * bq), (n, bk, R * bq)."""
        tiles, products = self.tiles, self.tiles.products
        s, slope = scores.cap(shared, tiles.logits(block.rows, keys, by_key=True))
        s = hold(tiles.masked(shared, s, block.q0, k0, masked, by_key=True))
        p = hold(jnp.exp(s - block.top) if block.share is None else jnp.exp(s - block.top) * block.share)
        dp = hold(products.by_transpose(values, block.dout))
        ds = hold(p * (tiles.drop(shared, dp, block.q0, k0, by_key=True) - block.delta))
        ds_raw = ds if slope is None else ds * slope
        dv = products.times(tiles.drop(shared, p, block.q0, k0, by_key=True), block.dout)
        return products.times(ds_raw, block.rows), dv, products.times(jnp.swapaxes(keys, 1, 2), ds_raw), ds

    def add_bias(self, dbias: Any, ds: jax.Array, c: Any, q0: Any, k0: Any) -> Any:
        """dbias with a tile's ds (n, bk, R * bq) added where the bias's tile lies, summed over the dims it shares."""
        if dbias is None:
            return None
        chunks, (_, bk, rows) = self.chunks, ds.shape
        R = self.request.group
        ds = ds.reshape(chunks.nb, chunks.nh, bk, R, rows // R)
        ds = jnp.transpose(ds, (0, 1, 3, 4, 2)).reshape(chunks.nb, chunks.nh * R, rows // R, bk)
        shared_dims = tuple(axis for axis in range(4) if isinstance(dbias.shape[axis], int) and dbias.shape[axis] == 1)
        ds = ds.sum(shared_dims, keepdims=True).astype(dbias.dtype)
        b0, h0 = chunks.start_in(dbias, c)
        starts = (b0, h0, 0 if 2 in shared_dims else q0, 0 if 3 in shared_dims else k0)
        return write_at(dbias, slice_at(dbias, starts, ds.shape) + ds, starts)

    def finish_rows(self, sums: Sums, c: Any, shared: SdpaRequest, q0: Any, bq: Any, dq_t: jax.Array) -> Sums:
        """sums with a row block's dq written: the factor of the rows times dq_t.T; and the scale's cotangent, q . dq_t.T."""
        chunks, R = self.chunks, self.request.group
        dq = jnp.swapaxes(dq_t, 1, 2)
        if self.request.scale is None:
            dq = dq * (chunks.factors.rows * chunks.factors.scores)
            return dataclasses.replace(sums, dq=chunks.put(sums.dq, dq, c, q0, R))
        dscale = sums.dscale
        if dscale is not None:
            q = chunks.take(self.request.query, c, q0, bq, R)
            own = (q * dq).reshape(chunks.nb, -1).sum(-1)
            b0 = chunks.start(c)[:1]
            dscale = write_at(dscale, slice_at(dscale, b0, own.shape) + own, b0)
        factor = chunks.per_head(shared.scale[:, None].astype(dq.dtype))
        dq = (dq.reshape(chunks.n, R, -1) * factor).reshape(dq.shape)
        return dataclasses.replace(sums, dq=chunks.put(sums.dq, dq, c, q0, R), dscale=dscale)

    @property
    def key_factor(self) -> float:
        """What the sums of ds.T @ rows are still to be multiplied by."""
        return self.chunks.factors.keys * self.chunks.factors.scores

    def by_whole_rows(self, sums: Sums, block_q: int) -> Sums:
        """Each row block against its whole range of keys, row blocks unrolled."""
        request, chunks = self.request, self.chunks
        for q0 in range(0, request.query_len, block_q):
            bq = min(block_q, request.query_len - q0)
            ranges = pieces(request, q0, bq)

            def body(c: Any, sums: Sums, q0: int = q0, bq: int = bq, ranges: Any = ranges) -> Sums:
                shared = chunks.shared(c)
                block = self.row_block(c, shared, q0, bq)
                dq_t: Any = 0
                for a, b, masked in ranges:
                    keys, values = chunks.keys(c, a, b - a), chunks.take(request.value, c, a, b - a)
                    dk, dv, more, ds = self.tile(shared, block, keys, values, a, masked)
                    dq_t = dq_t + more
                    if q0 > 0:
                        dk = dk + chunks.take(sums.dk, c, a, b - a, dtype=chunks.dtype)
                        dv = dv + chunks.take(sums.dv, c, a, b - a, dtype=chunks.dtype)
                    dbias = self.add_bias(sums.dbias, ds, c, q0, a)
                    put_k, put_v = chunks.put(sums.dk, dk, c, a), chunks.put(sums.dv, dv, c, a)
                    sums = dataclasses.replace(sums, dk=put_k, dv=put_v, dbias=dbias)
                return self.finish_rows(sums, c, shared, q0, bq, dq_t)

            sums = chunks.each(body, sums) if ranges else sums
        return sums

    def by_blocks(self, sums: Sums, bq: Any, bk: Any) -> Sums:
        """Loops over row blocks and the key blocks that their mask leaves to visit; dk and dv of a chunk add up in float32."""
        request, chunks = self.request, self.chunks
        n, S = chunks.n, request.key_len

        def body(c: Any, sums: Sums) -> Sums:
            shared = chunks.shared(c)

            def row_block(i: Any, carry: Any) -> Any:
                sums, dk_sum, dv_sum = carry
                block = self.row_block(c, shared, i * bq, bq)

                def step(j: Any, state: Any, masked: bool) -> Any:
                    dq_t, dk_sum, dv_sum, dbias = state
                    keys, values = chunks.keys(c, j * bk, bk), chunks.take(request.value, c, j * bk, bk)
                    dk, dv, more, ds = self.tile(shared, block, keys, values, j * bk, masked)
                    dbias = self.add_bias(dbias, ds, c, i * bq, j * bk)
                    return dq_t + more, _add_at(dk_sum, dk, j * bk), _add_at(dv_sum, dv, j * bk), dbias

                state = (jnp.zeros((n, request.head_dim, request.group * bq), chunks.dtype), dk_sum, dv_sum, sums.dbias)
                dq_t, dk_sum, dv_sum, dbias = loop_over_keys(blocks_to_visit(shared, i * bq, bq, bk), step, state)
                sums = self.finish_rows(dataclasses.replace(sums, dbias=dbias), c, shared, i * bq, bq, dq_t)
                return sums, dk_sum, dv_sum

            zeros = [jnp.zeros((n, S, dim), chunks.dtype) for dim in (request.head_dim, request.value_head_dim)]
            sums, dk_sum, dv_sum = loop(0, request.query_len // bq, row_block, (sums, *zeros))
            put_k, put_v = chunks.put(sums.dk, dk_sum, c, 0), chunks.put(sums.dv, dv_sum, c, 0)
            return dataclasses.replace(sums, dk=put_k, dv=put_v)

        return chunks.each(body, sums)


def _add_at(total: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    """total (n, S, d) with a block added at keys `start` and on."""
    starts = (0, start, 0)
    return write_at(total, slice_at(total, starts, block.shape) + block, starts)


def _pad_rows(like: SdpaRequest, request: SdpaRequest, x: jax.Array, axis: int, fill: float = 0) -> jax.Array:
    """x with as many more query positions as `like` has than `request`."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (0, like.query_len - request.query_len, 0)
    return lax.pad(x, jnp.asarray(fill, x.dtype), widths)


RowSums = tuple[jax.Array, jax.Array]  # (m, l) of `efficient.row_sums`


def _top_and_share(request: SdpaRequest, sums: RowSums) -> tuple[jax.Array, jax.Array | None]:
    """(m, 1 / l) with +inf for the m of rows without keys; no 1 / l where m is lse and l 1."""
    m, l = sums
    return jnp.where(jnp.isneginf(m), jnp.inf, m), None if request.bias is None else 1 / l


def backward(
    request: SdpaRequest,
    out: jax.Array,
    lse: jax.Array,
    row_sums: RowSums,
    dout: Any,
    dlse: Any,
    wrt: tuple[str, ...],
    plan: Plan,
) -> Tangents:
    """The cotangents of the operands named in `wrt`."""
    dtype = scores.compute_dtype(request)
    dout = jnp.zeros_like(out) if dout is None else scores.existing_only(request, lse, dout)
    delta = scores.row_deltas(request, out, lse, dout, dlse)
    if request.masks:
        request = dataclasses.replace(request, query=scores.existing_only(request, lse, request.query))

    found: Tangents = {}
    if "sinks" in wrt:
        found["sinks"] = sinks_gradient(request, lse, delta)

    padded = request if plan.whole else pad(request, plan.block_q, plan.block_k)
    top, share = _top_and_share(request, row_sums)
    top, share = _pad_rows(padded, request, top, 2, jnp.inf), None if share is None else _pad_rows(padded, request, share, 2)
    dout, delta = _pad_rows(padded, request, dout, request.length_axis), _pad_rows(padded, request, delta, 2)
    work = _Backward(padded, Chunks(padded, plan.nb, plan.nh), dout, top, share, delta)
    sum_dtype = dtype if plan.whole and request.query_len > plan.block_q else padded.key.dtype
    sums = Sums(
        as_bits(jnp.zeros(padded.query.shape, padded.query.dtype)),
        as_bits(jnp.zeros(padded.key.shape, sum_dtype)),
        as_bits(jnp.zeros(padded.value.shape, sum_dtype)),
        jnp.zeros(padded.bias.shape, dtype) if "bias" in wrt else None,
        jnp.zeros((request.batch,), dtype) if "scale" in wrt else None,
    )
    sums = work.by_whole_rows(sums, plan.block_q) if plan.whole else work.by_blocks(sums, plan.block_q, plan.block_k)

    sums = jax.tree.map(lambda x: from_bits(x, request.query.dtype), sums)
    dk = sums.dk if work.key_factor == 1.0 else sums.dk * work.key_factor
    for name, sum_ in (("query", sums.dq), ("key", dk), ("value", sums.dv), ("bias", sums.dbias), ("scale", sums.dscale)):
        if name in wrt:
            operand = getattr(request, name)
            sum_ = _summed(sum_, operand) if name == "scale" else sum_
            found[name] = lax.slice(sum_, (0,) * sum_.ndim, operand.shape).astype(operand.dtype)
    return found


def _of_sinks(request: SdpaRequest, lse: jax.Array, top: Any = 0) -> jax.Array:
    """The sinks' probabilities, (B, Hq, L). top: what lse comes less, (B|1, Hq|1, L|1)."""
    return jnp.exp(request.sinks[:, :, None] - top - jnp.where(jnp.isneginf(lse), jnp.inf, lse))


def sinks_gradient(request: SdpaRequest, lse: jax.Array, delta: jax.Array, top: Any = 0) -> jax.Array:
    """dsinks = -sum(p_sink * delta): a sink is a key without a value. top: what lse comes less."""
    return _summed(jnp.sum(-_of_sinks(request, lse, top) * delta, -1), request.sinks)


def _summed(cotangent: jax.Array, operand: jax.Array) -> jax.Array:
    """A cotangent per batch entry in the operand's shape: summed where the batch shares it."""
    shared = isinstance(operand.shape[0], int) and operand.shape[0] == 1
    return (cotangent.sum(0, keepdims=True) if shared else cotangent).astype(operand.dtype)


def tangent(
    request: SdpaRequest, out: jax.Array, lse: jax.Array, row_sums: RowSums, tangents: Tangents, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """(dout, dlse): the same tiles, rows by keys.

    ds = d(scores)        dlse = sum(p * ds)        dout = (p * ds * keep) @ v + (p * keep) @ dv - dlse * out
    """
    dtype = scores.compute_dtype(request)
    moving = dataclasses.replace(
        request, **{name: tangents.get(name, jnp.zeros_like(getattr(request, name))) for name in ("query", "key", "value")},
        bias=tangents.get("bias"), keep_mask=None, scale=request.scale,
    )  # fmt: skip
    moving = dataclasses.replace(moving, key=scores.seen_only(request, moving.key), value=scores.seen_only(request, moving.value))
    if request.masks:
        clean = {name: scores.existing_only(request, lse, x.query) for name, x in (("q", request), ("dq", moving))}
        request, moving = dataclasses.replace(request, query=clean["q"]), dataclasses.replace(moving, query=clean["dq"])
    original, bq, bk = request, plan.block_q, plan.block_k
    request, moving = pad(request, bq, bk), pad(moving, bq, bk)
    top, share = _top_and_share(original, row_sums)
    top, share = _pad_rows(request, original, top, 2, jnp.inf), None if share is None else _pad_rows(request, original, share, 2)
    chunks, moving_chunks = Chunks(request, plan.nb, plan.nh), Chunks(moving, plan.nb, plan.nh)
    tiles, R = Tiles(chunks), request.group
    dscale = tangents.get("scale")

    def body(c: Any, carry: Any) -> Any:
        shared, dshared = chunks.shared(c), moving_chunks.shared(c)

        def row_block(i: Any, carry: Any) -> Any:
            q0 = i * bq
            rows, drows = chunks.rows(c, shared, q0, bq), moving_chunks.rows(c, shared, q0, bq)
            if dscale is not None:
                factor = Chunks(dataclasses.replace(request, scale=dscale), plan.nb, plan.nh).shared(c).scale
                q = chunks.take(request.query, c, q0, bq, R).reshape(chunks.n, R, -1)
                drows = drows + (q * chunks.per_head(factor[:, None].astype(dtype))).reshape(rows.shape)
            row_top = chunks.take_row(top, c, q0, bq)[..., None]
            row_share = 1 if share is None else chunks.take_row(share, c, q0, bq)[..., None]

            def step(j: Any, state: Any, masked: bool) -> Any:
                acc, dlse = state
                k0 = j * bk
                keys, dkeys = chunks.keys(c, k0, bk), moving_chunks.keys(c, k0, bk)
                values, dvalues = chunks.take(request.value, c, k0, bk), chunks.take(moving.value, c, k0, bk)
                s, slope = scores.cap(shared, tiles.logits(rows, keys))
                p = jnp.exp(tiles.masked(shared, s, q0, k0, masked) - row_top) * row_share
                ds = tiles.logits(drows, keys) + tiles.logits(rows, dkeys)
                ds = ds if slope is None else ds * slope
                if (addend := scores.addend(dshared, q0, bq, k0, bk, dtype)) is not None:
                    ds = chunks.apply(jnp.add, ds, addend)
                moved = p * ds
                acc = acc + tiles.products.times(tiles.drop(shared, moved, q0, k0), values)
                return acc + tiles.products.times(tiles.drop(shared, p, q0, k0), dvalues), dlse + moved.sum(-1)

            shape = (chunks.n, R * bq)
            state = (jnp.zeros((*shape, request.value_head_dim), dtype), jnp.zeros(shape, dtype))
            acc, dlse = loop_over_keys(blocks_to_visit(shared, q0, bq, bk), step, state)
            return chunks.put(carry[0], acc, c, q0, R), chunks.put_row(carry[1], dlse, c, q0)

        return loop(0, request.query_len // bq, row_block, carry)

    dout, dlse = chunks.each(body, (jnp.zeros(request.out_shape, dtype), jnp.zeros(request.lse_shape, dtype)))
    dout, dlse = lax.slice(dout, (0,) * 4, original.out_shape), lax.slice(dlse, (0,) * 3, original.lse_shape)
    if "sinks" in tangents:
        dlse = dlse + _of_sinks(request, lse) * tangents["sinks"][:, :, None]
    dout = dout - out.astype(dtype) * scores.beside_out(dlse, request.heads_axis)
    return dout.astype(out.dtype), dlse.astype(lse.dtype)
