"""Adding a warpgroup's tile into float32 sums in global memory, straight from its registers.

    sums[pieces] += tile

A TMA reduce-add takes its tile from shared memory: written there, read again, 64 KB of the 370 KB that a step of the fused backward
moves through it (NOTES.md, "Hopper backward"). Sums that lie in the order of the registers need neither: a thread has 4 numbers of
each 8 columns, and a warp's 512 bytes are one stretch. XLA puts them in order while it rounds them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels.hopper_scores import TILE

STORE = "st.shared.v4.f32 [$0 + {offset}], {{$1, $2, $3, $4}};"

ADD = """{{
.reg .pred one;
setp.eq.u32 one, $2, 0;
@one cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$0], [$1], {size};
@one cp.async.bulk.commit_group;
}}"""
"""PTX ISA 8.0, sm_90: one thread asks the copy engine, which adds in any order with others; done when the kernel has ended."""


def pieces(rows: int, columns: int) -> tuple[int, int, int]:
    """The shape of the sums of a tile: (64 rows by 8 columns each, threads, numbers of a thread)."""
    return rows // 64 * columns // 8, 128, 4


def stage(memory: Any, tile: Any) -> None:
    """memory (shared, float32, `pieces` of the tile's shape) = tile (rows, columns), float32 in WGMMA's layout."""

    def store(_: Any, memory: Any, tile: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        begin = _operation("llvm.ptrtoint", i32, mgpu.utils.memref_ptr(memory))
        at = _operation("arith.addi", i32, begin, _operation("arith.muli", i32, _thread(), mgpu.utils.c(16, i32)))
        for n, pair in enumerate(tile.registers.reshape(-1, 2)):  # of 64 rows and 8 columns: (row g, 8 rows below it)
            numbers = [_element(register, k) for register in pair for k in (0, 1)]
            _assembled(STORE.format(offset=2048 * n), "r,f,f,f,f,~{memory}", at, *numbers)

    run: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))(store)
    run(memory, tile)


def add_into(sums: Any, memory: Any) -> None:
    """sums (global memory) += memory (shared), both float32 and of one stretch: begun, when it is visible to the copy engine."""
    size = 4 * math.prod(memory.shape)

    def add(_: Any, sums: Any, memory: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        target, source = (_operation("llvm.ptrtoint", of, mgpu.utils.memref_ptr(x)) for of, x in ((i64, sums), (i32, memory)))
        _assembled(ADD.format(size=size), "l,r,r,~{memory}", target, source, _thread())

    run: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(add)
    run(sums, memory)


def _operation(name: str, result: Any, *operands: Any) -> Any:
    return ir.Operation.create(name, [result], list(operands)).result


def _thread() -> Any:
    """Of the warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return _operation("arith.remui", i32, mgpu.utils.thread_idx(), mgpu.utils.c(128, i32))


def _assembled(code: str, constraints: str, *operands: Any) -> None:
    wanted: dict[str, Any] = {
        "asm_string": ir.StringAttr.get(code), "constraints": ir.StringAttr.get(constraints), "has_side_effects": ir.UnitAttr.get(),
    }  # fmt: skip
    ir.Operation.create("llvm.inline_asm", [], list(operands), wanted)


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
