"""Attention of a few queries to many keys on Hopper (sm_90): keys stream past once, as fast as memory gives them.

The query heads that share a key/value head lie one after the other in a tile's rows, (group, L), so K and V are read once for all
of them (FlashAttention's packed GQA). Programs take equal shares of all key tiles (`shares`), as Stream-K divides a matrix product
(Osama et al., arXiv:2301.03598); a head that several programs read is put together by its lse (`hopper_merge`), as in
flash-decoding (Dao et al., 2023).

Grid: programs, one for each SM. A piece is what a program has of one item: a run of key tiles of one batch entry's key/value head.
Rings, roles and barriers are the forward's (`hopper_keys`); where keys come in 8 bits, further warpgroups widen them on their way
(`hopper_eight_bits`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import online_softmax, visits
from pallas_kernels.contracts import SCALES_OF_PAGE, DecodeConfig, ForwardShape
from pallas_kernels.hopper_eight_bits import NarrowRing
from pallas_kernels.hopper_hidden import hidden_by_numbers, seen_by_any
from pallas_kernels.hopper_keys import Ring
from pallas_kernels.hopper_memory import rows_of, tile
from pallas_kernels.hopper_merge import WIDTH
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.hopper_program import drain, in_roles, launch, slot
from pallas_kernels.hopper_scores import Recipe, Refs, Rows, mask_of, shared
from pallas_kernels.online_softmax import over_columns
from pallas_kernels.shares import Shares
from pallas_kernels.visits import cdiv


def forward(
    shape: ForwardShape, config: DecodeConfig, shares: Shares, mask: Any = None, *, page: int | None = None,
    narrow: Any = None, interpret: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:  # fmt: skip
    """A function (query, key, value, *, before, mask_arrays, scale, pages, key_scale, value_scale) -> (out, lse) of the pieces.

    query: (B, H, rows, E), a group's heads times L, row g * L + l, as many as `flash_decode.query_rows` says. key, value as the
    forward's; with `page`, (pages, page, H, E) in layout 'BLHE', and pages (B, …) int32 says which of them hold a sequence's keys,
    one after another. narrow: the dtype of key and value where that is one of 8 bits; their scales are float32 then, (1|B, 1|H,
    S), S a multiple of 4, or where they lie, (pages, 1|H, page), if a page has at least SCALES_OF_PAGE keys. before: of `shares`,
    where it searches. out: float32 (slots, rows, Ev, with more columns as `hopper_merge` wants them), each piece normalised by
    itself; lse: (slots, config.rows). Slots without a piece hold anything.
    """
    H, L, S = shape.kv_heads, shape.query_len, shape.key_len
    E, Ev, dtype = shape.head_dim, shape.value_head_dim, shape.dtype
    bq, bk, n_wg, width = config.block_q, config.block_k, config.warpgroups, config.out_columns(E, Ev)
    rows_out = cdiv(shape.group * L, 8) * 8
    arrays, structure = jax.tree.flatten(mask)
    recipe = Recipe(
        shape, config, None if mask is None else structure, has_ids=False, is_prefix=mask is None or mask.is_prefix,
        hides=hidden_by_numbers(mask, L, S), bias_kind=None, keep_kind=None,
        generator=None, products=Wgmma(interpret is not None), folded=True,
    )  # fmt: skip
    keys_of_page = S if page is None else page
    copies = max(1, bk // keys_of_page) if page is not None else 1
    paged_scales = page is not None and page >= SCALES_OF_PAGE
    scale_copies = copies if paged_scales else 1
    narrow_scratch = {} if narrow is None else NarrowRing.scratch(shape, config, narrow, copies, scale_copies)

    def parts_of(t: Any) -> Any:
        """(the first key, its rows in the tile) of each copy of key tile t: only a page's keys lie together."""
        length = bk // copies
        return [(t * bk + n * length, pl.ds(n * length, length)) for n in range(copies)]

    def kernel(*operands: Any, q_s: Any, out_s: Any, lse_s: Any, q_ready: Any, **keys: Any) -> None:
        given = iter(operands)
        q_ref, k_ref, v_ref = next(given), next(given), next(given)
        before = next(given) if shares.searches else None
        refs = Refs(
            mask=[next(given) for _ in arrays], table=None, keep=None, bias=None, sinks=None, seeds=None,
            scale=next(given) if shape.scale is None else None, bias_s=None, bias_ready=None, bias_free=None,
            scales_s=keys.get("scales_s"),
        )  # fmt: skip
        pages = None if page is None else next(given)
        scale_refs = [] if narrow is None else [next(given), next(given)]
        out_ref, lse_ref = given
        narrow_own = {name: keys.pop(name) for name in narrow_scratch}
        ring = Ring(recipe, **keys, copies=copies)
        narrow_ring = NarrowRing(ring, **narrow_own) if narrow_own else None
        pool = k_ref.shape[0]
        program, wg = lax.axis_index("program"), lax.axis_index("wg")
        first, start, count, end = shares.of_program(program, before)
        zero = 0 * program  # an int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands

        def loop(start: Any, stop: Any, body: Callable[..., Any], state: Any) -> Any:
            return lax.fori_loop(start + zero, stop + zero, body, state)

        def place(n: Any) -> tuple[Any, Any]:
            """(b, key/value head) of piece n."""
            return lax.div(first + n, np.int32(H)), lax.rem(first + n, np.int32(H))

        def walk_of(n: Any, b: Any) -> Any:
            """The key tiles of piece n."""
            walk = visits.ranges(mask_of(recipe, refs, b), 0, L, L, S, bk)
            if shares.whole or (isinstance(walk.steps, int) and walk.steps == 1):
                return walk
            stop = jnp.where(n == count - 1, end, walk.steps)
            return walk.part(jnp.where(n == 0, start, zero), stop)

        def q_slot(n: Any) -> Any:
            return wg + n_wg * slot(n + zero, 2) if config.queries == 2 else wg

        def load_q(n: Any) -> None:
            b, h = place(n)
            plgpu.copy_gmem_to_smem(rows_of("BHLE", q_ref, b, wg * bq, bq, h), q_s.at[q_slot(n)], q_ready.at[q_slot(n)])

        def prefetch(n: Any) -> None:
            """Ask for the rows of piece n: their memory has been read."""
            plgpu.commit_smem()
            pl.when(n < count)(lambda: load_q(n))

        def finish(n: Any, acc: Any, m: Any, l: Any) -> None:
            """Store the results of piece n."""
            share, lse = online_softmax.finish(m, l, recipe.factor)
            acc, out = acc * over_columns(share, acc), out_ref.at[first + n + program, pl.ds(wg * bq, bq)]
            for column in range(0, Ev, width):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left
                plgpu.commit_smem()
                out_s[wg] = acc[:, column : column + width]
                if column == 0:
                    lse_s[wg] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[wg], out.at[:, pl.ds(column, width)])
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[first + n + program, pl.ds(wg * bq, bq)])

        def attend(n: Any, done: Any) -> Any:
            """Piece n, `done` tiles into the ring."""
            if config.queries == 2:
                prefetch(n + 1)
            b, h = place(n)
            rows = Rows(recipe, refs, b, h, wg * bq, wg, walk_of(n, b), 0, None)

            def query() -> Any:
                plgpu.barrier_wait(q_ready.at[q_slot(n)])
                return q_s.at[q_slot(n)]

            acc, m, l = ring.attend(rows, query, done, loop, between=(lambda: prefetch(n + 1)) if config.queries == 1 else None)
            finish(n, acc, m, l)
            return done + rows.walk.steps

        def compute() -> None:
            """One computing warpgroup."""
            pl.when(count > 0)(lambda: load_q(0))
            loop(0, count, attend, zero)
            plgpu.wait_smem_to_gmem(0)

        def load(n: Any, done: Any) -> Any:
            """The tiles of piece n, as soon as there is room; `done` as in attend."""
            b, h = place(n)
            walk, seen = walk_of(n, b), seen_by_any(recipe, refs, b)

            def step(i: Any, _: Any) -> None:
                t = walk.tile(i)

                def page_of(key: Any) -> Any:
                    """The page that holds this key. Behind the last one it comes again, and what is no page is one: unseen."""
                    assert pages is not None
                    of = pages[b, visits.least(lax.div(key, np.int32(keys_of_page)), pages.shape[1] - 1)]
                    return visits.greatest(visits.least(of, pool - 1), 0)

                def copy(operand: Any, memory: Any, ready: Any) -> None:
                    if pages is None:
                        plgpu.copy_gmem_to_smem(rows_of(shape.layout, operand, b, t * bk, bk, h), memory, ready)
                        return
                    for key, rows in parts_of(t):
                        source = operand.at[page_of(key), pl.ds(lax.rem(key, np.int32(keys_of_page)), rows.size), h]
                        plgpu.copy_gmem_to_smem(source, memory.at[rows], ready)

                def copy_scales(operand: Any, memory: Any, ready: Any) -> None:
                    lead = shared(operand, b, h)
                    if not paged_scales:
                        plgpu.copy_gmem_to_smem(operand.at[(*lead, pl.ds(t * bk, bk))], memory, ready)
                        return
                    for key, rows in parts_of(t):
                        source = operand.at[page_of(key), lead[1], pl.ds(lax.rem(key, np.int32(keys_of_page)), rows.size)]
                        plgpu.copy_gmem_to_smem(source, memory.at[rows], ready)

                keys, values = functools.partial(copy, k_ref), functools.partial(copy, v_ref)
                if narrow_ring is None:
                    ring.bring_keys(done + i, keys)
                    ring.bring_values(done + i, values, t, seen)
                else:
                    key_scales, value_scales = (functools.partial(copy_scales, ref) for ref in scale_refs)
                    narrow_ring.bring_keys(done + i, keys, (key_scales, value_scales))
                    narrow_ring.bring_values(done + i, values)

            loop(0, walk.steps, step, None)
            return done + walk.steps

        def load_all() -> None:
            done = loop(0, count, load, zero)
            drain([(free, of) for _, free, of in ring.rings] if narrow_ring is None else narrow_ring.rings, done)

        def convert_all(rings: Sequence[int]) -> None:
            """A warpgroup that widens keys (0), values (1), or both."""
            assert narrow_ring is not None
            widen = [(narrow_ring.widen_keys, narrow_ring.widen_values)[which] for which in rings]

            def convert(n: Any, done: Any) -> Any:
                b, _ = place(n)
                walk, seen = walk_of(n, b), seen_by_any(recipe, refs, b)

                def step(i: Any, _: Any) -> None:
                    for one in widen:
                        one(done + i, walk.tile(i), seen)

                loop(0, walk.steps, step, None)
                return done + walk.steps

            done = loop(0, count, convert, zero)
            drain([ring.rings[which][1:] for which in rings], done)

        each = [] if narrow is None else [(0, 1)] if config.converters == 1 else [(0,), (1,)]
        in_roles(config, wg, compute, load_all, interpret, *(functools.partial(convert_all, rings) for rings in each))

    q_slots = config.queries * n_wg
    call = launch(
        kernel,
        config,
        out_type=[
            jax.ShapeDtypeStruct((shares.slots, rows_out, cdiv(Ev, WIDTH) * WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((shares.slots, config.rows), jnp.float32),
        ],
        programs=shares.programs,
        scratch_types={
            "q_s": tile((q_slots, bq), E, dtype),
            **Ring.tiles(shape, config),
            "out_s": tile((n_wg, bq), width, jnp.float32),
            "lse_s": plgpu.SMEM((n_wg, bq), jnp.float32),
            "q_ready": plgpu.Barrier(num_barriers=q_slots),
            **Ring.barriers(config, hides=recipe.hides and narrow is None, copies=copies if narrow is None else 1),
            **narrow_scratch,
        },
        interpret=interpret,
    )

    def run(
        query: Any, key: Any, value: Any, *, before: Any = None, mask_arrays: Sequence[Any] = (), scale: Any = None,
        pages: Any = None, key_scale: Any = None, value_scale: Any = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        where, more, scales = ([x for x in given if x is not None] for given in ([before], [pages], [key_scale, value_scale]))
        if shape.scale is None:
            more = [scale.astype(jnp.float32), *more]
        return call(query, key, value, *where, *mask_arrays, *more, *scales)

    return run
