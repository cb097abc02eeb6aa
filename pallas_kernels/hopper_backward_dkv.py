"""dK and dV, and fused with them dQ, on Hopper (sm_90), Mosaic GPU: the backward whose programs own keys.

Algorithm: as in `hopper_backward_dq`. Tiles are transposed, (keys, queries), so that p.T and ds.T are left operands of their
products straight from registers (FlashAttention-3's backward does the same, arXiv:2407.08608):

    s = k @ q.T    dp = v @ dout.T    p = exp(s - lse)    ds = p * (dp - delta)    dv += p @ dout    dk += ds @ q

Grid: programs, each with a few items one after another (`visits.Items`: batch entry, key/value head, key tile of `warpgroups` x 64
keys). An item walks, for each query head of the group, the query tiles that the mask leaves, so dk and dv of the group's heads add
up in registers. Where that makes too few programs, config.split of them divide the group's heads.

Fused: ds goes through shared memory once, too, and the warpgroup that loads makes dq = ds.T @ k of it, 64 x 64 at a time, and adds
that from its registers into float32 sums (`hopper_adding`); 5 products for the split pair's 7. Key tiles add in any order: dq's
last bits vary.

Who waits for what, per stage of the rings (a slot of one holds a tile of Q and its rows' numbers, of the other one of dO); s of the
next step is begun in this one, so Q has `ahead` stages more, where they fit:

    ds_ready, ds_free     computers -> loader and back: ds of all keys lies in its buffer, one of two; dq has been made of it
    kv_ready              a warpgroup's keys and values have arrived; it asks for the next item's when all products have read them
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

from pallas_kernels import hopper_bias, visits
from pallas_kernels.contracts import ForwardShape, WalkConfig
from pallas_kernels.hopper_adding import SIDE, add_into
from pallas_kernels.hopper_backward_products import BackwardWgmma, Spread
from pallas_kernels.hopper_gradients import GradientRows, KeyItem
from pallas_kernels.hopper_hidden import bring, clear_own, own_seen_by_any
from pallas_kernels.hopper_memory import COLUMN, ROW, TILE, rows_of, tile
from pallas_kernels.hopper_operands import DELTA, LSE, SUM, Operands, bring_numbers, key_gradients
from pallas_kernels.hopper_program import check_room, drain, in_roles, launch, pass_by, slot
from pallas_kernels.hopper_recipe import filled, survivor_scale
from pallas_kernels.visits import cdiv


def dkv(
    shape: ForwardShape, config: WalkConfig, operands: Operands, *, wants: tuple[str, ...] = ("dk", "dv"), fused: bool = False,
    adds_up: bool = False, interpret: Any = None,
) -> Callable[..., list[jax.Array]]:  # fmt: skip
    """A function (query, key, value, dout, numbers, words, *operands.arrays) -> the arrays of `wants`, as long as key is, with
    config.split heads for each of its heads, to be added up.

    fused: dq / scale as well, of one item a program. The function takes behind all others a reference to zeros (B, Hq, query tiles
    of 64, E / 64, *PIECE) float32, into which it adds. The interpreter knows no reduce-add: there, it is one more result, with a
    leading dim of key tiles to be summed and (64, 64) for PIECE.

    adds_up: and, behind the others, ds summed over the queries of each head, (B, Hq, whole key tiles) float32, for a bias of keys;
    with dk only.

    Rows are keys: config.block_q of them a warpgroup, config.block_k queries a tile; `operands` are transposed. numbers: as for
    `dq`, to whole tiles; words: dropout's of every query, (B, Hq, 2, as long) uint32, or None.
    """
    B, H, E, Ev, dtype = shape.batch, shape.kv_heads, shape.head_dim, shape.value_head_dim, shape.dtype
    bk, bq, n_wg, stages = config.block_q, config.block_k, config.warpgroups, config.stages
    group, split, drops = shape.group, config.split, shape.dropout_p > 0
    q_stages, do_stages = stages + config.ahead, config.brief_stages
    needs_v = "dk" in wants
    own_dv = not needs_v and E != Ev  # dk and dv leave from the memory of k and v; dv alone from that of k, if it has its size
    several = config.row_tiles > 1
    if fused and (several or operands.bias is not None):
        raise ValueError(f"A fused kernel takes one row tile and no bias, got row_tiles {config.row_tiles}.")
    steps = cdiv(shape.query_len, bq) * cdiv(group, split)
    staged = several and E == Ev  # results leave from memory of their own, and the next item's keys come meanwhile
    items = visits.Items(B, H * split, cdiv(shape.key_len, config.rows), config.row_tiles, config.together, config.across)
    products = BackwardWgmma(interpret is not None)
    turned = dataclasses.replace(shape, query_len=shape.key_len, key_len=shape.query_len)
    recipe = operands.recipe(turned, config, products)
    check_room(config, steps, q_stages, do_stages, *([config.bias_stages] if hopper_bias.is_brought(recipe) else []))
    if fused or E > 64 or recipe.mask is not None:  # else there are registers: D64 L4096, both passes, 7770 us, late 8231
        recipe = recipe.slope_wanted_late()
    # a bias's ring of tiles would have to be passed by as well
    passable = not (fused or recipe.listed or recipe.ragged) and operands.bias is None
    if operands.static is not None and passable and split == group:
        upward = dataclasses.replace(recipe, upward=True)
        if visits.cut_once(operands.static, config.rows, bk, shape.key_len, shape.query_len, bq, upward.leads, upward=True):
            recipe = dataclasses.replace(upward, cut_once=True)
    at = functools.partial(rows_of, shape.layout)

    def kernel(*given: Any, k_s: Any, q_s: Any, do_s: Any, numbers_s: Any, kv_ready: Any, q_ready: Any, do_ready: Any, q_free: Any,
               do_free: Any, v_s: Any = None, words_s: Any = None, ds_s: Any = None,
               ds_ready: Any = None, ds_free: Any = None, sum_s: Any = None, out_s: Any = None, came: Any = None,
               **ring: Any) -> None:  # fmt: skip
        q_ref, k_ref, v_ref, do_ref, numbers_ref, *more = given
        words_ref = more.pop(0) if drops else None
        dq_ref: Any = None
        if fused:  # behind the inputs, or behind the results
            dq_ref = cast(Any, more.pop(-len(wants) - 1) if interpret is None else more.pop())
        sum_ref = cast(Any, more.pop() if adds_up else None)
        own_refs = more[: -len(wants)]
        refs = operands.refs(own_refs, ring)
        out_refs = dict(zip(wants, more[-len(wants) :], strict=True))
        program, wg = lax.axis_index("program"), lax.axis_index("wg")
        count = items.count(program)
        zero = 0 * wg  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands

        def item_at(n: Any) -> KeyItem:
            b, own_head, from_behind = items.at(program, n)
            key_tile = items.row_tiles - 1 - from_behind  # heaviest first: under a causal mask all queries see the first keys
            return KeyItem.of(recipe, refs, group, split, config.rows, b, own_head, key_tile)

        # Else registers hold where each of 8 or 16 pieces of k and v lies, and spill beside a mask, or dropout's words: D128
        # causal, L 16384: 2966 us, held 3091, L 4096 with dropout 1177, 1276. Without a mask nothing spills: 6204, held 6070.
        bare = not (several or drops) and recipe.mask is None and recipe.keep_kind is None and recipe.bias_kind is None
        moves = fused or (E > 64 and not bare)

        def owns(wg: Any) -> tuple[Any, Any]:
            keys = k_s.at[pl.ds(wg * bk, bk)]
            return keys, keys if v_s is None else v_s.at[pl.ds(wg * bk, bk)]

        k_own, v_own = owns(wg)

        def anew() -> Any:  # where its keys begin, and its barrier, would else be known before all items, and 4 to 8 bytes spill
            return wg + lax.optimization_barrier(zero) if several else wg

        def load_own(n: Any) -> None:
            """Ask for this warpgroup's keys and values of item n."""
            item, here = item_at(n), anew()
            base = item.key_tile * config.rows + here * bk
            plgpu.copy_gmem_to_smem(at(k_ref, item.b, base, bk, item.kv_head), k_own, kv_ready.at[here])
            if needs_v:
                plgpu.copy_gmem_to_smem(at(v_ref, item.b, base, bk, item.kv_head), v_own, kv_ready.at[here])

        def load_next(n: Any) -> None:
            if several:
                plgpu.commit_smem()
                pl.when(n + 1 < count)(lambda: load_own(n + 1))

        def attend(n_item: Any, done: Any) -> Any:
            """Item n_item, `done` steps into the rings."""
            item, here = item_at(n_item), anew()
            b, head, key_tile, steps = item.b, item.head, item.key_tile, item.steps
            base = key_tile * config.rows + here * bk
            walk, advanced, end = item.walk, item.advanced, done + steps
            own_seen = own_seen_by_any(recipe, refs, b)
            own = None if own_seen is None else own_seen.part(base, bk)

            def rows_at(r: Any) -> GradientRows:
                return item.rows_at(r, here)

            # What says the same of a key in every step is read once: of its place in memory the fused kernel spills 28 bytes.
            once = recipe.keep_kind in ("row", "scalar") and (group == 1 or refs.keep.shape[1] == 1)
            own_words = rows_at(zero).keep_words(zero) if once else []

            def keep_words(r: Any, i: Any) -> list[Any]:
                return own_words if once else rows_at(r).keep_words(i)

            def column(ref: Any) -> Any:
                found = plgpu.load(ref, layout=COLUMN)  # pyright: ignore[reportCallIssue] (0.10 had an index)
                return lax.broadcast_in_dim(found, (bk, bq), [1])

            def probabilities(s: Any, r: Any, i: Any, n: Any, now: Any, packed: Any, is_first: bool = False) -> Any:
                which = (LSE, SUM)[: operands.numbers - 1]
                found = rows_at(r).probabilities(
                    s, lambda: tuple(column(numbers_s.at[now, one]) for one in which), i=i, number=n, packed=packed,
                    query_words=lambda: (column(words_s.at[now, 0]), column(words_s.at[now, 1])),
                    existing=shape.key_len if fused and shape.key_len % config.rows else None, is_first=is_first,
                )  # fmt: skip
                return tuple(x.astype(dtype if config.half else jnp.float32) for x in found)

            def spread(n: Any) -> Spread:
                buffer = slot(n, 2)

                def store(ds: Any) -> None:
                    pl.when(n >= 2)(lambda: plgpu.barrier_wait(ds_free.at[buffer]))
                    own_ds = ds_s.at[buffer, pl.ds(wg * bk, bk)]
                    if recipe.keep_kind is not None or (recipe.mask is not None and operands.static is None):
                        products.store(own_ds, ds)
                    else:  # by `store` ptxas serialises products under a causal mask (C7512), and here it has the registers
                        own_ds[...] = ds

                def tell() -> None:
                    # each thread for its own: the warpgroup's barrier takes 1 to 4 %; with dropout it gives (D64 4776 us, 4835)
                    plgpu.commit_smem() if drops else products.loaded()
                    plgpu.barrier_arrive(ds_ready.at[buffer])

                return Spread(store, tell)

            def gradient(rows: Any, now: Any, state: Any, dp: Any, *sums: Any) -> tuple[Any, ...]:
                ds = rows.scores_gradient(state, dp, column(numbers_s.at[now, DELTA]))
                sums = tuple(total + ds.sum(axis=1) for total in sums)  # a bias is added to capped scores
                return rows.before_softcap(state, ds, lambda: column(numbers_s.at[now, LSE])), *sums

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
                rows, (r_next, i_next), n_next = rows_at(r), advanced(r, i), n + 1
                if fused:  # the last step's scores once more: a step apart for it, and ptxas is short of registers (C7512)
                    r_next, i_next = (lax.select(n_next < end, new, old) for new, old in ((r_next, r), (i_next, i)))
                now, following = (slot(x, q_stages) for x in (n, n_next))
                do_now, do_next = (slot(x, do_stages) for x in (n, n_next))
                packed = [] if last else keep_words(r_next, i_next)
                unmoved = lax.optimization_barrier(zero) if moves else 0
                k_own, v_own = owns(wg + unmoved)
                if do_stages == 1 and needs_v:  # else where its pieces lie would be held too; dv alone has the registers
                    do_now = do_now + unmoved
                dk, dv, state, sums = products.keys_step(
                    k_own, q_s.at[now], v_own, do_s.at[do_now], dk, dv, state, None if last else q_s.at[following], dtype=dtype,
                    before_dout=lambda: None if fused else plgpu.barrier_wait(do_ready.at[do_now]),
                    after_dout=lambda: plgpu.barrier_arrive(do_free.at[do_now]),
                    before_next=lambda: plgpu.barrier_wait(q_ready.at[following]),
                    weights=rows.weights,
                    gradient=functools.partial(gradient, rows, now), sums=sums,
                    probabilities=lambda s: probabilities(s, r_next, i_next, n_next, following, packed),
                    spread=spread(n) if fused else None, plain=config.plain,
                    before_end=lambda: plgpu.barrier_wait(do_ready.at[do_next]) if fused else None,
                )  # fmt: skip
                products.read()
                plgpu.barrier_arrive(q_free.at[now])
                return r_next, i_next, dk, dv, state, store_sums(r, i, sums)

            lead = rows_at(zero).lead + zero if recipe.cut_once else zero

            packed = keep_words(zero, zero)
            plgpu.barrier_wait(kv_ready.at[here])
            clear_own(own, k_own, *([v_own] if needs_v else []))  # fused: ds_ready tells the others
            if recipe.cut_once:
                pass_by([(q_ready, q_free, q_stages), (do_ready, do_free, do_stages)], done, done + lead)
            begun = done + lead
            start = slot(begun, q_stages)
            plgpu.barrier_wait(q_ready.at[start])
            state = probabilities(products.scores(k_own, q_s.at[start]), zero, lead, begun, start, packed, is_first=True)
            products.read()
            dk = filled((bk, E), 0.0, TILE) if "dk" in wants else None
            dv = filled((bk, Ev), 0.0, TILE) if "dv" in wants else None
            sums = (filled((bk,), 0.0, ROW),) if adds_up else ()
            carried = (zero, lead, dk, dv, state, sums)
            if fused:
                plgpu.barrier_wait(do_ready.at[slot(done, do_stages)])
            carried = lax.fori_loop(begun, end if fused else end - 1, lambda n, carried: step(n, *carried), carried)
            if not fused:
                carried = step(end - 1, *carried, last=True)
            _, _, dk, dv, *_ = carried
            if fused:  # dq has been made of all keys
                pl.when(end >= 2)(lambda: plgpu.barrier_wait(ds_free.at[slot(end, 2)]))
                plgpu.barrier_wait(ds_free.at[slot(end - 1, 2)])

            if staged:
                load_next(n_item)
            else:
                plgpu.commit_smem()
            scales = {"dk": operands.scale_of(shape, refs, b), "dv": survivor_scale(shape, operands.generator)}
            for name, own, sums in (("dk", k_own, dk), ("dv", v_own, dv)):
                if name not in wants:
                    continue
                target = out_s.at[wg] if staged else own  # a warpgroup's own keys and values: nobody reads them now
                if staged:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left
                    plgpu.commit_smem()
                target[...] = (sums * scales[name]).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(target, at(out_refs[name], b, base, bk, item.own_head))
            if not staged:
                plgpu.wait_smem_to_gmem(0, wait_read_only=several)
                load_next(n_item)
            return end

        def compute() -> None:
            load_own(0)
            if several:
                lax.fori_loop(zero, count + zero, attend, zero)
            else:
                attend(0, zero)
            plgpu.wait_smem_to_gmem(0)

        def bring_step(item: KeyItem, n: Any, end: Any, r: Any, i: Any, asked: Any) -> Any:
            """Ask for the tiles of step n, at (r, i), as soon as there is room; (r, i, asked) of the next one, or of the last."""
            b, h, t, now, do_now = item.b, item.head(r), item.walk(r).tile(i), slot(n, q_stages), slot(n, do_stages)
            part, following = item.hidden(r, i, asked, n + 1 < end)

            def copy(operand: Any) -> Any:
                return functools.partial(plgpu.copy_gmem_to_smem, at(operand, b, t * bq, bq, h))

            pl.when(n >= q_stages)(lambda: plgpu.barrier_wait(q_free.at[now]))
            bring(copy(q_ref), q_s.at[now], q_ready.at[now], part, came)
            bring_numbers(((numbers_ref, numbers_s), (words_ref, words_s)), b, h, t, now, q_ready)
            hopper_bias.bring(recipe, refs, b, h, item.key_tile, t, n)
            pl.when(n >= do_stages)(lambda: plgpu.barrier_wait(do_free.at[do_now]))
            bring(copy(do_ref), do_s.at[do_now], do_ready.at[do_now], part, came)
            return following

        def load(n_item: Any, done: Any) -> Any:
            item = item_at(n_item)
            end = done + item.steps
            lax.fori_loop(done, end, lambda n, at: bring_step(item, n, end, *at), (zero, zero, item.asked(zero, zero)))
            return end

        def load_all() -> None:
            done = lax.fori_loop(zero, count + zero, load, zero) if several else load(0, zero)
            drain(config, [(q_free, q_stages), (do_free, do_stages), *hopper_bias.drained(recipe, refs)], done)

        def load_and_add() -> None:
            """The only item's tiles, do_stages steps ahead of dq, which is added to what other key tiles make of it.

            One more step's come behind the last: that one's again, for scores that nobody looks at.
            """
            item = item_at(0)
            steps, ahead = item.steps, np.int32(do_stages)

            def bring_next(n: Any, at: Any) -> Any:
                return lax.cond(n <= steps, lambda at: bring_step(item, n, steps, *at), lambda at: at, at)

            def step(n: Any, carried: Any) -> Any:
                (r, i), ahead_at, buffer = *carried, slot(n, 2)
                first_row = item.walk(r).tile(i) * (bq // SIDE)
                ahead_at = bring_next(n + ahead, ahead_at)
                keys = pl.ds(lax.optimization_barrier(zero) * config.rows, config.rows)  # as `moves`: where the pieces of k lie
                plgpu.barrier_wait(ds_ready.at[buffer])

                def piece(m: Any, _: Any) -> None:
                    y, x = lax.div(m, np.int32(E // SIDE)), lax.rem(m, np.int32(E // SIDE))
                    ds = ds_s.at[buffer, :, pl.ds(y * SIDE, SIDE)].transpose((1, 0))
                    dq = products.product(ds, k_s.at[keys, pl.ds(x * SIDE, SIDE)])
                    pl.when(m == pieces - 1)(lambda: plgpu.barrier_arrive(ds_free.at[buffer]))
                    where = (item.b, item.head(r), first_row + y, x)
                    if interpret is None:
                        add_into(dq_ref.at[where], dq)
                    else:
                        dq_ref[(item.key_tile, *where)] = dq

                # unrolled, the first piece would wait in registers for the last product: nobody may know how many there are
                pieces = (bq // SIDE) * (E // SIDE)
                lax.fori_loop(zero, lax.optimization_barrier(zero) + pieces, piece, None)
                return item.advanced(r, i), ahead_at

            start = (zero, zero, item.asked(zero, zero))
            ahead_at = lax.fori_loop(zero, visits.least(ahead, steps + 1), lambda n, at: bring_step(item, n, steps, *at), start)
            for w in range(n_wg):
                plgpu.barrier_wait(kv_ready.at[w])
            lax.fori_loop(zero, steps + zero, step, ((zero, zero), ahead_at))
            drain(config, [(q_free, q_stages), (do_free, do_stages)], steps, more=1)

        in_roles(config, wg, compute, load_and_add if fused else load_all, interpret)

    dims = {"dk": E, "dv": Ev}
    results = key_gradients(shape, split, *(dims[name] for name in wants))
    smem, barrier = plgpu.SMEM, plgpu.Barrier
    if fused and interpret is not None:
        own_dq = (items.row_tiles, B, shape.q_heads, cdiv(shape.query_len, bq) * bq // SIDE, E // SIDE, SIDE, SIDE)
        results.append(jax.ShapeDtypeStruct(own_dq, jnp.float32))
    return launch(
        kernel,
        config,
        out_type=[
            *results,
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
            **hopper_bias.ring(recipe, operands.bias),
            **operands.came,
            **({"words_s": smem((q_stages, 2, bq), jnp.uint32)} if drops else {}),
            **({
                "ds_s": tile((2, config.rows), bq, dtype),
                "ds_ready": barrier(num_arrivals=n_wg, num_barriers=2),
                "ds_free": barrier(num_barriers=2),
            } if fused else {}),
            "kv_ready": barrier(num_arrivals=2 if needs_v else 1, num_barriers=n_wg),
            **({"out_s": tile((n_wg, bk), E, dtype)} if staged else {}),
            "q_ready": barrier(num_arrivals=3 if drops else 2, num_barriers=q_stages),
            "do_ready": barrier(num_barriers=do_stages),
            "q_free": barrier(num_arrivals=n_wg, num_barriers=q_stages),
            "do_free": barrier(num_arrivals=n_wg, num_barriers=do_stages),
        },
        interpret=interpret,
    )  # fmt: skip
