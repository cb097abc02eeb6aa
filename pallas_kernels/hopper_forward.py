"""Attention forward on Hopper (sm_90), Mosaic GPU: FlashAttention-2's tiles with FlashAttention-3's warp specialisation.

Algorithm: Dao, arXiv:2307.08691, algorithm 1 (rows own their softmax, keys stream past); Shah et al., arXiv:2407.08608, sections
3.1 and 3.2 (a loading warpgroup feeds computing ones; the next QK and the last PV are in flight under the softmax).

Grid (batch, query head, row tile); row tiles with most work first, where they differ. A program owns `warpgroups` x 64 query
rows of one head and walks the key tiles that its mask leaves, in one loop; a branch in it masks the tiles that the mask cuts
(two overlapped loops, one masked and one not, would be the usual way: ptxas then serialises every wgmma, C7513, NOTES.md).

Who waits for what, per stage of the ring (a slot holds one tile of K and one of V):

    k_ready, v_ready   loader -> computers    the tile has arrived (TMA counts its bytes)
    k_free, v_free     computers -> loader    every computing warpgroup has read it
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.contracts import ForwardConfig, Ids
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.online_softmax import LOG2E, over_columns

TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class ForwardShape:
    """The static facts of a call: what the kernel is compiled for."""

    batch: int
    q_heads: int
    kv_heads: int
    query_len: int
    key_len: int
    head_dim: int
    value_head_dim: int
    dtype: Any
    layout: str  # 'BHLE' or 'BLHE'
    scale: float | None  # None: an operand
    softcap: float | None = None
    dropout_p: float = 0.0
    sinks: bool = False

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads


def _ranges(mask: Any, q_lo: Any, rows: int, shape: ForwardShape, block_k: int) -> tuple[Any, Any, Any, Any]:
    """(first, first FULL, behind the last FULL, behind the last) key tile of the rows [q_lo, q_lo + rows); at least one tile."""
    L, S = shape.query_len, shape.key_len
    lo, hi, full_lo, full_hi = 0, S, 0, S
    if mask is not None:
        lo, hi = mask.kv_range(q_lo, q_lo + rows, L, S)
        full_lo, full_hi = mask.full_range(q_lo, q_lo + rows, L, S)
    tiles = cdiv(S, block_k)

    def divided(x: Any) -> Any:  # by block_k; nothing here is negative
        x = jnp.asarray(x, jnp.int32)
        return lax.div(x, jnp.full_like(x, block_k))

    first = jnp.minimum(divided(lo), tiles - 1)
    last = jnp.maximum(divided(hi + (block_k - 1)), first + 1)
    full_first = jnp.clip(divided(full_lo + (block_k - 1)), first, last)
    full_last = jnp.clip(divided(full_hi), full_first, last)
    return first, full_first, full_last, last


def _all_ranges(mask: Any, shape: ForwardShape, rows: int, block_k: int) -> jax.Array:
    """(B|1, row tiles, 4): `_ranges` of every program, made by XLA; for masks whose ids a program cannot look through."""

    def of_tile(q_lo: Any) -> jax.Array:
        found = (jnp.atleast_1d(bound) for bound in _ranges(mask, q_lo, rows, shape, block_k))
        return jnp.stack(jnp.broadcast_arrays(*found), axis=-1)

    return jax.vmap(of_tile, out_axes=1)(jnp.arange(cdiv(shape.query_len, rows), dtype=jnp.int32) * rows)


def forward(
    shape: ForwardShape, config: ForwardConfig, mask: Any = None, *, generator: Any = None, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function (query, key, value, *, mask_arrays, sinks, seeds, scale) -> (out, lse).

    `out = softmax(scale * q @ k.T, kept keys) @ v`, lse (B, Hq, L) natural and float32. TMA wants lengths in eights: the arrays
    may be longer than the shape's L and S, by zeros; out is as long as query. Head dims are multiples of 16.

    Args:
        mask: a `contracts.Mask`, or None; its leaves, (1,) or (B,) or ids (1|B, length), all int32, are the mask_arrays.
        generator: what makes dropout bits, with `query_words`, `key_words`, `keep_words` and `rounded`; None without dropout.
        interpret: `plgpu.InterpretGPUParams` to run it without a GPU.
    """
    B, Hq, L, S = shape.batch, shape.q_heads, shape.query_len, shape.key_len
    E, Ev, dtype = shape.head_dim, shape.value_head_dim, shape.dtype
    bq, bk, n_wg = config.block_q, config.block_k, config.warpgroups
    stages = min(config.stages, cdiv(S, bk))
    tiles_q = cdiv(L, config.rows)
    products = Wgmma(interpret is not None)
    drops = shape.dropout_p > 0
    arrays, structure = jax.tree.flatten(mask)
    has_ids = any(len(array.shape) == 2 for array in arrays)
    leaves = len(arrays) + has_ids
    ragged = S % bk != 0
    # a positive factor may wait for the exponent; any other is applied to the scores, where softcap wants it too
    waits = shape.scale is not None and shape.scale > 0 and shape.softcap is None
    factor = shape.scale * LOG2E if waits else LOG2E  # pyright: ignore[reportOptionalOperand]

    def transforms(dim: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(dim * 16, "attention tile")
        return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

    def at(ref: Any, b: Any, start: Any, length: int, h: Any) -> Any:
        """Rows [start, start + length) of one head of an operand."""
        return ref.at[b, h, pl.ds(start, length)] if shape.layout == "BHLE" else ref.at[b, pl.ds(start, length), h]

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, q_s: Any, k_s: Any, v_s: Any, lse_s: Any, q_ready: Any, k_ready: Any,
        v_ready: Any, k_free: Any, v_free: Any, out_s: Any = None,
    ) -> None:  # fmt: skip
        given = list(refs)
        mask_refs, given = given[:leaves], given[leaves:]
        sinks_ref: Any = given.pop(0) if shape.sinks else None
        seeds_ref: Any = given.pop(0) if drops else None
        scale_ref: Any = given.pop(0) if shape.scale is None else None
        out_ref, lse_ref = given
        b, h, tile, wg = (lax.axis_index(name) for name in ("b", "h", "q", "wg"))
        tile = tiles_q - 1 - tile  # causal: the last rows have most keys, and start first
        # the walk goes from the last key tile to the first: step i takes tile last - 1 - i

        def entry(ref: Any) -> Any:
            return 0 if ref.shape[0] == 1 else b

        def mask_at(by_query: Any = None, by_key: Any = None) -> Any:
            """The mask with the numbers of this batch entry, and the ids of a tile."""
            if mask is None:
                return None
            of_refs = jax.tree.unflatten(structure, mask_refs[: len(arrays)])
            return of_refs.local(lambda ref: ref[entry(ref)], by_query, by_key)

        def ranges(q_lo: Any, rows: int) -> tuple[Any, Any, Any, Any]:
            if not has_ids:
                return _ranges(mask_at(), q_lo, rows, shape, bk)
            found = mask_refs[-1]
            return tuple(found[entry(found), tile, n] for n in range(4))  # type: ignore[return-value]

        first, _, _, last = ranges(tile * config.rows, config.rows)
        steps = last - first

        def slot(i: Any) -> Any:
            return lax.rem(i, jnp.int32(stages))

        @pl.when(wg < n_wg)
        def _compute() -> None:
            if interpret is None:
                plgpu.set_max_registers(config.registers[0], action="increase")
            base = tile * config.rows + wg * bq
            q_tile = q_s.at[wg]
            plgpu.copy_gmem_to_smem(at(q_ref, b, base, bq, h), q_tile, q_ready.at[wg])
            _, full_first, full_last, _ = ranges(base, bq)
            words: Any = None
            if drops:
                rows = plgpu.broadcasted_iota(jnp.int32, (bq,), 0, layout=ROW) + base
                words = generator.query_words(seeds_ref[b, h, 0], seeds_ref[b, h, 1], rows)

            def full(shape_: tuple[int, ...], value: Any, layout: Any) -> Any:
                return plgpu.layout_cast(jnp.full(shape_, value, jnp.float32), layout)

            def k_idx(i: Any) -> Any:
                return plgpu.broadcasted_iota(jnp.int32, (bq, bk), 1, layout=TILE) + (last - 1 - i) * bk

            def ids(ref: Any, start: Any, length: int, layout: Any, axis: int) -> Ids:
                tile_ref = ref.at[entry(ref), pl.ds(start, length)]
                loaded = plgpu.load(tile_ref, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue] (0.10 had an index)
                return Ids(lax.broadcast_in_dim(loaded, (bq, bk), [axis]))

            def kept(i: Any) -> Any:
                k = k_idx(i)
                inside = k < S
                if mask is None:
                    return inside
                q = plgpu.broadcasted_iota(jnp.int32, (bq, bk), 0, layout=TILE) + base
                own = mask_at(
                    functools.partial(ids, start=base, length=bq, layout=ROW, axis=0),
                    functools.partial(ids, start=(last - 1 - i) * bk, length=bk, layout=COLUMN, axis=1),
                )
                return own.keep(q, k) & inside if ragged else own.keep(q, k)

            def is_partial(i: Any) -> Any:
                return (last - 1 - i < full_first) | (last - 1 - i >= full_last)

            def softmax(s: Any, m: Any, l: Any, i: Any) -> tuple[Any, ...]:
                """(m, l, shrink, p in the operands' dtype) after step i's scores (bq, bk)."""
                if not waits:
                    s = s * (shape.scale if scale_ref is None else scale_ref[entry(scale_ref)])
                if shape.softcap is not None:
                    # tanh(x) = 1 - 2 / (1 + e**2x): the hardware's tanh has 11 bits
                    s = shape.softcap - (2 * shape.softcap) / (1 + jnp.exp2(s * (2 * LOG2E / shape.softcap)))
                if mask is not None or ragged:
                    s = lax.cond(is_partial(i), lambda s: jnp.where(kept(i), s, -jnp.inf), lambda s: s, s)
                m, l, shrink, p = online_softmax.update(s, factor, m, l)
                if drops:
                    a, c = words
                    keep = generator.keep_words(
                        over_columns(a, p), over_columns(c, p), generator.key_words(seeds_ref[b, h, 1], k_idx(i)), shape.dropout_p
                    )
                    # the barrier keeps the select on float32: on halves ptxas serialises wgmma (C7513, NOTES.md)
                    p = lax.optimization_barrier(jnp.where(keep, p, 0.0))
                return m, l, shrink, p.astype(dtype)

            m, l = full((bq,), -jnp.inf, ROW), full((bq,), 0.0, ROW)
            if sinks_ref is not None:
                sink = sinks_ref[0 if sinks_ref.shape[0] == 1 else b, h] * LOG2E
                m, l = full((bq,), sink, ROW), full((bq,), jnp.where(sink == -jnp.inf, 0.0, 1.0), ROW)
            acc = full((bq, Ev), 0.0, TILE)
            plgpu.barrier_wait(q_ready.at[wg])

            if config.overlap:
                plgpu.barrier_wait(k_ready.at[0])
                s = products.scores(q_tile, k_s.at[0])
                plgpu.barrier_arrive(k_free.at[0])
                m, l, _, p = softmax(s, m, l, jnp.int32(0))

                def overlapped(i: Any, state: Any) -> Any:
                    acc, m, l, p = state
                    now, before = slot(i), slot(i - 1)
                    plgpu.barrier_wait(k_ready.at[now])
                    acc, (m, l, shrink, p) = products.step(
                        q_tile, k_s.at[now], acc, p, v_s.at[before],
                        lambda: plgpu.barrier_wait(v_ready.at[before]), lambda: plgpu.barrier_arrive(k_free.at[now]),
                        functools.partial(softmax, i=i), (m, l),
                    )  # fmt: skip
                    plgpu.barrier_arrive(v_free.at[before])
                    return acc * over_columns(shrink, acc), m, l, p

                acc, m, l, p = lax.fori_loop(jnp.int32(1), steps, overlapped, (acc, m, l, p))
                end = slot(steps - 1)
                plgpu.barrier_wait(v_ready.at[end])
                acc = products.add(acc, p, v_s.at[end])
                plgpu.barrier_arrive(v_free.at[end])
            else:

                def plain(i: Any, state: Any) -> Any:
                    acc, m, l = state
                    now = slot(i)
                    plgpu.barrier_wait(k_ready.at[now])
                    s = products.scores(q_tile, k_s.at[now])
                    plgpu.barrier_arrive(k_free.at[now])
                    m, l, shrink, p = softmax(s, m, l, i)
                    acc = acc * over_columns(shrink, acc)
                    plgpu.barrier_wait(v_ready.at[now])
                    acc = products.add(acc, p, v_s.at[now])
                    plgpu.barrier_arrive(v_free.at[now])
                    return acc, m, l

                acc, m, l = lax.fori_loop(jnp.int32(0), steps, plain, (acc, m, l))

            share, lse = online_softmax.finish(m, l)
            if drops:
                share = share * (1 / (1 - generator.rounded(shape.dropout_p)))
            out_tile = q_tile if out_s is None else out_s.at[wg]  # q is read for the last time: its memory will do
            out_tile[...] = (acc * over_columns(share, acc)).astype(dtype)
            lse_s[wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, at(out_ref, b, base, bq, h))

            @pl.when(base < L)  # a contiguous copy is clipped at the end of the whole array only, not of a head's row
            def _() -> None:
                plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[b, h, pl.ds(base, bq)])

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == n_wg)
        def _load() -> None:
            if interpret is None:
                plgpu.set_max_registers(config.registers[1], action="decrease")
            kv_head = lax.div(h, jnp.int32(shape.group))

            def load(i: Any, _: Any, wait: bool) -> None:
                start, now = (last - 1 - i) * bk, slot(i)
                if wait:
                    plgpu.barrier_wait(k_free.at[now])
                plgpu.copy_gmem_to_smem(at(k_ref, b, start, bk, kv_head), k_s.at[now], k_ready.at[now])
                if wait:
                    plgpu.barrier_wait(v_free.at[now])
                plgpu.copy_gmem_to_smem(at(v_ref, b, start, bk, kv_head), v_s.at[now], v_ready.at[now])

            filled = jnp.minimum(steps, stages)
            lax.fori_loop(jnp.int32(0), filled, functools.partial(load, wait=False), None)
            lax.fori_loop(filled, steps, functools.partial(load, wait=True), None)

            def drain(i: Any, _: Any) -> None:  # every completed phase must be waited for before the program ends
                plgpu.barrier_wait(k_free.at[slot(i)])
                plgpu.barrier_wait(v_free.at[slot(i)])

            lax.fori_loop(steps - filled, steps, drain, None)

    rows_out = cdiv(L, 8) * 8
    out_shape = (B, Hq, rows_out, Ev) if shape.layout == "BHLE" else (B, rows_out, Hq, Ev)
    lse_len = cdiv(L, bq) * bq  # whole tiles are stored
    smem, barrier = plgpu.SMEM, plgpu.Barrier
    call = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(out_shape, dtype), jax.ShapeDtypeStruct((B, Hq, lse_len), jnp.float32)],
        grid=(B, Hq, tiles_q),
        grid_names=("b", "h", "q"),
        num_threads=n_wg + 1,
        thread_name="wg",
        scratch_types={
            "q_s": smem((n_wg, bq, E), dtype, transforms=transforms(E)),
            "k_s": smem((stages, bk, E), dtype, transforms=transforms(E)),
            "v_s": smem((stages, bk, Ev), dtype, transforms=transforms(Ev)),
            **({} if E == Ev else {"out_s": smem((n_wg, bq, Ev), dtype, transforms=transforms(Ev))}),
            "lse_s": smem((n_wg, bq), jnp.float32),
            "q_ready": barrier(num_barriers=n_wg),
            "k_ready": barrier(num_barriers=stages),
            "v_ready": barrier(num_barriers=stages),
            "k_free": barrier(num_arrivals=n_wg, num_barriers=stages),
            "v_free": barrier(num_arrivals=n_wg, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )

    def run(
        query: Any, key: Any, value: Any, *, mask_arrays: Sequence[Any] = (), sinks: Any = None, seeds: Any = None, scale: Any = None
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        if has_ids:
            whole = jax.tree.unflatten(structure, mask_arrays)
            found = _all_ranges(whole, shape, config.rows, bk)
            whole = whole.padded(tiles_q * config.rows - L, cdiv(S, bk) * bk - S)  # a tile's ids are loaded whole
            mask_arrays = [*jax.tree.leaves(whole), found]
        more = []
        if shape.sinks:
            more.append(sinks.astype(jnp.float32))
        if drops:
            more.append(jnp.broadcast_to(seeds, (B, Hq, 2)))
        if shape.scale is None:
            more.append(scale.astype(jnp.float32))
        out, lse = call(query, key, value, *mask_arrays, *more)
        return out, lse[:, :, :L]

    return run
