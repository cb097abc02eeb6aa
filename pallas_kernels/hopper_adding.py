"""Adding a tile of 64 x 64 into float32 sums in global memory, straight from a warpgroup's registers.

    sums[piece] += tile

The sums lie in the order of the registers, so that a warp adds 512 neighbouring bytes at a time; XLA puts them in order while it
rounds them (`in_order`). No shared memory, and nobody waits: a TMA reduce-add would want a copy there, and a fence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels.hopper_memory import TILE
from pallas_kernels.hopper_ptx import element, i32, op, ptx

SIDE = 64
PIECE = (SIDE // 8, 128, 4)
"""The sums of a tile: (8 columns each, threads, numbers of a thread)."""

ADD = "red.global.add.v4.f32 [$0 + {offset}], {{$1, $2, $3, $4}};"
"""PTX ISA 8.1, sm_90: four neighbours at once, in any order with what others add; done when the kernel has ended."""


def add_into(sums: Any, tile: Any) -> None:
    """sums (global memory, PIECE, float32) += tile (64, 64), float32 in WGMMA's layout."""

    def add(_: Any, sums: Any, tile: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        thread = op("arith.remui", i32(), mgpu.utils.thread_idx(), mgpu.utils.c(128, i32()))
        before = op("arith.muli", i64, op("arith.extui", i64, thread), mgpu.utils.c(16, i64))
        at = op("arith.addi", i64, op("llvm.ptrtoint", i64, mgpu.utils.memref_ptr(sums)), before)
        for n, pair in enumerate(tile.registers.reshape(-1, 2)):  # of 8 columns: two neighbours of row g, two of 8 rows below it
            numbers = [element(register, k) for register in pair for k in (0, 1)]
            ptx(ADD.format(offset=2048 * n), "l,f,f,f,f,~{memory}", [], [at, *numbers], effects=True)

    run: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))(add)
    run(sums, tile)


def in_order(sums: jax.Array) -> jax.Array:
    """(*lead, rows of tiles * 64, columns of tiles * 64) from (*lead, rows of tiles, columns of tiles, *PIECE): one pass of XLA."""
    *lead, rows, columns = sums.shape[:-3]
    # thread = 32 * (rows of 16) + 4 * (row of 8) + (two columns of 8); numbers = (8 rows below or not, which of the two columns)
    apart = sums.reshape(-1, rows, columns, SIDE // 8, 4, 8, 4, 2, 2)
    found = jnp.transpose(apart, (0, 1, 4, 7, 5, 2, 3, 6, 8))
    return found.reshape(*lead, rows * SIDE, columns * SIDE)
