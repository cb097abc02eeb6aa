"""dQ on Hopper (sm_90), Mosaic GPU: the half of the split backward whose programs own queries.

Algorithm: FlashAttention-2 (arXiv:2307.08691, algorithm 2), cut in two so that nothing is added in memory: every program walks all
that it needs and its sums stay in registers. It costs 7 products for 5 and gives the same bits each time.

Grid: programs, one item each (`visits.Items`: batch entry, query head, row tile) of `warpgroups` x 64 query rows, which walk the
key tiles that the mask leaves, as in the forward:

    s = q @ k.T    dp = dout @ v.T    p = exp(s - lse)    ds = p * (dp - delta)    dq += ds @ k

Who waits for what, per stage of the ring (a slot holds one tile of K and one of V):

    own_ready             a warpgroup's queries and output cotangents have arrived
    k_ready, v_ready      loader -> computers: the tile has arrived
    k_free, v_free        computers -> loader: every computing warpgroup has read it; K a step later, for dq
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import visits
from pallas_kernels.contracts import ForwardShape, WalkConfig
from pallas_kernels.hopper_backward_products import BackwardWgmma
from pallas_kernels.hopper_gradients import GradientRows
from pallas_kernels.hopper_memory import rows_of, tile
from pallas_kernels.hopper_operands import Operands
from pallas_kernels.hopper_scores import ROW, TILE, filled, walk_of
from pallas_kernels.visits import cdiv

LSE, DELTA = 0, 1  # what the two numbers of a query row are (`hopper_operands.row_numbers`)


def dq(shape: ForwardShape, config: WalkConfig, operands: Operands, *, interpret: Any = None) -> Callable[..., jax.Array]:
    """A function (query, key, value, dout, numbers, *operands.arrays) -> dq, as long as query is.

    Rows are queries. numbers: (B, Hq, 2, whole row tiles) float32, lse in base 2 (+inf for rows that attend to nothing or do not
    exist) and delta, divided by what dropout scales survivors by.
    """
    B, Hq, E, Ev, dtype = shape.batch, shape.q_heads, shape.head_dim, shape.value_head_dim, shape.dtype
    bq, bk, n_wg, stages = config.block_q, config.block_k, config.warpgroups, config.stages
    items = visits.Items(B, Hq, cdiv(shape.query_len, config.rows), 1)
    products = BackwardWgmma(interpret is not None)
    recipe = operands.recipe(shape, config, products)
    at = functools.partial(rows_of, shape.layout)

    def kernel(*given: Any, q_s: Any, do_s: Any, k_s: Any, v_s: Any, own_ready: Any, k_ready: Any, v_ready: Any, k_free: Any,
               v_free: Any) -> None:  # fmt: skip
        q_ref, k_ref, v_ref, do_ref, numbers_ref, *more, dq_ref = given
        refs = operands.refs(more)
        wg = lax.axis_index("wg")
        b, h, row_tile = items.at(lax.axis_index("program"), 0)
        base = row_tile * config.rows + wg * bq
        zero = 0 * wg  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands

        def slot(n: Any) -> Any:
            return lax.rem(n, np.int32(stages))

        def compute() -> None:
            plgpu.copy_gmem_to_smem(at(q_ref, b, base, bq, h), q_s.at[wg], own_ready.at[wg])
            plgpu.copy_gmem_to_smem(at(do_ref, b, base, bq, h), do_s.at[wg], own_ready.at[wg])
            rows = GradientRows.of(recipe, refs, b, h, row_tile, wg)

            def number(which: int) -> Any:
                """One of each row, as a tile."""
                own = numbers_ref.at[b, h, which, pl.ds(base, bq)]
                found = plgpu.load(own, layout=ROW, optimized=False)  # pyright: ignore[reportCallIssue] (0.10 had an index)
                return lax.broadcast_in_dim(found, (bq, bk), [0])

            lse, delta = number(LSE), number(DELTA)
            gradient = lambda state, dp: rows.scores_gradient(state, dp, delta)  # noqa: E731
            packed = rows.keep_words(0)
            plgpu.barrier_wait(own_ready.at[wg])
            plgpu.barrier_wait(k_ready.at[0])
            state = rows.probabilities(products.scores(q_s.at[wg], k_s.at[0]), lambda: lse, i=zero, packed=packed)
            plgpu.barrier_wait(v_ready.at[0])
            dp = products.scores(do_s.at[wg], v_s.at[0])
            plgpu.barrier_arrive(v_free.at[0])
            ds = gradient(state, dp).astype(dtype)

            def step(i: Any, carried: Any) -> Any:
                acc, ds = carried
                now, before, packed = slot(i), slot(i - 1), rows.keep_words(i)
                plgpu.barrier_wait(k_ready.at[now])
                carried = products.queries_step(
                    q_s.at[wg], k_s.at[now], do_s.at[wg], v_s.at[now], acc, ds, k_s.at[before],
                    before_v=lambda: plgpu.barrier_wait(v_ready.at[now]), after_v=lambda: plgpu.barrier_arrive(v_free.at[now]),
                    probabilities=lambda s: rows.probabilities(s, lambda: lse, i=i, packed=packed), gradient=gradient,
                )  # fmt: skip
                plgpu.barrier_arrive(k_free.at[before])
                return carried

            carried, steps = (filled((bq, E), 0.0, TILE), ds), rows.walk.steps
            if not (isinstance(steps, int) and steps == 1):  # an empty loop's unused iota would not compile (NOTES.md)
                carried = lax.fori_loop(1 + zero, steps + zero, step, carried)
            end = slot(steps - 1 + zero)
            acc, ds = carried
            acc = products.add(acc, ds, k_s.at[end])
            plgpu.barrier_arrive(k_free.at[end])
            acc = acc * operands.scale_of(shape, refs, b)
            plgpu.commit_smem()
            q_s[wg] = acc.astype(dtype)  # its rows have been read by all products
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], at(dq_ref, b, base, bq, h))
            plgpu.wait_smem_to_gmem(0)

        def load() -> None:
            walk = walk_of(recipe, refs, b, h, row_tile, row_tile * config.rows, config.rows)
            kv_head = lax.div(h, np.int32(shape.group))

            def step(i: Any, _: Any) -> None:
                now, t = slot(i), walk.tile(i)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_free.at[now]))
                plgpu.copy_gmem_to_smem(at(k_ref, b, t * bk, bk, kv_head), k_s.at[now], k_ready.at[now])
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_free.at[now]))
                plgpu.copy_gmem_to_smem(at(v_ref, b, t * bk, bk, kv_head), v_s.at[now], v_ready.at[now])

            lax.fori_loop(zero, walk.steps + zero, step, None)
            for free in (k_free, v_free):  # every completed phase must be waited for before the program ends
                wait = lambda n, _, free=free: plgpu.barrier_wait(free.at[slot(n)])  # noqa: E731
                lax.fori_loop(visits.greatest(walk.steps - stages, 0) + zero, walk.steps + zero, wait, None)

        @pl.when(wg < n_wg)
        def _compute() -> None:
            if interpret is None:
                plgpu.set_max_registers(config.registers[0], action="increase")
            compute()

        @pl.when(wg == n_wg)
        def _load() -> None:
            if interpret is None:
                plgpu.set_max_registers(config.registers[1], action="decrease")
            load()

    rows_out = cdiv(shape.query_len, 8) * 8
    barrier = plgpu.Barrier
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, Hq, rows_out, E) if shape.layout == "BHLE" else (B, rows_out, Hq, E), dtype),
        grid=(items.programs,),
        grid_names=("program",),
        num_threads=n_wg + 1,
        thread_name="wg",
        scratch_types={
            "q_s": tile((n_wg, bq), E, dtype),
            "do_s": tile((n_wg, bq), Ev, dtype),
            "k_s": tile((stages, bk), E, dtype),
            "v_s": tile((stages, bk), Ev, dtype),
            "own_ready": barrier(num_arrivals=2, num_barriers=n_wg),
            "k_ready": barrier(num_barriers=stages),
            "v_ready": barrier(num_barriers=stages),
            "k_free": barrier(num_arrivals=n_wg, num_barriers=stages),
            "v_free": barrier(num_arrivals=n_wg, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=True,
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip
