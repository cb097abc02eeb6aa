"""Attention of a few queries to many keys on Hopper (sm_90): keys stream past once, as fast as memory gives them.

The query heads that share a key/value head lie one after the other in a tile's rows, (group, L), so K and V are read once for all
of them (FlashAttention's packed GQA). Programs take equal shares of all key tiles (`shares`), as Stream-K divides a matrix product
(Osama et al., arXiv:2301.03598); a head that several programs read is put together by its lse (`hopper_merge`), as in
flash-decoding (Dao et al., 2023).

Grid: programs, one for each SM. A piece is what a program has of one item: a run of key tiles of one batch entry's key/value head
(`hopper_pieces`). Rings, roles and barriers are the forward's (`hopper_keys`). Keys of 8 bits: `hopper_eight_bits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.contracts import DecodeConfig, ForwardShape
from pallas_kernels.hopper_hidden import seen_by_any
from pallas_kernels.hopper_keys import Ring
from pallas_kernels.hopper_memory import rows_of, tile
from pallas_kernels.hopper_merge import WIDTH
from pallas_kernels.hopper_pieces import Paging, operands_of, pieces_of, recipe_of
from pallas_kernels.hopper_program import drain, in_roles, launch, slot
from pallas_kernels.hopper_scores import Rows
from pallas_kernels.online_softmax import over_columns
from pallas_kernels.shares import Shares
from pallas_kernels.visits import cdiv


def forward(
    shape: ForwardShape, config: DecodeConfig, shares: Shares, mask: Any = None, *, page: int | None = None, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function (query, key, value, *, before, mask_arrays, scale, pages) -> (out, lse) of the pieces.

    query: (B, H, rows, E), a group's heads times L, row g * L + l, as many as `flash_decode.query_rows` says. key, value as the
    forward's; with `page`, (pages, page, H, E) in layout 'BLHE', and pages (B, …) int32 says which of them hold a sequence's keys,
    one after another. before: of `shares`, where it searches. out: float32 (slots, rows, Ev, with more columns as `hopper_merge`
    wants them), each piece normalised by itself; lse: (slots, config.rows). Slots without a piece hold anything.
    """
    E, Ev, dtype = shape.head_dim, shape.value_head_dim, shape.dtype
    bq, n_wg, width = config.block_q, config.warpgroups, config.out_columns(E, Ev)
    rows_out = cdiv(shape.group * shape.query_len, 8) * 8
    recipe = recipe_of(shape, config, mask, interpret)
    arrays, paging = jax.tree.leaves(mask), Paging(page, config.block_k)

    def kernel(*operands: Any, q_s: Any, out_s: Any, lse_s: Any, q_ready: Any, **keys: Any) -> None:
        given = iter(operands)
        q_ref, k_ref, v_ref = next(given), next(given), next(given)
        pieces = pieces_of(recipe, shares, paging, given, arrays, k_ref.shape[0])
        out_ref, lse_ref = given
        refs, ring, wg, count = pieces.refs, Ring(recipe, **keys, copies=paging.copies), lax.axis_index("wg"), pieces.count

        def q_slot(n: Any) -> Any:
            return wg + n_wg * slot(n + pieces.zero, 2) if config.queries == 2 else wg

        def load_q(n: Any) -> None:
            b, h = pieces.place(n)
            plgpu.copy_gmem_to_smem(rows_of("BHLE", q_ref, b, wg * bq, bq, h), q_s.at[q_slot(n)], q_ready.at[q_slot(n)])

        def prefetch(n: Any) -> None:
            """Ask for the rows of piece n: their memory has been read."""
            plgpu.commit_smem()
            pl.when(n < count)(lambda: load_q(n))

        def finish(n: Any, acc: Any, m: Any, l: Any) -> None:
            """Store the results of piece n."""
            share, lse = online_softmax.finish(m, l)
            acc, out = acc * over_columns(share, acc), out_ref.at[pieces.slot(n), pl.ds(wg * bq, bq)]
            for column in range(0, Ev, width):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left
                plgpu.commit_smem()
                out_s[wg] = acc[:, column : column + width]
                if column == 0:
                    lse_s[wg] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[wg], out.at[:, pl.ds(column, width)])
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[pieces.slot(n), pl.ds(wg * bq, bq)])

        def attend(n: Any, done: Any) -> Any:
            """Piece n, `done` tiles into the ring."""
            if config.queries == 2:
                prefetch(n + 1)
            b, h = pieces.place(n)
            rows = Rows(recipe, refs, b, h, wg * bq, wg, pieces.walk(n, b), 0, None)

            def query() -> Any:
                plgpu.barrier_wait(q_ready.at[q_slot(n)])
                return q_s.at[q_slot(n)]

            between = (lambda: prefetch(n + 1)) if config.queries == 1 else None
            acc, m, l = ring.attend(rows, query, done, pieces.loop, between=between)
            finish(n, acc, m, l)
            return done + rows.walk.steps

        def compute() -> None:
            """One computing warpgroup."""
            pl.when(count > 0)(lambda: load_q(0))
            pieces.each(attend)
            plgpu.wait_smem_to_gmem(0)

        def load(n: Any, done: Any) -> Any:
            """The tiles of piece n, as soon as there is room; `done` as in attend."""
            b, h = pieces.place(n)
            walk, seen = pieces.walk(n, b), seen_by_any(recipe, refs, b)

            def step(i: Any, _: Any) -> None:
                t = walk.tile(i)
                ring.bring_keys(done + i, pieces.keys(k_ref, b, h, t))
                ring.bring_values(done + i, pieces.keys(v_ref, b, h, t), t, seen)

            pieces.loop(0, walk.steps, step, None)
            return done + walk.steps

        def load_all() -> None:
            drain(config, [(free, of) for _, free, of in ring.rings], pieces.each(load))

        in_roles(config, wg, compute, load_all, interpret)

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
            **Ring.barriers(config, hides=recipe.hides, copies=paging.copies),
        },
        interpret=interpret,
    )

    def run(
        query: Any,
        key: Any,
        value: Any,
        *,
        before: Any = None,
        mask_arrays: Sequence[Any] = (),
        scale: Any = None,
        pages: Any = None,
    ) -> tuple[jax.Array, jax.Array]:
        return call(query, key, value, *operands_of(before, mask_arrays, scale, pages))

    return run
