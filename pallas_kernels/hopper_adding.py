"""Adding a warpgroup's tile into float32 sums in global memory, straight from its registers.

    sums[pieces] += tile

A TMA reduce-add takes its tile from shared memory: written there, read again, 64 KB of the 370 KB that a step of the fused backward
moves through it (NOTES.md, "Hopper backward"). Sums that lie in the order of the registers need neither: a thread has 4 numbers of
each 8 columns, and a warp's 512 bytes are one stretch. XLA puts them in order while it rounds them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels.hopper_scores import TILE

ADD = "red.global.add.v4.f32 [$0 + {offset}], {{$1, $2, $3, $4}};"
"""PTX ISA 8.1, sm_90: four neighbours at once, in any order with what others add, visible when the kernel has ended."""


def pieces(rows: int, columns: int) -> tuple[int, int, int]:
    """The shape of the sums of a tile: (64 rows by 8 columns each, threads, numbers of a thread)."""
    return rows // 64 * columns // 8, 128, 4


def add_into(sums: Any, tile: Any) -> None:
    """sums (global memory, float32, `pieces` of the tile's shape) += tile (rows, columns), float32 in WGMMA's layout."""

    def add(_: Any, sums: Any, tile: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        pairs = tile.registers.reshape(-1, 2)  # of 64 rows and 8 columns: (row g and 8 rows below it), two neighbours each
        thread = mgpu.utils.thread_idx()
        own = ir.Operation.create("arith.remui", [i32], [thread, mgpu.utils.c(128, i32)]).result
        begin = ir.Operation.create("llvm.ptrtoint", [i64], [mgpu.utils.memref_ptr(sums)]).result
        wide = ir.Operation.create("arith.extui", [i64], [own]).result
        bytes_before = ir.Operation.create("arith.muli", [i64], [wide, mgpu.utils.c(16, i64)]).result
        at = ir.Operation.create("arith.addi", [i64], [begin, bytes_before]).result
        for n, pair in enumerate(pairs):
            numbers = [_element(register, k) for register in pair for k in (0, 1)]
            wanted: dict[str, Any] = {
                "asm_string": ir.StringAttr.get(ADD.format(offset=2048 * n)), "constraints": ir.StringAttr.get("l,f,f,f,f,~{memory}"),
                "has_side_effects": ir.UnitAttr.get(),
            }
            ir.Operation.create("llvm.inline_asm", [], [at, *numbers], wanted)

    run: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))(add)
    run(sums, tile)


def _element(register: Any, k: int) -> Any:
    position = {"static_position": ir.DenseI64ArrayAttr.get([k])}
    return ir.Operation.create("vector.extract", [ir.F32Type.get()], [register], position).result


def in_order(sums: jax.Array, rows: int, columns: int) -> jax.Array:
    """(…, rows, columns) from (…, *pieces(rows, columns)): XLA's work, one pass."""
    lead = sums.shape[:-3]
    # thread = 32 * (rows of 16) + 4 * (row of 8) + (two columns of 8); numbers = (8 rows below or not, which of the two columns)
    apart = sums.reshape(*lead, rows // 64, columns // 8, 4, 8, 4, 2, 2)
    n = len(lead)
    order = [n, n + 2, n + 5, n + 3, n + 1, n + 4, n + 6]
    return jnp.transpose(apart, [*range(n), *order]).reshape(*lead, rows, columns)
