"""Attention forward on Hopper (sm_90), Mosaic GPU: FlashAttention-2's tiles with FlashAttention-3's warp specialisation.

Algorithm: Dao, arXiv:2307.08691, algorithm 1 (rows own their softmax, keys stream past); Shah et al., arXiv:2407.08608, sections
3.1 and 3.2 (a loading warpgroup feeds computing ones; the next QK and the last PV are in flight under the softmax).

Grid: programs, each with a few items one after another (`visits.Items`: batch entry, query head, row tile). An item is
`warpgroups` x 64 query rows of one head, which walk the key tiles that the mask leaves (`visits`), the first one before a loop
over the others. Where a mask cuts only that one (`Recipe.cuts_first_only`), the loop knows no mask; else a branch in it masks
the tiles that are cut (two overlapped loops one after another, one masked and one not, would be the usual way: ptxas then
serialises every wgmma, C7513, NOTES.md). Of a dense mask only the list knows which it is: there a program has both, and takes
one of them for all of its items.

Who waits for what: the ring of K and V (`hopper_keys`) goes round and round over all items, and beside it

    q_ready      a warpgroup's own rows have arrived; it asks for the next item's when it starts with one
    bias_ready, bias_free    as `hopper_bias` says
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, hopper_bias, hopper_packing, online_softmax, visits
from pallas_kernels.contracts import ForwardConfig, ForwardShape, has_ids
from pallas_kernels.hopper_hidden import hidden_by_numbers, seen_by_any, words
from pallas_kernels.hopper_keys import Ring
from pallas_kernels.hopper_memory import rows_of, tile
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.hopper_program import check_room, drain, in_roles, launch, slot
from pallas_kernels.hopper_recipe import Recipe, Refs, survivor_scale, walk_of
from pallas_kernels.hopper_scores import Rows
from pallas_kernels.online_softmax import over_columns
from pallas_kernels.visits import cdiv


def forward(
    shape: ForwardShape, config: ForwardConfig, mask: Any = None, *, bias: Any = None, keep: Any = None, generator: Any = None,
    told: bool = False, interpret: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:  # fmt: skip
    """A function (query, key, value, *, mask_arrays, bias, keep, sinks, seeds, scale, seen) -> (out, lse).

    `out = softmax(scale * q @ k.T + bias, kept keys) @ v`, lse (B, Hq, L) natural and float32. TMA wants lengths in eights: the
    arrays may be longer than the shape's L and S, by zeros; out is as long as query. Head dims are multiples of 16.

    Args:
        mask: a `contracts.Mask`, or None; its leaves, (1,) or (B,) or ids (1|B, length), all int32, are the mask_arrays.
        bias, keep: a float and a bool array (B|1, Hq|1, L|1, S|1), here what has their shape and dtype. A bias as large as the
            scores may be longer by anything.
        generator: what makes dropout bits, with `query_words`, `key_words` (which takes the bits KEY_BITS of an index apart),
            `keep_words` and `rounded`; None without dropout.
        told: there is a `seen`, `hopper_hidden.seen_keys`, which says whose values may hold anything.
        interpret: `plgpu.InterpretGPUParams` to run it without a GPU.
    """
    B, Hq, L, S = shape.batch, shape.q_heads, shape.query_len, shape.key_len
    E, Ev, dtype = shape.head_dim, shape.value_head_dim, shape.dtype
    bq, bk, n_wg = config.block_q, config.block_k, config.warpgroups
    items = visits.Items(B, Hq, cdiv(L, config.rows), config.row_tiles, config.together, config.across)
    several = config.row_tiles > 1
    own_out = config.own_out(E, Ev)  # results leave from memory of their own, `width` columns at a time; else from q's
    width = config.out_columns(E, Ev)
    arrays, structure = jax.tree.flatten(mask)
    by_ids, hides = has_ids(mask), hidden_by_numbers(mask, L, S)
    recipe = Recipe(
        shape, config, None if mask is None else structure, by_ids, is_prefix=mask is None or mask.is_prefix,
        hides=hides,
        bias_kind=None if bias is None else dense.kind(bias), keep_kind=None if keep is None else dense.kind(keep),
        generator=generator, products=Wgmma(interpret is not None),
    )  # fmt: skip
    if mask is not None and not (config.spread or mask.is_prefix or recipe.listed):
        recipe = dataclasses.replace(recipe, cut_once=visits.cut_once(mask, config.rows, bq, L, S, bk, recipe.leads))
    check_room(config, cdiv(S, bk), config.stages, *([config.bias_stages] if hopper_bias.is_brought(recipe) else []))
    at = functools.partial(rows_of, shape.layout)

    def kernel(*operands: Any, q_s: Any, lse_s: Any, q_ready: Any, pin_s: Any = None, out_s: Any = None, bias_s: Any = None,
               bias_ready: Any = None, bias_free: Any = None, **keys: Any) -> None:  # fmt: skip
        given = iter(operands)
        q_ref, k_ref, v_ref = next(given), next(given), next(given)
        refs = Refs(
            mask=[next(given) for _ in arrays],
            table=next(given) if recipe.listed else None,
            keep=None if keep is None else next(given),
            bias=None if bias is None else next(given),
            sinks=next(given) if shape.sinks else None,
            seeds=next(given) if recipe.drops else None,
            scale=next(given) if shape.scale is None else None,
            seen=next(given) if told else None,
            bias_s=bias_s, bias_ready=bias_ready, bias_free=bias_free,
        )  # fmt: skip
        out_ref, lse_ref = given
        ring = Ring(recipe, **keys)
        rings = [*ring.rings, *hopper_bias.rings(recipe, refs)]
        program, wg = lax.axis_index("program"), lax.axis_index("wg")
        count = items.count(program)

        zero = 0 * program  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands
        # else ptxas knows how many steps a full walk has, and spills: D256, L 512, 597 to 627 TFLOP/s; D64, bias of keys, 24 bytes
        if several and (E > 128 or (recipe.bias_kind == "column" and mask is None and not config.pinned)):
            zero = lax.optimization_barrier(zero)

        def loop(start: Any, stop: Any, body: Callable[..., Any], state: Any) -> Any:
            return lax.fori_loop(start + zero, stop + zero, body, state)

        def q_slot(n: Any) -> Any:
            return wg + n_wg * slot(n + zero, 2) if config.queries == 2 else wg

        def place(n: Any) -> tuple[Any, Any, Any]:
            """(b, h, this warpgroup's first row) of item n."""
            b, h, row_tile = items.at(program, n)
            return b, h, row_tile * config.rows + wg * bq

        def load_q(n: Any) -> None:
            """Ask for this warpgroup's rows of item n."""
            b, h, base = place(n)
            plgpu.copy_gmem_to_smem(at(q_ref, b, base, bq, h), q_s.at[q_slot(n)], q_ready.at[q_slot(n)])

        def prefetch(n: Any) -> None:
            """Ask for the rows of item n: its memory has been read, by wgmma or by what stores results from there."""
            if not own_out:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            pl.when(n < count)(lambda: load_q(n))

        def finish(n: Any, acc: Any, m: Any, l: Any) -> None:
            """Store the results of item n."""
            b, h, base = place(n)
            share, lse = online_softmax.finish(m, l, huge=recipe.huge)
            if recipe.drops:
                share = share * survivor_scale(shape, generator)
            out_tile, out = out_s.at[wg] if own_out else q_s.at[q_slot(n)], at(out_ref, b, base, bq, h)
            acc = acc * over_columns(share, acc)
            for column in range(0, Ev, width):
                if several or column:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left
                plgpu.commit_smem()  # all four warps have read q
                out_tile[...] = acc[:, column : column + width].astype(dtype)
                if column == 0:
                    lse_s[wg] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_tile, out.at[:, pl.ds(column, width)])

            @pl.when(base < L)  # a contiguous copy is clipped at the end of the whole array only, not of a head's row
            def _() -> None:
                plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[b, h, pl.ds(base, bq)])

        def attend(recipe: Recipe, n: Any, done: Any) -> Any:
            """Item n, `done` tiles into the ring."""
            if several and config.queries == 2:
                prefetch(n + 1)
            rows = Rows.of(recipe, refs, *items.at(program, n), wg)

            def query() -> Any:
                plgpu.barrier_wait(q_ready.at[q_slot(n)])
                return q_s.at[q_slot(n)]

            acc, m, l = ring.attend(
                rows, query, done, loop, others=rings[2:], pin=pin_s.at[wg] if recipe.config.pinned else None,
                between=(lambda: prefetch(n + 1)) if several and config.queries == 1 else None,
            )  # fmt: skip
            finish(n, acc, m, l)
            return done + rows.walk.steps

        def compute() -> None:
            """One computing warpgroup."""
            load_q(0)

            def attend_all(recipe: Recipe) -> None:
                if several:
                    loop(0, count, functools.partial(attend, recipe), zero)
                else:
                    attend(recipe, 0, zero)

            if recipe.keep_kind in ("tile", "column") and not recipe.drops and bias is None:
                once = visits.ListWalk(refs.table, (0, 0, 0)).cut_once
                pinned = dataclasses.replace(config, pinned=config.pinned or config.pinned_once)
                attend_once = functools.partial(attend_all, dataclasses.replace(recipe, config=pinned, cut_once=True))
                if E > 128:  # 64 keys a tile: of two conditions ptxas has one loop's slots in registers of threads (NOTES.md)
                    lax.cond(once, attend_once, functools.partial(attend_all, recipe))
                else:
                    pl.when(once)(attend_once)
                    pl.when(~once)(functools.partial(attend_all, recipe))
            else:
                attend_all(recipe)
            plgpu.wait_smem_to_gmem(0)

        def load(n: Any, done: Any) -> Any:
            """The tiles of item n, as soon as there is room; `done` as in attend."""
            b, h, row_tile = items.at(program, n)
            walk = walk_of(recipe, refs, b, h, row_tile, row_tile * config.rows, config.rows)
            kv_head = lax.div(h, np.int32(shape.group))
            seen = seen_by_any(recipe, refs, b)

            def step(i: Any, _: Any) -> None:
                t, number = walk.tile(i), done + i

                def copy(operand: Any) -> Any:
                    return functools.partial(plgpu.copy_gmem_to_smem, at(operand, b, t * bk, bk, kv_head))

                ring.bring_keys(number, copy(k_ref))
                hopper_bias.bring(recipe, refs, b, h, row_tile, t, number)
                ring.bring_values(number, copy(v_ref), t, seen)

            loop(0, walk.steps, step, None)
            return done + walk.steps

        def load_all() -> None:
            done = loop(0, count, load, zero) if several else load(0, zero)
            drain(config, [(free, of) for _, free, of in rings], done)

        in_roles(config, wg, compute, load_all, interpret)

    rows_out = cdiv(L, 8) * 8
    out_shape = (B, Hq, rows_out, Ev) if shape.layout == "BHLE" else (B, rows_out, Hq, Ev)
    lse_len = cdiv(L, bq) * bq  # whole tiles are stored
    smem, barrier = plgpu.SMEM, plgpu.Barrier
    q_slots = config.queries * n_wg
    call = launch(
        kernel,
        config,
        out_type=[jax.ShapeDtypeStruct(out_shape, dtype), jax.ShapeDtypeStruct((B, Hq, lse_len), jnp.float32)],
        programs=items.programs,
        scratch_types={
            "q_s": tile((q_slots, bq), E, dtype),
            **Ring.tiles(shape, config),
            **({"out_s": tile((n_wg, bq), width, dtype)} if own_out else {}),
            "lse_s": smem((n_wg, bq), jnp.float32),
            **({"pin_s": smem((n_wg, bq, *config.sums), jnp.float32)} if config.pinned or config.pinned_once else {}),
            "q_ready": barrier(num_barriers=q_slots),
            **Ring.barriers(config, hides=hides or told),
            **hopper_bias.ring(recipe, bias),
        },
        interpret=interpret,
    )  # fmt: skip

    def run(
        query: Any, key: Any, value: Any, *, mask_arrays: Sequence[Any] = (), bias: Any = None, keep: Any = None, sinks: Any = None,
        seeds: Any = None, scale: Any = None, seen: Any = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        whole = jax.tree.unflatten(structure, mask_arrays)
        more = []
        if keep is not None:
            packed = hopper_packing.packed(keep, config.rows, bk, interpret=interpret)
            more += [dense.listed(packed, whole, config.rows, L, S, bk), packed]
        elif by_ids:
            more.append(visits.table(whole, config.rows, L, S, bk))
        if by_ids:  # a tile's ids are loaded whole
            mask_arrays = jax.tree.leaves(whole.padded(items.row_tiles * config.rows - L, cdiv(S, bk) * bk - S))
        if bias is not None:
            more.append(dense.lay_out(bias, config.rows, bk))
        if shape.sinks:
            more.append(sinks.astype(jnp.float32))
        if recipe.drops:
            more.append(jnp.broadcast_to(seeds, (B, Hq, seeds.shape[-1])))
        if shape.scale is None:
            more.append(scale.astype(jnp.float32))
        if seen is not None:
            more.append(words(seen, bk))
        out, lse = call(query, key, value, *mask_arrays, *more)
        return out, lse[:, :, :L]

    return run
