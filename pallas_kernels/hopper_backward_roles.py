"""dK and dV of wide heads on Hopper (sm_90), Mosaic GPU: a warpgroup for each, over the same keys.

The sums of dk and dv of 64 keys, 256 wide, are half of an SM's registers: no warpgroup has room for both. So two share the keys:

    weights      s = k @ q.T       p = exp(s - lse)         dv += p @ dout
    gradient     dp = v @ dout.T   ds = p * (dp - delta)    dk += ds @ q

p goes from the first to the second through shared memory: 4 products, where dk and dv one after the other make 5, and one read of
all operands for two. What masks, bias, softcap and dropout do to p the first one does for both. Because the
second waits for p its elementwise work comes under the products of the first, and the other way round.

Grid, items and walks are those of `hopper_backward_dkv`, with 64 keys an item. Who waits for what:

    kv_ready              the warpgroup's keys, or values, have arrived
    q_ready, do_ready     loader -> computers, per stage: the tile has arrived (Q's with its rows' numbers)
    do_free               computers -> loader, per stage: both have read the tile of dO
    q_free                gradient -> loader, per stage: it has read the tile of Q
    p_ready, p_free       weights -> gradient: p lies in its buffer, of two (the other may hold softcap's slope) or one; and back

Tiles of Q and dO exchange their memory from one turn of the ring to the next: dO is read to its end earlier, and the next Q is what
is wanted first. Only `gradient` says that Q is free: `weights` has read it long before it gives dO back, and is ahead; it could
speak for the next Q of a stage while the other one still reads the last, and two voices of its own would pass for one of each.
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
from pallas_kernels.hopper_gradients import GradientRows, KeyItem
from pallas_kernels.hopper_hidden import bring, clear_own, own_seen_by_any
from pallas_kernels.hopper_memory import COLUMN, ROW, TILE, rows_of, tile
from pallas_kernels.hopper_operands import DELTA, LSE, SUM, Operands, bring_numbers, key_gradients
from pallas_kernels.hopper_program import drain, in_roles, launch, slot
from pallas_kernels.hopper_recipe import filled, survivor_scale
from pallas_kernels.visits import cdiv


def dkv_in_roles(
    shape: ForwardShape, config: WalkConfig, operands: Operands, *, adds_up: bool = False, interpret: Any = None
) -> Callable[..., list[jax.Array]]:
    """A function (query, key, value, dout, numbers, words, *operands.arrays) -> [dk, dv]; arguments and results, `adds_up` and
    what it makes: as `hopper_backward_dkv.dkv`'s.

    config.block_q keys a program, config.stages tiles of Q and of dO in memory, config.buffers of p; half: p is handed over in half
    precision. Keys and values are equally wide.
    """
    B, H, E, dtype = shape.batch, shape.kv_heads, shape.head_dim, shape.dtype
    bk, bq, stages, split = config.block_q, config.block_k, config.stages, config.split
    drops, several = shape.dropout_p > 0, config.row_tiles > 1
    items = visits.Items(B, H * split, cdiv(shape.key_len, bk), config.row_tiles, config.together, config.across)
    products = BackwardWgmma(interpret is not None)
    turned = dataclasses.replace(shape, query_len=shape.key_len, key_len=shape.query_len)
    recipe = operands.recipe(turned, config, products).slope_wanted_late()
    at = functools.partial(rows_of, shape.layout)
    handed = 2 if recipe.holds_slope else 1  # p, and softcap's slope where p does not say enough
    buffers = max(1, config.buffers // handed)

    def kernel(*given: Any, own_s: Any, tiles_s: Any, numbers_s: Any, p_s: Any, kv_ready: Any, q_ready: Any, do_ready: Any,
               q_free: Any, do_free: Any, p_ready: Any, p_free: Any, words_s: Any = None, sum_s: Any = None, came: Any = None,
               **ring: Any) -> None:  # fmt: skip
        q_ref, k_ref, v_ref, do_ref, numbers_ref, *more = given
        words_ref = more.pop(0) if drops else None
        sum_ref = cast(Any, more.pop() if adds_up else None)
        dk_ref, dv_ref = more[-2:]
        refs = operands.refs(more[:-2], ring)
        program, wg = lax.axis_index("program"), lax.axis_index("wg")
        count = items.count(program)
        zero = 0 * wg  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands

        def item_at(n: Any) -> KeyItem:
            b, own_head, from_behind = items.at(program, n)
            return KeyItem.of(recipe, refs, shape.group, split, bk, b, own_head, items.row_tiles - 1 - from_behind)

        def memory(n: Any, of_dout: int) -> Any:
            """Of step n's tile of Q, or of dO."""
            turn = lax.rem(lax.div(n, np.int32(stages)), np.int32(2))
            return tiles_s.at[slot(n, stages), 1 - turn if of_dout else turn]

        q_at, do_at = (functools.partial(memory, of_dout=which) for which in (0, 1))

        def column(ref: Any) -> Any:
            found = plgpu.load(ref, layout=COLUMN)  # pyright: ignore[reportCallIssue] (0.10 had an index)
            return lax.broadcast_in_dim(found, (bk, bq), [1])

        def rows_at(item: KeyItem, r: Any) -> GradientRows:
            return item.rows_at(r, zero)

        def steps_of(item: KeyItem, done: Any, first: Any, step: Callable[..., Any]) -> Any:
            """`first` of step 0, carried through the steps 1 to the last: step(n, r, i, *carried)."""
            walked, heads = item.walk(zero).steps, item.heads
            if isinstance(walked, int) and isinstance(heads, int) and walked * heads == 1:
                return first  # an empty loop's unused iota would not compile (NOTES.md)

            def body(n: Any, carried: Any) -> Any:
                r, i, *carried = carried
                r, i = item.advanced(r, i)
                return r, i, *step(n, r, i, *carried)

            return lax.fori_loop(done + 1, done + item.steps, body, (zero, zero, *first))[2:]

        def weigh(item: KeyItem, done: Any) -> Any:
            """dv of an item's keys, `done` steps into the rings."""
            own = own_s.at[zero]  # a constant would be an operand of the steps

            def weights(s: Any, n: Any, r: Any, i: Any, packed: list[Any]) -> tuple[Any]:
                now, buffer, rows = slot(n, stages), slot(n, buffers), rows_at(item, r)
                numbers = (LSE, SUM)[: operands.numbers - 1]
                state = rows.probabilities(
                    s, lambda: tuple(column(numbers_s.at[now, one]) for one in numbers), i=i, number=n, packed=packed,
                    query_words=lambda: (column(words_s.at[now, 0]), column(words_s.at[now, 1])),
                )  # fmt: skip
                pl.when(n >= buffers)(lambda: plgpu.barrier_wait(p_free.at[buffer]))
                state = tuple(x.astype(p_s.dtype) for x in state)
                for which, x in enumerate(state):
                    p_s[buffer, which] = x
                products.read()
                plgpu.barrier_arrive(p_ready.at[buffer])
                return (rows.weights(state).astype(jnp.float32),)

            def step(n: Any, r: Any, i: Any, dv: Any, p: Any) -> tuple[Any, Any]:
                now, before, packed = slot(n, stages), slot(n - 1, stages), rows_at(item, r).keep_words(i)
                dv, p, _ = products.role_step(
                    own, q_at(n), dv, p, do_at(n - 1), plain=config.plain,
                    before_tile=lambda: plgpu.barrier_wait(q_ready.at[now]),
                    before_last=lambda: plgpu.barrier_wait(do_ready.at[before]),
                    after_last=lambda: plgpu.barrier_arrive(do_free.at[before]),
                    elementwise=functools.partial(weights, n=n, r=r, i=i, packed=packed),
                )  # fmt: skip
                return dv, p

            packed, now = rows_at(item, zero).keep_words(zero), slot(done, stages)
            plgpu.barrier_wait(q_ready.at[now])
            (p,) = weights(products.scores(own, q_at(done)), done, zero, zero, packed)
            dv, p = steps_of(item, done, (filled((bk, E), 0.0, TILE), p.astype(dtype)), step)
            last = done + item.steps - 1
            plgpu.barrier_wait(do_ready.at[slot(last, stages)])
            dv = products.add(dv, p, do_at(last))
            plgpu.barrier_arrive(do_free.at[slot(last, stages)])
            return dv * survivor_scale(shape, operands.generator)

        def differentiate(item: KeyItem, done: Any) -> Any:
            """dk of an item's keys, and the sums of ds on their way."""
            # known before the first item, where its pieces lie is held in registers through all items, and spills
            own, base = own_s.at[zero + 1 + lax.optimization_barrier(zero)], item.key_tile * bk

            def gradient(dp: Any, *sums: Any, n: Any, r: Any) -> tuple[Any, ...]:
                now, buffer, rows = slot(n, stages), slot(n, buffers), rows_at(item, r)
                plgpu.barrier_wait(p_ready.at[buffer])
                found = (plgpu.load(p_s.at[buffer, which], layout=TILE) for which in range(handed))  # pyright: ignore[reportCallIssue]
                state = tuple(x.astype(jnp.float32) for x in found)
                products.read()
                plgpu.barrier_arrive(p_free.at[buffer])
                plgpu.barrier_wait(q_ready.at[now])  # its numbers
                ds = rows.scores_gradient(state, dp, column(numbers_s.at[now, DELTA]))
                sums = tuple(total + ds.sum(axis=1) for total in sums)  # a bias is added to capped scores
                return rows.before_softcap(state, ds, lambda: column(numbers_s.at[now, LSE])), *sums

            def store_sums(r: Any, i: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
                """The sums, stored and begun anew where a head's last step is done."""
                if not sums:
                    return sums
                ends = i + 1 == item.walk(r).steps

                @pl.when(ends)
                def _() -> None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    sum_s[...] = sums[0]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(sum_s, sum_ref.at[item.b, item.head(r), pl.ds(base, bk)])

                return (lax.cond(ends, lambda _: filled((bk,), 0.0, ROW), lambda total: total, sums[0]),)

            def step(n: Any, r: Any, i: Any, dk: Any, ds: Any, sums: Any) -> tuple[Any, Any, Any]:
                now, before = slot(n, stages), slot(n - 1, stages)
                dk, ds, sums = products.role_step(
                    own, do_at(n), dk, ds, q_at(n - 1), plain=config.plain, sums=sums,
                    before_tile=lambda: plgpu.barrier_wait(do_ready.at[now]),
                    before_last=lambda: None,  # it was waited for with its numbers
                    after_last=lambda: plgpu.barrier_arrive(q_free.at[before]),
                    elementwise=functools.partial(gradient, n=n, r=r),
                )  # fmt: skip
                products.read()
                plgpu.barrier_arrive(do_free.at[now])
                return dk, ds, store_sums(r, i, sums)

            now = slot(done, stages)
            plgpu.barrier_wait(do_ready.at[now])
            sums = (filled((bk,), 0.0, ROW),) if adds_up else ()
            ds, *sums = gradient(products.scores(own, do_at(done)), *sums, n=done, r=zero)
            products.read()
            plgpu.barrier_arrive(do_free.at[now])
            first = filled((bk, E), 0.0, TILE), ds.astype(dtype), store_sums(zero, zero, tuple(sums))
            dk, ds, _ = steps_of(item, done, first, step)
            last = done + item.steps - 1
            dk = products.add(dk, ds, q_at(last))
            plgpu.barrier_arrive(q_free.at[slot(last, stages)])
            return dk * operands.scale_of(shape, refs, item.b)

        def play(role: int, ref: Any, out_ref: Any, make: Callable[[KeyItem, Any], Any]) -> Any:
            """All items of a role, whose keys or values lie in `ref`, where its results lie too when these have been read."""

            def one(n: Any, done: Any) -> Any:
                item = item_at(n)
                where = item.b, item.key_tile * bk, bk
                seen = own_seen_by_any(recipe, refs, item.b)
                plgpu.copy_gmem_to_smem(at(ref, *where, item.kv_head), own_s.at[role], kv_ready.at[role])
                part = None if seen is None else seen.part(item.key_tile * bk, bk)
                plgpu.barrier_wait(kv_ready.at[role])
                clear_own(part, own_s.at[role])
                result = make(item, done)
                plgpu.commit_smem()
                own_s[role] = result.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_s.at[role], at(out_ref, *where, item.own_head))
                plgpu.wait_smem_to_gmem(0, wait_read_only=several)
                return done + item.steps

            return lax.fori_loop(zero, count + zero, one, zero) if several else one(zero, zero)

        def compute() -> None:
            @pl.when(wg == 0)
            def _weights() -> None:
                done = play(0, k_ref, dv_ref, weigh)
                drain(config, [(p_free, buffers)], done)
                plgpu.wait_smem_to_gmem(0)

            @pl.when(wg == 1)
            def _gradient() -> None:
                play(1, v_ref, dk_ref, differentiate)
                plgpu.wait_smem_to_gmem(0)

        def load(n_item: Any, done: Any) -> Any:
            """The tiles of item n_item, as soon as there is room."""
            item = item_at(n_item)
            end = done + item.steps

            def step(n: Any, carried: Any) -> Any:
                r, i, asked = carried
                b, h, t, now = item.b, item.head(r), item.walk(r).tile(i), slot(n, stages)
                part, following = item.hidden(r, i, asked, n + 1 < end)

                def copy(operand: Any) -> Any:
                    return functools.partial(plgpu.copy_gmem_to_smem, at(operand, b, t * bq, bq, h))

                pl.when(n >= stages)(lambda: plgpu.barrier_wait(do_free.at[now]))  # whose memory it gets
                bring(copy(q_ref), q_at(n), q_ready.at[now], part, came)
                bring_numbers(((numbers_ref, numbers_s), (words_ref, words_s)), b, h, t, now, q_ready)
                hopper_bias.bring(recipe, refs, b, h, item.key_tile, t, n)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(q_free.at[now]))
                bring(copy(do_ref), do_at(n), do_ready.at[now], part, came)
                return following

            lax.fori_loop(done, end, step, (zero, zero, item.asked(zero, zero)))
            return end

        def load_all() -> None:
            done = lax.fori_loop(zero, count + zero, load, zero) if several else load(0, zero)
            drain(config, [(q_free, stages), (do_free, stages), *hopper_bias.drained(recipe, refs)], done)

        in_roles(config, wg, compute, load_all, interpret)

    barrier, results = plgpu.Barrier, key_gradients(shape, split, E, E)
    return launch(
        kernel,
        config,
        out_type=[
            *results,
            *([jax.ShapeDtypeStruct((B, shape.q_heads, items.row_tiles * bk), jnp.float32)] if adds_up else []),
        ],
        programs=items.programs,
        scratch_types={
            "own_s": tile((2, bk), E, dtype),
            "tiles_s": tile((stages, 2, bq), E, dtype),
            "numbers_s": plgpu.SMEM((stages, operands.numbers, bq), jnp.float32),
            "p_s": tile((buffers, handed, bk), bq, dtype if config.half else jnp.float32),
            **({"words_s": plgpu.SMEM((stages, 2, bq), jnp.uint32)} if drops else {}),
            **({"sum_s": plgpu.SMEM((bk,), jnp.float32)} if adds_up else {}),
            **hopper_bias.ring(recipe, operands.bias),
            **operands.came,
            "kv_ready": barrier(num_barriers=2),
            "q_ready": barrier(num_arrivals=3 if drops else 2, num_barriers=stages),
            "do_ready": barrier(num_barriers=stages),
            "q_free": barrier(num_barriers=stages),
            "do_free": barrier(num_arrivals=2, num_barriers=stages),
            "p_ready": barrier(num_barriers=buffers),
            "p_free": barrier(num_barriers=buffers),
        },
        interpret=interpret,
    )  # fmt: skip
