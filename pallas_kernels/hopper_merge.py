"""The pieces of a decode kernel put together by their lse, on Hopper (sm_90): softmaxes over parts of the keys become that of all.

    lse = log(sum_s exp(lse_s) + exp(sink));  out = sum_s exp(lse_s - lse) * out_s

Grid: one program, a single warpgroup, for each row of an item and each WIDTH columns. It reads as many pieces at a time as items
have as a rule, whose loads do not wait for one another, in the order of the keys, so that the same pieces give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contracts import ForwardShape
from pallas_kernels.hopper_recipe import shared
from pallas_kernels.shares import Shares
from pallas_kernels.visits import cdiv

MOST_AT_ONCE = 36
"""Pieces, whose values and lse want three or four registers each: 128 of them for a sequence's four heads over the whole chip."""

WIDTH = 128
"""Columns of a program, one a thread; beyond Ev they are never written, nor read by anybody."""


def merge(
    shape: ForwardShape, shares: Shares, *, in_pairs: bool = False, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function (out, lse, before, sinks) -> (out, lse) of the call, in its layout and dtype, lse (B, Hq, L) float32.

    out (slots, rows, Ev, filled up to a multiple of WIDTH) and lse (slots, …), float32, of the pieces; before: of `shares`, None
    where it does not search; sinks (1|B, Hq), None without. in_pairs: out is (slots, rows, n, 2, WIDTH / 2), of each WIDTH columns
    the even ones and then the odd ones.
    """
    B, Hq, H, L, Ev = shape.batch, shape.q_heads, shape.kv_heads, shape.query_len, shape.value_head_dim
    columns, at_once = cdiv(Ev, WIDTH) * WIDTH, cdiv(shares.pieces, cdiv(shares.pieces, MOST_AT_ONCE))
    own = (WIDTH // 2, 2) if in_pairs else (WIDTH,)
    layout = plgpu.Layout.WG_STRIDED(own, vec_size=1)

    def kernel(*operands: Any, out_s: Any) -> None:
        given = iter(operands)
        parts, lses = next(given), next(given)
        before = next(given) if shares.searches else None
        sinks = next(given) if shape.sinks else None
        out_ref, lse_ref = given
        item, row = lax.axis_index("item"), lax.axis_index("row")
        column = lax.axis_index("column") * WIDTH
        b, l = lax.div(item, np.int32(H)), lax.rem(row, np.int32(L))
        head = lax.rem(item, np.int32(H)) * shape.group + lax.div(row, np.int32(L))
        first, count = shares.of_item(item, before)

        def step(i: Any, state: Any) -> Any:
            acc, m, total = state
            found = []
            for n in range(at_once):
                at = i * at_once + n
                piece = first + jnp.minimum(at, count - 1)
                if in_pairs:
                    where = parts.at[piece, row, lax.axis_index("column")].transpose((1, 0))
                else:
                    where = parts.at[piece, row, pl.ds(column, WIDTH)]
                values = plgpu.load(where, layout=layout)  # pyright: ignore[reportCallIssue]
                found.append((jnp.where(at < count, lses[piece, row], -jnp.inf), values))
            new = m
            for lse, _ in found:
                new = jnp.maximum(new, lse)
            top = jnp.where(new == -jnp.inf, 0.0, new)  # -inf - -inf would be NaN
            shrink = jnp.exp(m - top)
            acc, total = acc * shrink, total * shrink
            for lse, values in found:
                weight = jnp.exp(lse - top)
                acc, total = acc + values * weight, total + weight
            return acc, new, total

        acc = plgpu.layout_cast(jnp.zeros(own, jnp.float32), layout)
        if sinks is None:
            m, total = jnp.float32(-jnp.inf), jnp.float32(0.0)
        else:
            m = sinks[(*shared(sinks, b), head)]
            total = jnp.where(m == -jnp.inf, 0.0, 1.0)
        steps = lax.div(count + (at_once - 1), np.int32(at_once))
        acc, m, total = lax.fori_loop(0 * item, steps, step, (acc, m, total))
        empty = total == 0.0
        safe = jnp.where(empty, 1.0, total)
        found = (acc * jnp.where(empty, 0.0, 1 / safe)).astype(shape.dtype)
        if in_pairs and interpret is None:
            out_s.reshape(own)[...] = found
        else:  # Mosaic's interpreter knows no reshaped memory, the hardware no reshaped registers
            out_s[...] = found.reshape(WIDTH)
        plgpu.commit_smem()
        at = (b, head, l) if shape.layout == "BHLE" else (b, l, head)
        if Ev < WIDTH:
            plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, Ev)], out_ref.at[at])
        else:
            plgpu.copy_smem_to_gmem(out_s, out_ref.at[(*at, pl.ds(column, WIDTH))])

        @pl.when(column == 0)
        def _() -> None:
            lse_ref[b, head, l] = jnp.where(empty, -jnp.inf, m + jnp.log(safe))

        plgpu.wait_smem_to_gmem(0)

    lead = (B, Hq, L) if shape.layout == "BHLE" else (B, L, Hq)
    call = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*lead, Ev if Ev < WIDTH else columns), shape.dtype),
            jax.ShapeDtypeStruct((B, Hq, L), jnp.float32),
        ],
        grid=(B * H, shape.group * L, columns // WIDTH),
        grid_names=("item", "row", "column"),
        scratch_types={"out_s": plgpu.SMEM((WIDTH,), shape.dtype)},
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )

    def run(parts: Any, lses: Any, before: Any = None, sinks: Any = None) -> tuple[jax.Array, jax.Array]:
        more = [] if sinks is None else [sinks.astype(jnp.float32)]
        out, lse = call(parts, lses, *([] if before is None else [before]), *more)
        return out[..., :Ev], lse

    return run
