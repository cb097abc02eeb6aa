"""Adding a tile of 64 x 64 into float32 sums in global memory, straight from a warpgroup's registers.

    sums[piece] += tile

The sums lie in the order of the registers, so that a warp adds 512 neighbouring bytes at a time; `in_order` puts them in order
while it rounds them. No shared memory, and nobody waits: a TMA reduce-add would want a copy there, and a fence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels.hopper_memory import TILE
from pallas_kernels.hopper_ptx import element, i32, op, program, ptx

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


def in_order(sums: jax.Array, factor: Any, dtype: Any, heads_axis: int) -> jax.Array:
    """factor * sums in a dtype of 16 bits, (B, Hq, rows, columns), or (B, rows, Hq, columns) where heads_axis is 2.

    sums: (B, Hq, rows / 64, columns / 64, *PIECE). factor: a number, for which there is a kernel (XLA's pass over B8 H16 L2048 D128
    takes 73 us of an H200, whose memory would do it in 47), or float32 (1|B, 1, 1, 1).
    """
    B, Hq, rows, columns = sums.shape[:-3]
    if not isinstance(factor, float):
        # thread = 32 * (rows of 16) + 4 * (row of 8) + (two columns of 8); numbers = (8 rows below or not, which of the two)
        apart = sums.reshape(-1, rows, columns, SIDE // 8, 4, 8, 4, 2, 2)
        found = jnp.transpose(apart, (0, 1, 4, 7, 5, 2, 3, 6, 8)).reshape(B, Hq, rows * SIDE, columns * SIDE)
        found = (found * factor).astype(dtype)
        return found if heads_axis == 1 else jnp.swapaxes(found, 1, 2)
    shape = (B, Hq, rows * SIDE) if heads_axis == 1 else (B, rows * SIDE, Hq)

    code = put_in_order(Hq, rows, columns, heads_axis, factor, "f16" if dtype == jnp.float16 else "bf16")
    return program(code, jax.ShapeDtypeStruct((*shape, columns * SIDE), dtype), B * Hq * rows * columns)(sums)


def put_in_order(heads: int, rows: int, columns: int, heads_axis: int, factor: float, kind: str) -> str:
    """PTX of a program of 128 threads and one piece: $0 the sums, $1 the results in `kind`.

    Of 8 columns n a thread c of four has two, of a row g (a<n>) and of 8 rows below (b<n>). They exchange until each has all 8 of
    column groups c and 4 + c: then it stores 16 bytes.
    """
    loads = "".join(
        f"ld.global.nc.v4.f32 {{f{4 * n}, f{4 * n + 1}, f{4 * n + 2}, f{4 * n + 3}}}, [from + {2048 * n}];\n" for n in range(8)
    )
    with np.errstate(over="ignore"):  # beyond float32 it is inf
        number = np.array(factor, ">f4").tobytes().hex()
    scaled = "".join(f"mul.f32 f{i}, f{i}, 0f{number};\n" for i in range(32))
    narrow = "".join(
        f"cvt.rn.{kind}x2.f32 {x}{n}, f{4 * n + at + 1}, f{4 * n + at};\n" for n in range(8) for x, at in (("a", 0), ("b", 2))
    )
    turned = "".join(_turned([f"{x}{4 * half + n}" for n in range(4)]) for x in "ab" for half in (0, 1))
    pitch = 2 * SIDE * columns * (heads if heads_axis == 2 else 1)  # bytes from row to row
    first = f"""
mad.lo.u32 row, block, {SIDE}, row;
mad.wide.u32 to, row, {pitch}, $1;
mul.wide.u32 from, head, {2 * SIDE * columns};
""" if heads_axis == 2 else f"""
mad.lo.u32 row, block, {SIDE}, row;
mul.wide.u32 from, head, {rows * SIDE};
cvt.u64.u32 to, row;
add.u64 from, from, to;
mov.u64 to, $1;
mul.lo.u64 from, from, {pitch};
"""  # fmt: skip
    batch = f"""
div.u32 piece, n, {heads};
mul.lo.u32 head, piece, {heads};
sub.u32 head, n, head;
mul.lo.u32 block, piece, {rows};
add.u32 block, block, tile;
""" if heads_axis == 2 else """
mov.u32 head, n;
mov.u32 block, tile;
"""  # fmt: skip
    stores = "".join(
        f"st.global.v4.b32 [to + {8 * pitch * below + SIDE * half}], {{{', '.join(f'{x}{4 * half + n}' for n in range(4))}}};\n"
        for below, x in enumerate("ab") for half in (0, 1)
    )  # fmt: skip
    return f"""{{
.reg .pred odd, high;
.reg .f32 f<32>;
.reg .b32 a<8>, b<8>, n, t, c, x, y, row, column, tile, piece, head, block;
.reg .b64 from, to;
mov.u32 t, %tid.x;
mov.u32 n, %ctaid.x;
mad.wide.u32 from, n, {4 * SIDE * SIDE}, $0;
mul.wide.u32 to, t, 16;
add.u64 from, from, to;
{loads}
rem.u32 column, n, {columns};
div.u32 n, n, {columns};
rem.u32 tile, n, {rows};
div.u32 n, n, {rows};
{batch}
and.b32 c, t, 3;
and.b32 x, c, 1;
setp.ne.u32 odd, x, 0;
setp.ge.u32 high, c, 2;
shr.u32 row, t, 5;
shl.b32 row, row, 4;
shr.u32 x, t, 2;
and.b32 x, x, 7;
or.b32 row, row, x;
{first}
add.u64 to, to, from;
mad.lo.u32 column, column, {2 * SIDE}, 0;
mad.lo.u32 column, c, 16, column;
cvt.u64.u32 from, column;
add.u64 to, to, from;
{scaled}{narrow}{turned}{stores}
}}"""


def _turned(v: Sequence[str]) -> str:
    """Of four threads c, v[k] becomes what thread k had in v[c]: the 2 x 2 blocks, then the two of each block."""
    code = ""
    for distance, bit in ((1, "odd"), (2, "high")):
        for low in (0, 1) if distance == 2 else (0, 2):
            mine, other = v[low], v[low + distance]
            code += (
                f"selp.b32 x, {mine}, {other}, {bit};\nshfl.sync.bfly.b32 y, x, {distance}, 0x1f, 0xffffffff;\n"
                f"selp.b32 {mine}, y, {mine}, {bit};\nselp.b32 {other}, {other}, y, {bit};\n"
            )
    return code
