"""dQ on Hopper (sm_90), Mosaic GPU: the half of the split backward whose programs own queries.

Algorithm: FlashAttention-2 (arXiv:2307.08691, algorithm 2), cut in two so that nothing is added in memory: every program walks all
that it needs and its sums stay in registers. It costs 7 products for 5 and gives the same bits each time.

Grid: programs, each with a few items one after another (`visits.Items`: batch entry, query head, row tile) of `warpgroups` x 64
query rows, which walk the key tiles that the mask leaves, as in the forward:

    s = q @ k.T    dp = dout @ v.T    p = exp(s - lse)    ds = p * (dp - delta)    dq += ds @ k

Who waits for what, per stage of the ring (a slot holds one tile of K and one of V), which goes round and round over all items:

    own_ready             a warpgroup's queries and output cotangents have arrived; it asks for the next item's when all products
                          have read them
    k_ready, v_ready      loader -> computers: the tile has arrived
    k_free, v_free        computers -> loader: every computing warpgroup has read it; K a step later, for dq
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

from pallas_kernels import hopper_bias, visits
from pallas_kernels.contracts import ForwardShape, WalkConfig
from pallas_kernels.hopper_backward_products import BackwardWgmma
from pallas_kernels.hopper_gradients import GradientRows
from pallas_kernels.hopper_hidden import bring, clear_own, own_seen_by_any, seen_by_any
from pallas_kernels.hopper_memory import ROW, TILE, rows_of, tile
from pallas_kernels.hopper_operands import DELTA, LSE, SUM, Operands
from pallas_kernels.hopper_program import check_room, drain, in_roles, launch, pass_by, slot
from pallas_kernels.hopper_recipe import filled, survivor_scale, walk_of
from pallas_kernels.visits import cdiv


def dq(
    shape: ForwardShape, config: WalkConfig, operands: Operands, *, adds_up: bool = False, stores: bool = False,
    interpret: Any = None,
) -> Callable[..., list[jax.Array]]:  # fmt: skip
    """A function (query, key, value, dout, numbers, *operands.arrays) -> [dq, as long as query is].

    Rows are queries. numbers: `hopper_operands.row_numbers` of whole row tiles, delta divided by what dropout scales survivors by.
    adds_up: and ds summed over the keys, (B, Hq, whole row tiles) float32, for a bias of queries.
    stores: ds goes, tile by tile, where the bias lies; a reference to zeros like it comes behind all arguments. The interpreter has
    it as one more result, unset where no tile was visited.
    """
    B, Hq, E, Ev, dtype = shape.batch, shape.q_heads, shape.head_dim, shape.value_head_dim, shape.dtype
    bq, bk, n_wg, stages = config.block_q, config.block_k, config.warpgroups, config.stages
    v_stages = config.brief_stages
    items = visits.Items(B, Hq, cdiv(shape.query_len, config.rows), config.row_tiles, config.together, config.across)
    several = config.row_tiles > 1  # then results leave from memory of their own
    early = config.early and not stores
    products = BackwardWgmma(interpret is not None)
    recipe = operands.recipe(shape, config, products)
    check_room(config, cdiv(shape.key_len, bk), stages, v_stages, *([config.bias_stages] if hopper_bias.is_brought(recipe) else []))
    if E > 128 or (bk > 64 and recipe.mask is not None):  # else there are registers: D64 L4096, both passes, 8231 us, late 8845
        recipe = recipe.slope_wanted_late()
    if operands.static is not None and operands.bias is None and not recipe.listed:
        once = visits.cut_once(operands.static, config.rows, bq, shape.query_len, shape.key_len, bk, recipe.leads)
        recipe = dataclasses.replace(recipe, cut_once=once)
    at = functools.partial(rows_of, shape.layout)

    def kernel(*given: Any, q_s: Any, do_s: Any, k_s: Any, v_s: Any, own_ready: Any, k_ready: Any, v_ready: Any, k_free: Any,
               v_free: Any, out_s: Any = None, sum_s: Any = None, ds_s: Any = None, came: Any = None,
               **ring: Any) -> None:  # fmt: skip
        q_ref, k_ref, v_ref, do_ref, numbers_ref, *more = given
        ds_ref: Any = None
        if stores:
            ds_ref = cast(Any, more.pop() if interpret is not None else more.pop(-2 - adds_up))
        sum_ref = cast(Any, more.pop() if adds_up else None)
        dq_ref = more.pop()
        refs = operands.refs(more, ring)
        program, wg = lax.axis_index("program"), lax.axis_index("wg")
        count = items.count(program)
        zero = 0 * wg  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands

        def load_own(n: Any) -> None:
            """Ask for this warpgroup's rows of item n."""
            b, h, row_tile = items.at(program, n)
            base = row_tile * config.rows + wg * bq
            plgpu.copy_gmem_to_smem(at(q_ref, b, base, bq, h), q_s.at[wg], own_ready.at[wg])
            plgpu.copy_gmem_to_smem(at(do_ref, b, base, bq, h), do_s.at[wg], own_ready.at[wg])

        def attend(n: Any, done: Any) -> Any:
            """Item n, `done` tiles into the ring."""
            b, h, row_tile = items.at(program, n)
            base = row_tile * config.rows + wg * bq
            own_seen = own_seen_by_any(recipe, refs, b, h)
            own = None if own_seen is None else own_seen.part(base, bq)
            rows = GradientRows.of(recipe, refs, b, h, row_tile, wg)

            def number(which: int) -> Any:
                """One of each row, as a tile."""
                own = numbers_ref.at[b, h, which, pl.ds(base, bq)]
                found = plgpu.load(own, layout=ROW, optimized=False)  # pyright: ignore[reportCallIssue] (0.10 had an index)
                return lax.broadcast_in_dim(found, (bq, bk), [0])

            lse, delta = number(LSE), number(DELTA)
            top = (lse, number(SUM)) if operands.numbers == 3 else (lse,)

            def store(ds: Any, i: Any) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ds_s[wg] = ds.astype(ds_s.dtype)
                plgpu.commit_smem()
                where = (b, h, pl.ds(base, bq), pl.ds(rows.walk.tile(i) * bk, bk))
                plgpu.copy_smem_to_gmem(ds_s.at[wg], ds_ref.at[where])

            survivors = survivor_scale(shape, operands.generator)
            # the operand of the product: narrowed while the last one is in flight, ptxas would serialise (C7513)
            is_operand = stores and survivors == 1 and shape.softcap is None and ds_s.dtype == dtype

            def gradient(state: Any, dp: Any, *sums: Any, i: Any) -> tuple[Any, ...]:
                ds = rows.scores_gradient(state, dp, delta)
                if stores and not is_operand:
                    store(ds * survivors, i)
                return rows.before_softcap(state, ds, lambda: lse), *(total + ds.sum(axis=1) for total in sums)

            lead = rows.lead + zero if recipe.cut_once else zero
            packed, (now, v_now) = rows.keep_words(0), (slot(done + lead, of) for of in (stages, v_stages))

            if recipe.cut_once:
                pass_by([(k_ready, k_free, stages), (v_ready, v_free, v_stages)], done, done + lead)
            plgpu.barrier_wait(own_ready.at[wg])
            clear_own(own, q_s.at[wg], do_s.at[wg])
            plgpu.barrier_wait(k_ready.at[now])
            state = rows.probabilities(
                products.scores(q_s.at[wg], k_s.at[now]), lambda: top, i=lead, number=done + lead, packed=packed, is_first=True
            )  # fmt: skip
            sums, steps = (filled((bq,), 0.0, ROW),) if adds_up else (), rows.walk.steps
            is_known = isinstance(steps, int)
            moves = (several and is_known) or (recipe.drops and E > 64) or E > 128

            def waiting(state: Any) -> Any:
                return tuple(x.astype(dtype if config.half else jnp.float32) for x in state)

            def early_step(i: Any, carried: Any, last: bool = False) -> Any:
                acc, state, sums = carried
                nth, packed = done + i, [] if last else rows.keep_words(i + 1)
                now, following, v_now = slot(nth, stages), slot(nth + 1, stages), slot(nth, v_stages)
                unmoved = lax.optimization_barrier(zero)
                own = wg + unmoved  # else 64 registers hold where each piece of q and dout lies, and spill
                if v_stages == 1:  # and 32 where v's do
                    v_now = v_now + unmoved
                acc, _, state, sums = products.keys_step(
                    q_s.at[own], k_s.at[now], do_s.at[own], v_s.at[v_now], acc, None, state, None if last else k_s.at[following],
                    dtype=dtype, before_dout=lambda: plgpu.barrier_wait(v_ready.at[v_now]),
                    after_dout=lambda: plgpu.barrier_arrive(v_free.at[v_now]),
                    before_next=lambda: plgpu.barrier_wait(k_ready.at[following]), weights=rows.weights,
                    gradient=functools.partial(gradient, i=i), sums=sums,
                    probabilities=lambda s: waiting(rows.probabilities(s, lambda: top, i=i + 1, number=nth + 1, packed=packed)),
                )  # fmt: skip
                plgpu.barrier_arrive(k_free.at[now])
                return acc, state, sums

            def step(i: Any, carried: Any) -> Any:
                acc, ds, sums = carried
                nth, packed = done + i, rows.keep_words(i)
                now, before, v_now = slot(nth, stages), slot(nth - 1, stages), slot(nth, v_stages)
                plgpu.barrier_wait(k_ready.at[now])
                unmoved = lax.optimization_barrier(zero) if moves else 0
                own = wg + unmoved
                if v_stages == 1:  # as in early_step
                    v_now = v_now + unmoved
                carried = products.queries_step(
                    q_s.at[own], k_s.at[now], do_s.at[own], v_s.at[v_now], acc, ds, k_s.at[before], plain=config.plain,
                    before_v=lambda: plgpu.barrier_wait(v_ready.at[v_now]), after_v=lambda: plgpu.barrier_arrive(v_free.at[v_now]),
                    probabilities=lambda s: rows.probabilities(s, lambda: top, i=i, number=nth, packed=packed),
                    gradient=functools.partial(gradient, i=i), sums=sums,
                )  # fmt: skip
                plgpu.barrier_arrive(k_free.at[before])
                if is_operand:
                    store(carried[1], i)
                return carried

            if early:
                waits = waiting(state)
            else:
                plgpu.barrier_wait(v_ready.at[v_now])
                dp = products.scores(do_s.at[wg], v_s.at[v_now])
                plgpu.barrier_arrive(v_free.at[v_now])
                ds, *sums = gradient(state, dp, *sums, i=lead)
                waits = ds.astype(dtype)
                if is_operand:
                    store(waits, zero)
            carried, first = (filled((bq, E), 0.0, TILE), waits, tuple(sums)), 0 if early else 1
            loops = not (is_known and steps == 1)  # an empty loop's unused iota would not compile (NOTES.md)
            if several and is_known:  # as `KeyItem.steps`
                steps += lax.optimization_barrier(zero)
            if loops:
                carried = lax.fori_loop(first + lead, steps - 1 + first + zero, early_step if early else step, carried)
            if early:
                carried = early_step(steps - 1 + zero, carried, last=True)
            if several:
                plgpu.commit_smem()
                pl.when(n + 1 < count)(lambda: load_own(n + 1))
            acc, ds, sums = carried
            if not early:
                end = slot(done + steps - 1, stages)
                acc = products.add(acc, ds, k_s.at[end])
                plgpu.barrier_arrive(k_free.at[end])
            acc = acc * operands.scale_of(shape, refs, b)
            target = q_s if out_s is None else out_s
            if several:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left
            plgpu.commit_smem()
            target[wg] = acc.astype(dtype)  # without memory of its own: its rows have been read by all products
            if adds_up:
                sum_s[wg] = sums[0]
            plgpu.commit_smem()
            if adds_up:

                @pl.when(base < shape.query_len)  # a contiguous copy is clipped at the end of the whole array only
                def _() -> None:
                    plgpu.copy_smem_to_gmem(sum_s.at[wg], sum_ref.at[b, h, pl.ds(base, bq)])

            plgpu.copy_smem_to_gmem(target.at[wg], at(dq_ref, b, base, bq, h))
            return done + steps

        def compute() -> None:
            load_own(0)
            if several:
                lax.fori_loop(zero, count + zero, attend, zero)
            else:
                attend(0, zero)
            plgpu.wait_smem_to_gmem(0)

        def load(n: Any, done: Any) -> Any:
            """The tiles of item n, as soon as there is room."""
            b, h, row_tile = items.at(program, n)
            walk = walk_of(recipe, refs, b, h, row_tile, row_tile * config.rows, config.rows)
            kv_head = lax.div(h, np.int32(shape.group))
            seen = seen_by_any(recipe, refs, b)

            def asked(i: Any) -> tuple[Any, ...]:
                return () if seen is None else seen.asked(walk.tile(i) * bk, bk)

            def step(i: Any, found: tuple[Any, ...]) -> tuple[Any, ...]:
                number, t = done + i, walk.tile(i)
                now, v_now = slot(number, stages), slot(number, v_stages)
                part = None if seen is None else seen.part(t * bk, bk, found)
                following = asked(visits.least(i + 1, walk.steps - 1))

                def copy(operand: Any) -> Any:
                    return functools.partial(plgpu.copy_gmem_to_smem, at(operand, b, t * bk, bk, kv_head))

                hopper_bias.bring(recipe, refs, b, h, row_tile, t, number)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(k_free.at[now]))
                bring(copy(k_ref), k_s.at[now], k_ready.at[now], part, came)
                pl.when(number >= v_stages)(lambda: plgpu.barrier_wait(v_free.at[v_now]))
                bring(copy(v_ref), v_s.at[v_now], v_ready.at[v_now], part, came)
                return following

            lax.fori_loop(zero, walk.steps + zero, step, asked(zero))
            return done + walk.steps

        def load_all() -> None:
            done = lax.fori_loop(zero, count + zero, load, zero) if several else load(0, zero)
            drain(config, [(k_free, stages), (v_free, v_stages), *hopper_bias.drained(recipe, refs)], done)

        in_roles(config, wg, compute, load_all, interpret)

    rows_out = cdiv(shape.query_len, 8) * 8
    barrier = plgpu.Barrier
    return launch(
        kernel,
        config,
        out_type=[
            jax.ShapeDtypeStruct((B, Hq, rows_out, E) if shape.layout == "BHLE" else (B, rows_out, Hq, E), dtype),
            *([jax.ShapeDtypeStruct((B, Hq, items.row_tiles * config.rows), jnp.float32)] if adds_up else []),
            *([operands.bias_like((B, Hq))] if stores and interpret is not None else []),
        ],
        programs=items.programs,
        scratch_types={
            "q_s": tile((n_wg, bq), E, dtype),
            "do_s": tile((n_wg, bq), Ev, dtype),
            "k_s": tile((stages, bk), E, dtype),
            "v_s": tile((v_stages, bk), Ev, dtype),
            "own_ready": barrier(num_arrivals=2, num_barriers=n_wg),
            "k_ready": barrier(num_barriers=stages),
            "v_ready": barrier(num_barriers=v_stages),
            "k_free": barrier(num_arrivals=n_wg, num_barriers=stages),
            "v_free": barrier(num_arrivals=n_wg, num_barriers=v_stages),
            **({"out_s": tile((n_wg, bq), E, dtype)} if several else {}),
            **({"sum_s": plgpu.SMEM((n_wg, bq), jnp.float32)} if adds_up else {}),
            **hopper_bias.ring(recipe, operands.bias),
            **operands.came,
            **({"ds_s": hopper_bias.tile((n_wg, bq), bk, operands.bias)} if stores else {}),
        },
        interpret=interpret,
    )  # fmt: skip
