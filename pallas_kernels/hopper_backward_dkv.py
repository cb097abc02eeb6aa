"""dK and dV, and fused with them dQ, on Hopper (sm_90), Mosaic GPU: the backward whose programs own keys.

Algorithm: as in `hopper_backward_dq`. Tiles are transposed, (keys, queries), so that p.T and ds.T are left operands of their
products straight from registers (FlashAttention-3's backward does the same, arXiv:2407.08608):

    s = k @ q.T    dp = v @ dout.T    p = exp(s - lse)    ds = p * (dp - delta)    dv += p @ dout    dk += ds @ q

Grid: programs, one item each: batch entry, key/value head, key tile of `warpgroups` x 64 keys. It walks, for each query head of the
group, the query tiles that the mask leaves, so dk and dv of the group's heads add up in registers. Where that makes too few
programs, config.split of them divide the group's heads.

Fused: ds goes through shared memory once and each warpgroup makes a part of dq = ds.T @ k from it, a step later, which a TMA
reduce-add puts into a float32 workspace; 5 products for the split pair's 7. Key tiles add in any order: dq's last bits vary.

Who waits for what, per stage of the rings (a slot of one holds a tile of Q and its rows' numbers, of the other one of dO); s of the
next step is begun in this one, so Q has `ahead` stages more, where they fit:

    ds_ready, ds_free     between the computing warpgroups: ds of all keys lies in its buffer, one of two; all have read it
    kv_ready              the program's keys and values have arrived
    q_ready, do_ready     loader -> computers: the tile has arrived
    q_free, do_free       computers -> loader: every computing warpgroup has read it
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import visits
from pallas_kernels.contracts import ForwardShape, WalkConfig
from pallas_kernels.hopper_backward_products import BackwardWgmma, Spread
from pallas_kernels.hopper_gradients import GradientRows
from pallas_kernels.hopper_memory import rows_of, tile
from pallas_kernels.hopper_operands import DELTA, LSE, SUM, Operands
from pallas_kernels.hopper_program import drain, in_roles, launch, slot
from pallas_kernels.hopper_scores import COLUMN, ROW, TILE, filled, survivor_scale, walk_of
from pallas_kernels.visits import cdiv


def dkv(
    shape: ForwardShape, config: WalkConfig, operands: Operands, *, wants: tuple[str, ...] = ("dk", "dv"), fused: bool = False,
    adds_up: bool = False, interpret: Any = None,
) -> Callable[..., list[jax.Array]]:  # fmt: skip
    """A function (query, key, value, dout, numbers, words, *operands.arrays) -> the arrays of `wants`, as long as key is, with
    config.split heads for each of its heads, to be added up.

    fused: dq / scale as well. The function takes behind all others a reference to zeros (B, Hq, whole query tiles, E) float32, into
    which it adds. The interpreter knows no reduce-add: there, it is one more result, with a leading dim of key tiles to be summed.

    adds_up: and, behind the others, ds summed over the queries of each head, (B, Hq, whole key tiles) float32, for a bias of keys;
    with dk only.

    Rows are keys: config.block_q of them a warpgroup, config.block_k queries a tile; `operands` are transposed. numbers: as for
    `dq`, to whole tiles; words: dropout's of every query, (B, Hq, 2, as long) uint32, or None.
    """
    B, H, E, Ev, dtype = shape.batch, shape.kv_heads, shape.head_dim, shape.value_head_dim, shape.dtype
    bk, bq, n_wg, stages = config.block_q, config.block_k, config.warpgroups, config.stages
    group, split, drops = shape.group, config.split, shape.dropout_p > 0
    q_stages = stages if fused else stages + config.ahead
    do_stages = stages if fused else config.brief_stages
    needs_v = "dk" in wants
    by_rows = bq == config.rows  # the part of dq that a warpgroup makes: its rows of the tile, else its columns
    part = (bk, E) if by_rows else (bq, E // n_wg)
    own_dv = not needs_v and E != Ev  # dk and dv leave from the memory of k and v; dv alone from that of k, if it has its size
    items = visits.Items(B, H * split, cdiv(shape.key_len, config.rows), 1)
    products = BackwardWgmma(interpret is not None)
    recipe = operands.recipe(dataclasses.replace(shape, query_len=shape.key_len, key_len=shape.query_len), config, products)
    at = functools.partial(rows_of, shape.layout)

    def kernel(*given: Any, k_s: Any, q_s: Any, do_s: Any, numbers_s: Any, kv_ready: Any, q_ready: Any, do_ready: Any, q_free: Any,
               do_free: Any, v_s: Any = None, words_s: Any = None, ds_s: Any = None, dq_s: Any = None,
               ds_ready: Any = None, ds_free: Any = None, sum_s: Any = None, **ring: Any) -> None:  # fmt: skip
        q_ref, k_ref, v_ref, do_ref, numbers_ref, *more = given
        words_ref = more.pop(0) if drops else None
        dq_ref: Any = None
        if fused:  # behind the inputs, or behind the results
            dq_ref = cast(Any, more.pop(-len(wants) - 1) if interpret is None else more.pop())
        sum_ref = cast(Any, more.pop() if adds_up else None)
        own_refs = more[: -len(wants)]
        refs = operands.refs(own_refs, ring)
        out_refs = dict(zip(wants, more[-len(wants) :], strict=True))
        wg = lax.axis_index("wg")
        b, own_head, from_behind = items.at(lax.axis_index("program"), 0)
        key_tile = items.row_tiles - 1 - from_behind  # heaviest first: under a causal mask all queries see the first keys
        base = key_tile * config.rows + wg * bk
        zero = 0 * wg  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands

        kv_head, first_head, heads = own_head, own_head * group, group
        if split > 1:  # some programs have one head less
            kv_head, share = lax.div(own_head, np.int32(split)), lax.rem(own_head, np.int32(split))
            first, end = (lax.div(n * np.int32(group), np.int32(split)) for n in (share, share + 1))
            first_head, heads = kv_head * group + first, end - first

        def head(r: Any) -> Any:
            return first_head + r

        def walk(r: Any) -> Any:
            return walk_of(recipe, refs, b, head(r), key_tile, key_tile * config.rows, config.rows)

        def advanced(r: Any, i: Any) -> tuple[Any, Any]:
            """The step after step i of the group's r-th head."""
            if group == 1:
                return r, i + 1
            more = i + 1 < walk(r).steps
            return lax.select(more, r, r + 1), lax.select(more, i + 1, zero)

        # a dense mask may leave each head other tiles
        if recipe.listed:
            counts_of = (walk(zero + r).steps for r in range(cdiv(group, split)))
            steps = sum((n if split == 1 else jnp.where(r < heads, n, zero) for r, n in enumerate(counts_of)), zero)
        else:
            steps = walk(zero).steps * heads + zero

        def compute() -> None:
            k_own = k_s.at[pl.ds(wg * bk, bk)]
            v_own = k_own if v_s is None else v_s.at[pl.ds(wg * bk, bk)]

            def rows_at(r: Any) -> GradientRows:
                return GradientRows.placed(recipe, refs, b, head(r), key_tile, wg)

            def column(ref: Any) -> Any:
                found = plgpu.load(ref, layout=COLUMN)  # pyright: ignore[reportCallIssue] (0.10 had an index)
                return lax.broadcast_in_dim(found, (bk, bq), [1])

            def probabilities(s: Any, r: Any, i: Any, n: Any, now: Any, packed: Any) -> Any:
                which = (LSE, SUM)[: operands.numbers - 1]
                found = rows_at(r).probabilities(
                    s, lambda: tuple(column(numbers_s.at[now, one]) for one in which), i=i, number=n, packed=packed,
                    query_words=lambda: (column(words_s.at[now, 0]), column(words_s.at[now, 1])),
                    existing=shape.key_len if fused and shape.key_len % config.rows else None,
                )  # fmt: skip
                return tuple(x.astype(dtype if config.half else jnp.float32) for x in found)

            def spread(n: Any, r: Any, i: Any) -> Spread:
                """Of step n; what is taken and given belongs to the step before, at (r, i)."""
                own, buffer = pl.ds(wg * bk, bk), slot(n, 2)
                columns = pl.ds(0, E) if by_rows else pl.ds(wg * part[1], part[1])
                first_row = rows_at(r).walk.tile(i) * bq + (wg * bk if by_rows else 0)
                where = (b, head(r), pl.ds(first_row, part[0]), columns)

                def put(ds: Any) -> None:
                    pl.when(n > 0)(lambda: plgpu.barrier_wait(ds_free.at[buffer]))
                    ds_s[buffer, own] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_ready.at[buffer])

                def take() -> tuple[Any, Any]:
                    plgpu.barrier_wait(ds_ready.at[1 - buffer])
                    ds = ds_s.at[1 - buffer, :, own] if by_rows else ds_s.at[1 - buffer]
                    return ds.transpose((1, 0)), k_s if by_rows else k_s.at[:, columns]

                def give(dq: Any) -> None:
                    plgpu.barrier_arrive(ds_free.at[1 - buffer])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dq_s[wg] = dq
                    plgpu.commit_smem()

                    @pl.when(n > 0)  # the first step has none before it: zeros were multiplied
                    def _() -> None:
                        if interpret is None:
                            plgpu.copy_smem_to_gmem(dq_s.at[wg], dq_ref.at[where], reduction_op="add")
                        else:
                            plgpu.copy_smem_to_gmem(dq_s.at[wg], dq_ref.at[(key_tile, *where)])

                return Spread(part, put, take, give)

            def gradient(rows: Any, now: Any, state: Any, dp: Any, *sums: Any) -> tuple[Any, ...]:
                ds = rows.scores_gradient(state, dp, column(numbers_s.at[now, DELTA]))
                return rows.before_softcap(state, ds), *(total + ds.sum(axis=1) for total in sums)

            def store_sums(r: Any, i: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
                """The sums, stored and begun anew where a head's last step is done."""
                if not sums:
                    return sums
                ends = i + 1 == walk(r).steps

                @pl.when(ends & (base < shape.key_len))  # a contiguous copy is clipped at the end of the whole array only
                def _() -> None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    sum_s[wg] = sums[0]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(sum_s.at[wg], sum_ref.at[b, head(r), pl.ds(base, bk)])

                return (lax.cond(ends, lambda _: filled((bk,), 0.0, ROW), lambda total: total, sums[0]),)

            def step(n: Any, r: Any, i: Any, dk: Any, dv: Any, state: Any, sums: Any, last: bool = False) -> Any:
                rows, (r_next, i_next) = rows_at(r), advanced(r, i)
                now, following, do_now = slot(n, q_stages), slot(n + 1, q_stages), slot(n, do_stages)
                packed = [] if last else rows_at(r_next).keep_words(i_next)
                dk, dv, state, sums = products.keys_step(
                    k_own, q_s.at[now], v_own, do_s.at[do_now], dk, dv, state, None if last else q_s.at[following], dtype=dtype,
                    before_dout=lambda: plgpu.barrier_wait(do_ready.at[do_now]),
                    after_dout=lambda: plgpu.barrier_arrive(do_free.at[do_now]),
                    before_next=lambda: plgpu.barrier_wait(q_ready.at[following]),
                    weights=rows.weights,
                    gradient=functools.partial(gradient, rows, now), sums=sums,
                    probabilities=lambda s: probabilities(s, r_next, i_next, n + 1, following, packed),
                )  # fmt: skip
                products.read()
                plgpu.barrier_arrive(q_free.at[now])
                return r_next, i_next, dk, dv, state, store_sums(r, i, sums)

            def fused_step(
                n: Any, r: Any, i: Any, dk: Any, dv: Any, state: Any, dp: Any, before: tuple[Any, Any], last: bool = False
            ) -> Any:
                rows, (r_next, i_next) = rows_at(r), advanced(r, i)
                now, following = slot(n, q_stages), slot(n + 1, q_stages)
                packed = [] if last else rows_at(r_next).keep_words(i_next)

                def free() -> None:
                    products.read()
                    plgpu.barrier_arrive(q_free.at[now])
                    plgpu.barrier_arrive(do_free.at[now])

                def before_next() -> None:
                    plgpu.barrier_wait(q_ready.at[following])
                    plgpu.barrier_wait(do_ready.at[following])

                dk, dv, state, dp = products.fused_step(
                    k_own, q_s.at[now], v_own, do_s.at[now], dk, dv, state, dp,
                    None if last else (q_s.at[following], do_s.at[following]), dtype=dtype, free=free, before_next=before_next,
                    weights=rows.weights,
                    gradient=functools.partial(gradient, rows, now),
                    probabilities=lambda s: probabilities(s, r_next, i_next, n + 1, following, packed), spread=spread(n, *before),
                )  # fmt: skip
                return r_next, i_next, dk, dv, state, dp, (r, i)

            packed = rows_at(zero).keep_words(zero)
            plgpu.barrier_wait(kv_ready)
            plgpu.barrier_wait(q_ready.at[0])
            state = probabilities(products.scores(k_own, q_s.at[0]), zero, zero, zero, zero, packed)
            products.read()
            dk = filled((bk, E), 0.0, TILE) if "dk" in wants else None
            dv = filled((bk, Ev), 0.0, TILE) if "dv" in wants else None
            carried: tuple[Any, ...] = (zero, zero, dk, dv, state)
            if fused:
                plgpu.barrier_wait(do_ready.at[0])
                carried += (products.scores(v_own, do_s.at[0]), (zero, zero))
                ds_s[1, pl.ds(wg * bk, bk)] = filled((bk, bq), 0.0, TILE).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_ready.at[1])
            else:
                carried += ((filled((bk,), 0.0, ROW),) if adds_up else (),)
            one = fused_step if fused else step
            carried = lax.fori_loop(zero, steps - 1, lambda n, carried: one(n, *carried), carried)
            _, _, dk, dv, *rest = one(steps - 1, *carried, last=True)
            if fused:
                end = spread(steps, *rest[-1])
                end.give(products.product(*end.take()))
                for n in (steps, steps - 1):  # the other warpgroups have read all keys
                    plgpu.barrier_wait(ds_free.at[slot(n, 2)])

            plgpu.commit_smem()
            scales = {"dk": operands.scale_of(shape, refs, b), "dv": survivor_scale(shape, operands.generator)}
            for name, own, sums in (("dk", k_own, dk), ("dv", v_own, dv)):
                if name in wants:
                    own[...] = (sums * scales[name]).astype(dtype)  # a warpgroup's own keys and values: nobody reads them now
            plgpu.commit_smem()
            for name, own in (("dk", k_own), ("dv", v_own)):
                if name in wants:
                    plgpu.copy_smem_to_gmem(own, at(out_refs[name], b, base, bk, own_head))
            plgpu.wait_smem_to_gmem(0)

        def load() -> None:
            whole = key_tile * config.rows
            plgpu.copy_gmem_to_smem(at(k_ref, b, whole, config.rows, kv_head), k_s, kv_ready)
            if needs_v:
                plgpu.copy_gmem_to_smem(at(v_ref, b, whole, config.rows, kv_head), v_s, kv_ready)

            def step(n: Any, carried: Any) -> Any:
                r, i = carried
                h, t, now, do_now = head(r), walk(r).tile(i), slot(n, q_stages), slot(n, do_stages)
                pl.when(n >= q_stages)(lambda: plgpu.barrier_wait(q_free.at[now]))
                plgpu.copy_gmem_to_smem(at(q_ref, b, t * bq, bq, h), q_s.at[now], q_ready.at[now])
                for ref, target in ((numbers_ref, numbers_s), (words_ref, words_s)):
                    if ref is not None:
                        plgpu.copy_gmem_to_smem(
                            ref.at[b, h, pl.ds(0, target.shape[1]), pl.ds(t * bq, bq)], target.at[now], q_ready.at[now]
                        )
                operands.bring_bias(refs, config, b, h, key_tile, t, n)
                pl.when(n >= do_stages)(lambda: plgpu.barrier_wait(do_free.at[do_now]))
                plgpu.copy_gmem_to_smem(at(do_ref, b, t * bq, bq, h), do_s.at[do_now], do_ready.at[do_now])
                return advanced(r, i)

            lax.fori_loop(zero, steps, step, (zero, zero))
            drain([(q_free, q_stages), (do_free, do_stages), *operands.bias_rings(refs, config)], steps)

        in_roles(config, wg, compute, load, interpret)

    rows_out = cdiv(shape.key_len, 8) * 8
    dims = {"dk": E, "dv": Ev}
    sizes: list[tuple[int, ...]] = [
        (B, H * split, rows_out, dims[name]) if shape.layout == "BHLE" else (B, rows_out, H * split, dims[name]) for name in wants
    ]
    smem, barrier = plgpu.SMEM, plgpu.Barrier
    if fused and interpret is not None:
        sizes.append((items.row_tiles, B, shape.q_heads, cdiv(shape.query_len, bq) * bq, E))
    return launch(
        kernel,
        config,
        out_type=[
            *(jax.ShapeDtypeStruct(size, dtype if len(size) == 4 else jnp.float32) for size in sizes),
            *([jax.ShapeDtypeStruct((B, shape.q_heads, items.row_tiles * config.rows), jnp.float32)] if adds_up else []),
        ],
        programs=items.programs,
        scratch_types={
            "k_s": tile((config.rows,), E, dtype),
            **({"v_s": tile((config.rows,), Ev, dtype)} if needs_v or own_dv else {}),
            "q_s": tile((q_stages, bq), E, dtype),
            "do_s": tile((do_stages, bq), Ev, dtype),
            "numbers_s": smem((q_stages, operands.numbers, bq), jnp.float32),
            **({"sum_s": smem((n_wg, bk), jnp.float32)} if adds_up else {}),
            **operands.bias_ring(config),
            **({"words_s": smem((q_stages, 2, bq), jnp.uint32)} if drops else {}),
            **({
                "ds_s": tile((2, config.rows), bq, dtype),
                "dq_s": tile((n_wg, part[0]), part[1], jnp.float32),
                "ds_ready": barrier(num_arrivals=n_wg, num_barriers=2),
                "ds_free": barrier(num_arrivals=n_wg, num_barriers=2),
            } if fused else {}),
            "kv_ready": barrier(num_arrivals=2 if needs_v else 1),
            "q_ready": barrier(num_arrivals=3 if drops else 2, num_barriers=q_stages),
            "do_ready": barrier(num_barriers=do_stages),
            "q_free": barrier(num_arrivals=n_wg, num_barriers=q_stages),
            "do_free": barrier(num_arrivals=n_wg, num_barriers=do_stages),
        },
        interpret=interpret,
    )  # fmt: skip
