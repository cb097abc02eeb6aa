"""Attention of a few queries to many keys of 8 bits on Hopper (sm_90), with the keys in the rows of a product.

Algorithm: `hopper_decode`'s, but s.T = k @ q.T and out.T = v.T @ p.T, so that the 64 rows of a wgmma are keys, or columns of v, and
the few queries its 8 columns or more: nothing is computed for rows that are not there, and the wide operand is the one that wgmma
takes from registers. There keys and values are widened, exactly (int8 and e4m3 are numbers of bfloat16), between shared memory
and product. Their scales meet the scores: s[:, j] * key_scale[j], p[:, j] * value_scale[j].

Two neighbours of 8 bits are a number of 16, of which ldmatrix gives each thread those of a wgmma's operand, transposed for v. The
low byte is an even column, the high byte an odd one, so a tile of pairs is two operands: k's even columns meet q's even columns,
v's make the even columns of out.

Grid: programs, several on an SM, each with a warpgroup that computes and one that loads; while one waits, another computes. A
program's ring holds tiles of keys, of values and of both scales:

    k_ready, v_ready   loader -> computer    keys and scales, or values, have arrived (TMA counts their bytes)
    free               computer -> loader    all of it is in registers
    v_came             the loader's own      values of e4m3, in which it still has to clear what nobody sees
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, online_softmax
from pallas_kernels.contracts import DecodeConfig, ForwardShape
from pallas_kernels.hopper_hidden import Part, bring, seen_by_any
from pallas_kernels.hopper_memory import COLUMN, ROW, TILE, swizzle_of, tile
from pallas_kernels.hopper_merge import WIDTH
from pallas_kernels.hopper_pieces import Paging, Pieces, operands_of, pieces_of, recipe_of
from pallas_kernels.hopper_program import drain, launch, slot
from pallas_kernels.hopper_recipe import adjusted, filled, mask_of
from pallas_kernels.hopper_widening import widened
from pallas_kernels.online_softmax import over_columns, over_rows
from pallas_kernels.shares import Shares
from pallas_kernels.visits import cdiv

KEY, VALUE = 0, 1  # whose scales

SCRATCH = 128
"""Bytes of `launch`'s scratch for each query: what 128 threads have of the maxima of a tile (64, queries), float32."""


def whole_products(value_head_dim: int) -> int:
    """Columns of values that wgmma takes: two operands of 64 rows, even and odd ones. TMA writes zeros behind Ev."""
    return cdiv(value_head_dim, WIDTH) * WIDTH


def forward(
    shape: ForwardShape, config: DecodeConfig, shares: Shares, mask: Any = None, *, narrow: Any, page: int | None = None,
    interpret: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:  # fmt: skip
    """A function (query, key, value, *, before, mask_arrays, scale, pages, key_scale, value_scale) -> (out, lse) of the pieces.

    As `hopper_decode.forward`, for key and value of type `narrow`, int8 or float8_e4m3fn, E and Ev multiples of 32, and query with
    a multiple of 8 rows. The scales are float32, (1|B, 1|H, S), S a multiple of 4, or where they lie, (pages, 1|H, page), if a page
    has at least SCALES_OF_PAGE keys. out: (slots, rows, n, 2, 64), of each 128 columns the even ones, then the odd ones.
    """
    E, Ev, dtype, stages, bk = shape.head_dim, shape.value_head_dim, shape.dtype, config.stages, config.block_k
    columns, all_of_v = cdiv(shape.group * shape.query_len, 8) * 8, whole_products(Ev)
    recipe, paging = recipe_of(shape, config, mask, interpret), Paging(page, config.block_k)
    arrays, products, is_real = jax.tree.leaves(mask), recipe.products, interpret is None
    may_say_nan = recipe.hides and narrow != jnp.int8  # 0 * NaN of a value that nobody sees would be NaN
    # the same bytes at the same places: tiles of 8 rows by one swizzle, and nothing between keys' memory and values'
    tiles = tuple(tile((stages, bk), dim, narrow) for dim in (E, all_of_v))
    in_pairs = tuple(tile((stages, bk), dim // 2, jnp.int16) for dim in (E, all_of_v))
    _, at_once = swizzle_of(E // 2, jnp.int16)

    def pairs(memory: tuple[Any, Any], now: Any, where: Any, *, transposed: bool) -> tuple[Any, Any]:
        """Some columns of pairs of a tile in shared memory (keys, dim) as two operands in registers."""
        if is_real:
            found = memory[1].at[now, :, where]
            found = found.transpose((1, 0)) if transposed else found
            return widened(plgpu.load(found, layout=TILE), narrow)  # pyright: ignore[reportCallIssue]
        found = memory[0][now]  # the interpreter does not know two types of the same memory
        products.read()
        even, odd = (found[:, n::2][:, where.start : where.start + where.size].astype(dtype) for n in (0, 1))
        return (even.T, odd.T) if transposed else (even, odd)

    def kernel(*operands: Any, q_s: Any, kv_s: Any, scales_s: Any, p_s: Any, out_s: Any, lse_s: Any, **barriers: Any) -> None:
        given = iter(operands)
        q_ref, k_ref, v_ref = next(given), next(given), next(given)
        pieces = pieces_of(recipe, shares, paging, given, arrays, k_ref.shape[0])
        key_scales, value_scales, out_ref, lse_ref = given
        q_ready, k_ready, v_ready, free = (barriers[name] for name in ("q_ready", "k_ready", "v_ready", "free"))
        (k8, v8), (k16, v16) = kv_s if is_real else (kv_s, kv_s)

        def prefetch(n: Any) -> None:
            """Ask for the rows of piece n: the memory of piece n - 2 has been read."""

            @pl.when(n < pieces.count)
            def _() -> None:
                b, h = pieces.place(n)
                now = slot(n + pieces.zero, 2)
                for parity in (0, 1):
                    plgpu.copy_gmem_to_smem(q_ref.at[b, h, parity], q_s.at[now, parity], q_ready.at[now])

        def by_key(of: int, now: Any) -> Any:
            found = plgpu.load(scales_s.at[now, of], layout=ROW, optimized=False)  # pyright: ignore[reportCallIssue]
            products.read()
            return found

        def scores(q: Any, now: Any) -> Any:
            """(keys, queries) float32."""
            cut = [pl.ds(n, at_once) for n in range(0, E // 2, at_once)]
            operands = [
                (x, q.at[parity, :, where].transpose((1, 0)))
                for where in cut
                for parity, x in enumerate(pairs((k8, k16), now, where, transposed=False))
            ]
            return products.sum(operands, (bk, columns))

        def attend(n: Any, done: Any) -> Any:
            """Piece n, `done` tiles into the ring."""
            prefetch(n + 1)
            b, _ = pieces.place(n)
            walk, seen = pieces.walk(n, b), seen_by_any(recipe, pieces.refs, b)
            at = slot(n + pieces.zero, 2)
            plgpu.barrier_wait(q_ready.at[at])
            q = q_s.at[at]

            def step(i: Any, state: Any) -> Any:
                *accs, m, l = state
                now, t = slot(done + i, stages), walk.tile(i)
                plgpu.barrier_wait(k_ready.at[now])
                s = scores(q, now) * over_columns(by_key(KEY, now), l)
                s = _cut(pieces, b, adjusted(recipe, pieces.refs, b, s), walk, i)
                m, shrink, p = online_softmax.powers(s, recipe.factor, m, axis=0)
                l = l * over_rows(shrink, l) + p
                part = None if seen is None else seen.part(t * bk, bk)
                p_s.transpose((1, 0))[...] = (p * over_columns(_kept(by_key(VALUE, now), part), p)).astype(dtype)
                plgpu.barrier_wait(v_ready.at[now])
                values = [
                    x for column in range(0, all_of_v // 2, 64) for x in pairs((v8, v16), now, pl.ds(column, 64), transposed=True)
                ]
                plgpu.commit_smem()  # p is seen by wgmma, and TMA may write where everything has been read
                plgpu.barrier_arrive(free.at[now])
                accs = [acc * over_rows(shrink, acc) for acc in accs]
                return *products.add_each(accs, values, p_s.transpose((1, 0))), m, l

            start = [filled((64, columns), 0.0, TILE) for _ in range(all_of_v // 64)]
            state = (*start, filled((columns,), -jnp.inf, COLUMN), filled((bk, columns), 0.0, TILE))
            *accs, m, l = pieces.loop(0, walk.steps, step, state)
            share, lse = online_softmax.finish(m, l.sum(axis=0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left
            plgpu.commit_smem()
            for column, acc in enumerate(accs):
                out_s.at[column].transpose((1, 0))[...] = plgpu.layout_cast(
                    acc * over_rows(share, acc), plgpu.Layout.WGMMA_TRANSPOSED
                )
            lse_s[...] = lse
            plgpu.commit_smem()
            for column in range(len(accs)):
                plgpu.copy_smem_to_gmem(out_s.at[column], out_ref.at[pieces.slot(n), :, column])
            plgpu.copy_smem_to_gmem(lse_s, lse_ref.at[pieces.slot(n)])
            return done + walk.steps

        def compute() -> None:
            prefetch(0)
            pieces.each(attend)
            plgpu.wait_smem_to_gmem(0)

        def load(n: Any, done: Any) -> Any:
            """The tiles of piece n, as soon as there is room; `done` as in attend."""
            b, h = pieces.place(n)
            walk, seen = pieces.walk(n, b), seen_by_any(recipe, pieces.refs, b) if may_say_nan else None

            def step(i: Any, _: Any) -> None:
                now, t = slot(done + i, stages), walk.tile(i)
                part = None if seen is None else seen.part(t * bk, bk)
                pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(free.at[now]))
                pieces.keys(k_ref, b, h, t)(k8.at[now], k_ready.at[now])
                for of, scales in ((KEY, key_scales), (VALUE, value_scales)):
                    pieces.scales(scales, b, h, t)(scales_s.at[now, of], k_ready.at[now])
                bring(pieces.keys(v_ref, b, h, t), v8.at[now], v_ready.at[now], part, barriers.get("v_came"), paging.copies)

            pieces.loop(0, walk.steps, step, None)
            return done + walk.steps

        wg = lax.axis_index("wg")
        pl.when(wg == 0)(compute)
        pl.when(wg == 1)(lambda: drain(config, [(free, stages)], pieces.each(load)))

    call = launch(
        kernel,
        config,
        out_type=[
            jax.ShapeDtypeStruct((shares.slots, columns, all_of_v // 64, 64), jnp.float32),
            jax.ShapeDtypeStruct((shares.slots, columns), jnp.float32),
        ],
        programs=shares.programs,
        scratch_types={
            "q_s": tile((2, 2, columns), E // 2, dtype),
            "kv_s": plgpu.RefUnion(tiles, in_pairs) if is_real else tiles,
            "scales_s": plgpu.SMEM((stages, 2, bk), jnp.float32),
            "p_s": tile((columns,), bk, dtype),
            "out_s": tile((all_of_v // 64, columns), 64, jnp.float32),
            "lse_s": plgpu.SMEM((columns,), jnp.float32),
            "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
            "k_ready": plgpu.Barrier(num_arrivals=paging.copies + 2 * paging.scale_copies, num_barriers=stages),
            "v_ready": plgpu.Barrier(num_arrivals=paging.copies, num_barriers=stages),
            "free": plgpu.Barrier(num_barriers=stages),
            **({"v_came": plgpu.Barrier(num_arrivals=paging.copies)} if may_say_nan else {}),
        },
        interpret=interpret,
        scratch_bytes=SCRATCH * columns,
    )

    def run(
        query: Any, key: Any, value: Any, *, before: Any = None, mask_arrays: Sequence[Any] = (), scale: Any = None,
        pages: Any = None, key_scale: Any = None, value_scale: Any = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        B, H, rows, _ = query.shape
        even_odd = jnp.moveaxis(query.reshape(B, H, rows, E // 2, 2), -1, 2)  # (B, H, 2, rows, E / 2)
        out, lse = call(even_odd, key, value, *operands_of(before, mask_arrays, scale, pages), key_scale, value_scale)
        return out.reshape(*out.shape[:2], all_of_v // WIDTH, 2, 64), lse

    return run


def _cut(pieces: Pieces, b: Any, s: Any, walk: Any, i: Any) -> Any:
    """The scores (keys, queries) of step i, masked where that is cut."""
    recipe, L = pieces.recipe, pieces.recipe.shape.query_len
    if recipe.mask is None and not recipe.ragged:
        return s

    def masked(s: Any) -> Any:
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=TILE) + walk.tile(i) * recipe.config.block_k
        query = 0 if L == 1 else lax.rem(plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE), np.int32(L))
        kept: Any = key < recipe.shape.key_len
        if recipe.mask is not None:
            kept = kept & mask_of(recipe, pieces.refs, b).keep(query, key)
        return jnp.where(plgpu.layout_cast(kept, TILE), s, -jnp.inf)

    return lax.cond(walk.partial(i), masked, lambda s: s, s)


def _kept(scales: Any, part: Part | None) -> Any:
    """The values' scales (keys,), 0 of keys that nobody sees: 0 * NaN would be NaN."""
    if part is None:
        return scales
    key = plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=ROW)
    return jnp.where(plgpu.layout_cast(dense.bit(part.seen(0), key), ROW), scales, 0.0)
