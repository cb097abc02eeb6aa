"""Attention forward on Hopper (sm_90), Mosaic GPU: FlashAttention-2's tiles with FlashAttention-3's warp specialisation.

Algorithm: Dao, arXiv:2307.08691, algorithm 1 (rows own their softmax, keys stream past); Shah et al., arXiv:2407.08608, sections
3.1 and 3.2 (a loading warpgroup feeds computing ones; the next QK and the last PV are in flight under the softmax).

Grid: programs, each with a few items one after another (`visits.Items`: batch entry, query head, row tile). An item is
`warpgroups` x 64 query rows of one head, which walk the key tiles that the mask leaves (`visits`), in one loop; a branch in it
masks the tiles that the mask cuts (two overlapped loops, one masked and one not, would be the usual way: ptxas then serialises
every wgmma, C7513, NOTES.md).

Who waits for what, per stage of the ring (a slot holds one tile of K, of V, of a bias as large as the scores); the ring goes
round and round over all items:

    q_ready                        a warpgroup's own rows have arrived; it asks for the next item's when it starts with one
    k_ready, v_ready, bias_ready   loader -> computers    the tile has arrived (TMA counts its bytes)
    k_free, v_free, bias_free      computers -> loader    every computing warpgroup has read it
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, online_softmax, visits
from pallas_kernels.contracts import ForwardConfig, ForwardShape, Ids
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.online_softmax import LOG2E, over_columns
from pallas_kernels.visits import cdiv

TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def forward(
    shape: ForwardShape, config: ForwardConfig, mask: Any = None, *, bias: Any = None, keep: Any = None, generator: Any = None,
    interpret: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:  # fmt: skip
    """A function (query, key, value, *, mask_arrays, bias, keep, sinks, seeds, scale) -> (out, lse).

    `out = softmax(scale * q @ k.T + bias, kept keys) @ v`, lse (B, Hq, L) natural and float32. TMA wants lengths in eights: the
    arrays may be longer than the shape's L and S, by zeros; out is as long as query. Head dims are multiples of 16.

    Args:
        mask: a `contracts.Mask`, or None; its leaves, (1,) or (B,) or ids (1|B, length), all int32, are the mask_arrays.
        bias, keep: a float and a bool array (B|1, Hq|1, L|1, S|1), here what has their shape and dtype. A bias as large as the
            scores may be longer by anything.
        generator: what makes dropout bits, with `query_words`, `key_words`, `keep_words` and `rounded`; None without dropout.
        interpret: `plgpu.InterpretGPUParams` to run it without a GPU.
    """
    B, Hq, L, S = shape.batch, shape.q_heads, shape.query_len, shape.key_len
    E, Ev, dtype = shape.head_dim, shape.value_head_dim, shape.dtype
    bq, bk, n_wg, stages = config.block_q, config.block_k, config.warpgroups, config.stages
    items = visits.Items(B, Hq, cdiv(L, config.rows), config.row_tiles)
    several = config.row_tiles > 1
    own_out = several or E != Ev  # results leave from memory of their own; else from q's, which has been read by then
    products = Wgmma(interpret is not None)
    drops = shape.dropout_p > 0
    arrays, structure = jax.tree.flatten(mask)
    has_ids = any(len(array.shape) == 2 for array in arrays)
    bias_kind = None if bias is None else dense.kind(bias)
    keep_kind = None if keep is None else dense.kind(keep)
    ragged = S % bk != 0
    # a positive factor may wait for the exponent; any other is applied to the scores, where softcap and bias want it too
    waits = shape.scale is not None and 1e-30 < shape.scale < 1e30 and shape.softcap is None and bias is None
    factor = shape.scale * LOG2E if waits else LOG2E  # pyright: ignore[reportOptionalOperand]

    def transforms(dim: int, dtype: Any = dtype) -> tuple[Any, ...]:
        """The layout in shared memory that wgmma and TMA share: the widest swizzle of which `dim` is a multiple."""
        bits = 8 * jnp.dtype(dtype).itemsize
        swizzle = plgpu.find_swizzle(dim * bits, "attention tile")
        return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)

    def at(ref: Any, b: Any, start: Any, length: int, h: Any) -> Any:
        """Rows [start, start + length) of one head of an operand."""
        return ref.at[b, h, pl.ds(start, length)] if shape.layout == "BHLE" else ref.at[b, pl.ds(start, length), h]

    def shared(ref: Any, *index: Any) -> tuple[Any, ...]:
        """The leading indices of an operand that may be shared by the batch, or by all heads."""
        return tuple(0 if size == 1 else i for size, i in zip(ref.shape, index, strict=False))

    def kernel(*refs: Any, q_s: Any, k_s: Any, v_s: Any, lse_s: Any, q_ready: Any, k_ready: Any, v_ready: Any, k_free: Any,
               v_free: Any, pin_s: Any = None, out_s: Any = None, bias_s: Any = None, bias_ready: Any = None,
               bias_free: Any = None) -> None:  # fmt: skip
        given = iter(refs)
        q_ref, k_ref, v_ref = next(given), next(given), next(given)
        mask_refs = [next(given) for _ in arrays]
        table_ref = next(given) if has_ids or keep is not None else None
        keep_ref = None if keep is None else next(given)
        bias_ref = None if bias is None else next(given)
        sinks_ref = next(given) if shape.sinks else None
        seeds_ref = next(given) if drops else None
        scale_ref = next(given) if shape.scale is None else None
        out_ref, lse_ref = given
        program, wg = lax.axis_index("program"), lax.axis_index("wg")
        count = items.count(program)

        zero = 0 * program  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands

        def loop(start: Any, stop: Any, body: Callable[..., Any], state: Any) -> Any:
            return lax.fori_loop(start + zero, stop + zero, body, state)

        def mask_at(b: Any, by_query: Any = None, by_key: Any = None) -> Any:
            """The mask with the numbers of this batch entry, and the ids of a tile."""
            if mask is None:
                return None
            return jax.tree.unflatten(structure, mask_refs).local(lambda ref: ref[shared(ref, b)], by_query, by_key)

        def walk_of(b: Any, h: Any, tile: Any, q_lo: Any, rows: int) -> Any:
            if keep is not None:
                return visits.ListWalk(table_ref, shared(table_ref, b, h, tile))
            if has_ids:
                return visits.RangeWalk(*(table_ref[(*shared(table_ref, b), tile, n)] for n in range(4)))  # type: ignore[index]
            return visits.ranges(mask_at(b), q_lo, rows, L, S, bk)

        def slot(n: Any, of: int = stages) -> Any:
            return lax.rem(n, np.int32(of))

        def q_slot(n: Any) -> Any:
            return wg + n_wg * slot(n + zero, 2) if several else wg

        def load_q(n: Any) -> None:
            """Ask for this warpgroup's rows of item n."""
            b, h, tile = items.at(program, n)
            plgpu.copy_gmem_to_smem(
                at(q_ref, b, tile * config.rows + wg * bq, bq, h), q_s.at[q_slot(n)], q_ready.at[q_slot(n)]
            )  # fmt: skip

        def filled(shape_: tuple[int, ...], value: Any, layout: Any) -> Any:
            return plgpu.layout_cast(jnp.full(shape_, value, jnp.float32), layout)

        def scene(n: Any, done: Any) -> tuple[Any, Any, Any, Any]:
            """Item n for one computing warpgroup: (steps, keep_words(i), first (m, l), softmax(s, m, l, i, packed)); `done` steps
            of the ring lie behind it."""
            b, h, tile = items.at(program, n)
            base = tile * config.rows + wg * bq
            walk = walk_of(b, h, tile, tile * config.rows, config.rows)
            if not has_ids and keep is None:  # of the tiles that all warpgroups visit, fewer are partial for one's own rows
                own = walk_of(b, h, tile, base, bq)
                walk = dataclasses.replace(walk, full_first=own.full_first, full_last=own.full_last)
            words: Any = None
            if drops:
                rows = plgpu.broadcasted_iota(jnp.int32, (bq,), 0, layout=ROW) + base
                words = generator.query_words(seeds_ref[b, h, 0], seeds_ref[b, h, 1], rows)  # type: ignore[index]

            def index(axis: int, start: Any = 0) -> Any:
                return plgpu.broadcasted_iota(jnp.int32, (bq, bk), axis, layout=TILE) + start

            def loaded(ref: Any, start: Any, length: int, layout: Any, axis: int) -> Any:
                """A stretch of a 1-d operand along one axis of the tile."""
                where = ref.at[pl.ds(start, length)]
                vector = plgpu.load(where, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue] (0.10 had an index)
                return lax.broadcast_in_dim(vector, (bq, bk), [axis])

            def columns(t: Any) -> tuple[Any, Any]:
                """(here, k): the keys of tile t are here + k, and k is a constant for each register: the bits of a column but 1 and
                2, which are the thread's. Positions that count from `here` cost no register; whole indices cost one each, in all
                of the loop, and spill."""
                column = index(1)
                return (column & 6) + t * bk, column & ~6

            by_row = functools.partial(loaded, start=base, length=bq, layout=ROW, axis=0)

            def keep_words(i: Any) -> list[Any]:
                """The packed dense mask of step i; loaded before the products, for the softmax."""
                if keep is None:
                    return []
                t = walk.tile(i)
                lead = shared(keep_ref, b, h)
                one_word = keep_kind in ("row", "scalar")
                found = [0] if one_word else [t * (bk // dense.WORD) + n for n in range(bk // dense.WORD)]
                if keep_kind in ("column", "scalar"):
                    return [jnp.full((bq, bk), keep_ref[(*lead, n, 0)], jnp.int32) for n in found]  # type: ignore[index]
                return [by_row(keep_ref.at[(*lead, n)]) for n in found]  # type: ignore[union-attr]

            def addend(t: Any, number: Any) -> Any:
                """The bias of key tile t, float32; the tile is the ring's of that number."""
                lead = shared(bias_ref, b, h)
                if bias_kind == "scalar":
                    return bias_ref[(*lead, 0)]  # type: ignore[index]
                if bias_kind == "row":
                    return by_row(bias_ref.at[lead])  # type: ignore[union-attr]
                if bias_kind == "column":
                    return loaded(bias_ref.at[lead], t * bk, bk, COLUMN, 1)  # type: ignore[union-attr]
                now = slot(number, config.bias_stages)
                plgpu.barrier_wait(bias_ready.at[now])
                found = plgpu.load(bias_s.at[now, pl.ds(wg * bq, bq)], layout=TILE)  # pyright: ignore[reportCallIssue]
                products.read()
                plgpu.barrier_arrive(bias_free.at[now])
                return found.astype(jnp.float32)

            def masked(s: Any, t: Any, packed: list[Any]) -> Any:
                if keep is not None:
                    s = jnp.where(dense.unpack(packed, index(1)), s, -jnp.inf)
                if mask is None and not ragged:
                    return s
                here, k = columns(t)
                kept: Any = True
                if mask is not None:
                    ids = lambda ref, **where: Ids(loaded(ref.at[shared(ref, b)], **where))  # noqa: E731
                    own_mask = mask_at(
                        b, functools.partial(ids, start=base, length=bq, layout=ROW, axis=0),
                        functools.partial(ids, start=t * bk, length=bk, layout=COLUMN, axis=1),
                    )  # fmt: skip
                    kept = own_mask.moved(here).keep(index(0, base) - here, k)
                if ragged:
                    kept = kept & (k < S - here)
                return jnp.where(plgpu.layout_cast(kept, TILE), s, -jnp.inf)

            def softmax(s: Any, m: Any, l: Any, i: Any, packed: list[Any]) -> tuple[Any, ...]:
                """(m, l, shrink, p), float32, after step i's scores (bq, bk)."""
                t = walk.tile(i)
                if not waits:
                    s = s * (shape.scale if scale_ref is None else scale_ref[shared(scale_ref, b)])
                if shape.softcap is not None:
                    # tanh(x) = 1 - 2 / (1 + e**2x): the hardware's tanh has 11 bits
                    s = shape.softcap - (2 * shape.softcap) / (1 + jnp.exp2(s * (2 * LOG2E / shape.softcap)))
                if bias is not None:
                    s = s + addend(t, done + i)
                if mask is not None or keep is not None or ragged:
                    cut = walk.partial(i)
                    if drops:  # beside the words of dropout a branch spills: every tile is masked
                        cut = True
                    if not isinstance(cut, bool):
                        s = lax.cond(cut, lambda s: masked(s, t, packed), lambda s: s, s)
                    elif cut:
                        s = masked(s, t, packed)
                m, l, shrink, p = online_softmax.update(s, factor, m, l, huge=bias is not None)
                if drops:
                    a, c = words
                    here, k = columns(t)
                    key_words = generator.key_words(seeds_ref[b, h, 1], here + k)  # type: ignore[index]
                    kept = generator.keep_words(over_columns(a, p), over_columns(c, p), key_words, shape.dropout_p)
                    # the barrier keeps the select on float32: on halves ptxas serialises wgmma (C7513, NOTES.md)
                    p = lax.optimization_barrier(jnp.where(kept, p, 0.0))
                return m, l, shrink, p

            m, l = filled((bq,), -jnp.inf, ROW), filled((bq,), 0.0, ROW)
            if sinks_ref is not None:
                sink = sinks_ref[(*shared(sinks_ref, b), h)]
                sink = jnp.where(sink == -jnp.inf, sink, jnp.clip(sink, -1e30, 1e30)) * (LOG2E / factor)
                m, l = filled((bq,), sink, ROW), filled((bq,), jnp.where(sink == -jnp.inf, 0.0, 1.0), ROW)
            return walk.steps, keep_words, (m, l), softmax

        def finish(n: Any, acc: Any, m: Any, l: Any) -> None:
            """Store the results of item n."""
            b, h, tile = items.at(program, n)
            base = tile * config.rows + wg * bq
            share, lse = online_softmax.finish(m, l, factor, huge=bias is not None)
            if drops:
                share = share * (1 / (1 - generator.rounded(shape.dropout_p)))
            if several:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's results have left
            out_tile = out_s.at[wg] if own_out else q_s.at[wg]
            plgpu.commit_smem()
            out_tile[...] = (acc * over_columns(share, acc)).astype(dtype)
            lse_s[wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, at(out_ref, b, base, bq, h))

            @pl.when(base < L)  # a contiguous copy is clipped at the end of the whole array only, not of a head's row
            def _() -> None:
                plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[b, h, pl.ds(base, bq)])

        def attend(n: Any, state: Any) -> Any:
            """All steps of item n but those that lie behind already; the state is of the last step, whose PV is still to come."""
            done, acc, m, l, p = state
            steps, keep_words, (m_first, l_first), softmax = scene(n, done)
            q_tile = q_s.at[q_slot(n)]

            def step(i: Any, state: Any) -> Any:
                acc, m, l, p = state
                now, before = slot(done + i), slot(done + i - 1)
                packed, m_now, l_now = keep_words(i), m, l
                if several:
                    m_now, l_now = lax.cond(i == 0, lambda m, l: (m_first, l_first), lambda m, l: (m, l), m, l)

                    @pl.when(i == 0)
                    def _() -> None:
                        plgpu.barrier_wait(q_ready.at[q_slot(n)])
                        plgpu.commit_smem()  # all four warps have read the last item's q, and its memory is the next one's
                        pl.when(n + 1 < count)(lambda: load_q(n + 1))

                plgpu.barrier_wait(k_ready.at[now])
                acc, (m_now, l_now, shrink, p) = products.step(
                    q_tile, k_s.at[now], acc, p, v_s.at[before],
                    lambda: plgpu.barrier_wait(v_ready.at[before]), lambda: plgpu.barrier_arrive(k_free.at[now]),
                    functools.partial(softmax, i=i, packed=packed), (m_now, l_now), pin_s.at[wg] if config.pinned else None,
                )  # fmt: skip
                plgpu.barrier_arrive(v_free.at[before])
                if not several:
                    return acc * over_columns(shrink, acc), m_now, l_now, p

                def last_item(acc: Any) -> Any:
                    finish(n - 1, acc, m, l)
                    return filled((bq, Ev), 0.0, TILE)

                return lax.cond(i == 0, last_item, lambda acc: acc * over_columns(shrink, acc), acc), m_now, l_now, p

            start = jnp.where(n == 0, np.int32(1), np.int32(0)) if several else 1
            return done + steps, *loop(start, steps, step, (acc, m, l, p))

        def compute() -> None:
            """One computing warpgroup: the first step, then each with the last one's PV, then that of the very last."""
            load_q(0)
            if several:
                pl.when(count > 1)(lambda: load_q(1))
            steps, keep_words, (m, l), softmax = scene(0, zero)
            packed = keep_words(0)
            plgpu.barrier_wait(q_ready.at[q_slot(0)])
            plgpu.barrier_wait(k_ready.at[0])
            s = products.scores(q_s.at[q_slot(0)], k_s.at[0])
            plgpu.barrier_arrive(k_free.at[0])
            m, l, _, p = softmax(s, m, l, 0, packed)
            p = p.astype(dtype)
            state = (zero, filled((bq, Ev), 0.0, TILE), m, l, p)
            if several:
                state = loop(0, count, attend, state)
            elif not (isinstance(steps, int) and steps == 1):
                state = attend(0, state)
            else:  # no loop: an unused iota in it would keep Mosaic's layout inference searching for a minute, and fail
                state = (zero + 1, *state[1:])
            done, acc, m, l, p = state
            end = slot(done - 1)
            plgpu.barrier_wait(v_ready.at[end])
            acc = products.add(acc, p, v_s.at[end])
            plgpu.barrier_arrive(v_free.at[end])
            finish(count - 1 if several else 0, acc, m, l)
            plgpu.wait_smem_to_gmem(0)

        def load(n: Any, done: Any) -> Any:
            """The tiles of item n, as soon as there is room; `done` as in attend."""
            b, h, tile = items.at(program, n)
            walk = walk_of(b, h, tile, tile * config.rows, config.rows)
            kv_head = lax.div(h, np.int32(shape.group))

            def step(i: Any, _: Any) -> None:
                t, number = walk.tile(i), done + i

                def bring(source: Any, target: Any, ready: Any, free: Any, of: int) -> None:
                    now = slot(number, of)
                    pl.when(number >= of)(lambda: plgpu.barrier_wait(free.at[now]))
                    plgpu.copy_gmem_to_smem(source, target.at[now], ready.at[now])

                bring(at(k_ref, b, t * bk, bk, kv_head), k_s, k_ready, k_free, stages)
                if bias_s is not None:
                    where = pl.ds(tile * config.rows, config.rows), pl.ds(t * bk, bk)
                    bring(bias_ref.at[(*shared(bias_ref, b, h), *where)], bias_s, bias_ready, bias_free, config.bias_stages)  # type: ignore[union-attr]
                bring(at(v_ref, b, t * bk, bk, kv_head), v_s, v_ready, v_free, stages)

            loop(0, walk.steps, step, None)
            return done + walk.steps

        @pl.when(wg < n_wg)
        def _compute() -> None:
            if interpret is None:
                plgpu.set_max_registers(config.registers[0], action="increase")
            compute()

        @pl.when(wg == n_wg)
        def _load() -> None:
            if interpret is None:
                plgpu.set_max_registers(config.registers[1], action="decrease")
            done = loop(0, count, load, zero) if several else load(0, zero)

            # every completed phase must be waited for before the program ends
            for free, of in ((k_free, stages), (v_free, stages), (bias_free, config.bias_stages)):
                if free is not None:
                    wait = lambda number, _, free=free, of=of: plgpu.barrier_wait(free.at[slot(number, of)])  # noqa: E731
                    loop(visits.greatest(done - of, 0), done, wait, None)

    rows_out = cdiv(L, 8) * 8
    out_shape = (B, Hq, rows_out, Ev) if shape.layout == "BHLE" else (B, rows_out, Hq, Ev)
    lse_len = cdiv(L, bq) * bq  # whole tiles are stored
    smem, barrier = plgpu.SMEM, plgpu.Barrier
    q_slots = 2 * n_wg if several else n_wg
    bias_transforms = transforms(math.gcd(bk, bias.shape[3]), bias.dtype) if bias is not None and bias_kind == "tile" else ()
    free = barrier(num_arrivals=n_wg, num_barriers=stages)
    call = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(out_shape, dtype), jax.ShapeDtypeStruct((B, Hq, lse_len), jnp.float32)],
        grid=(items.programs,),
        grid_names=("program",),
        num_threads=n_wg + 1,
        thread_name="wg",
        scratch_types={
            "q_s": smem((q_slots, bq, E), dtype, transforms=transforms(E)),
            "k_s": smem((stages, bk, E), dtype, transforms=transforms(E)),
            "v_s": smem((stages, bk, Ev), dtype, transforms=transforms(Ev)),
            **({"out_s": smem((n_wg, bq, Ev), dtype, transforms=transforms(Ev))} if own_out else {}),
            "lse_s": smem((n_wg, bq), jnp.float32),
            **({"pin_s": smem((n_wg, bq), jnp.float32)} if config.pinned else {}),
            "q_ready": barrier(num_barriers=q_slots),
            "k_ready": barrier(num_barriers=stages),
            "v_ready": barrier(num_barriers=stages),
            "k_free": free,
            "v_free": free,
            **({
                "bias_s": smem((config.bias_stages, config.rows, bk), bias.dtype, transforms=bias_transforms),
                "bias_ready": barrier(num_barriers=config.bias_stages),
                "bias_free": barrier(num_arrivals=n_wg, num_barriers=config.bias_stages),
            } if bias is not None and bias_kind == "tile" else {}),
        },
        # no cross-warp reduction: a row of a WGMMA tile lies within four threads
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=True,
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip

    def run(
        query: Any, key: Any, value: Any, *, mask_arrays: Sequence[Any] = (), bias: Any = None, keep: Any = None, sinks: Any = None,
        seeds: Any = None, scale: Any = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        whole = jax.tree.unflatten(structure, mask_arrays)
        more = []
        if keep is not None:
            words = dense.pack(keep, config.rows, bk)
            more += [visits.listed(words, whole, config.rows, L, S, bk), words]
        elif has_ids:
            more.append(visits.table(whole, config.rows, L, S, bk))
        if has_ids:  # a tile's ids are loaded whole
            mask_arrays = jax.tree.leaves(whole.padded(items.row_tiles * config.rows - L, cdiv(S, bk) * bk - S))
        if bias is not None:
            more.append(dense.lay_out(bias, config.rows, bk))
        if shape.sinks:
            more.append(sinks.astype(jnp.float32))
        if drops:
            more.append(jnp.broadcast_to(seeds, (B, Hq, 2)))
        if shape.scale is None:
            more.append(scale.astype(jnp.float32))
        out, lse = call(query, key, value, *mask_arrays, *more)
        return out, lse[:, :, :L]

    return run
