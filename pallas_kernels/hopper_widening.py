"""Numbers of 8 bits to bfloat16 in the registers of a warpgroup, exactly: int8 and e4m3 are numbers of it.

A register holds two pairs of neighbours, of which one becomes the low and the other the high half of the results, so that both the
first and the second numbers of all pairs are a tile in the layout of the pairs'. In PTX, because what XLA makes of shifts of 16-bit
halves takes each apart: 422 instructions on the integer units for 64 numbers of a thread, where these take 160, and they set the
pace (NOTES.md, "Keys and values of 8 bits").
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels.hopper_memory import TILE
from pallas_kernels.hopper_ptx import i32, ptx

INT8 = """{
.reg .b32 high, magnitude, sign;
shr.b32 high, $2, 8;
lop3.b32 magnitude, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xea;
sub.bf16x2 $0, magnitude, sign;
lop3.b32 magnitude, high, 0x007f007f, 0x43004300, 0xea;
lop3.b32 sign, high, 0x00800080, 0x43004300, 0xea;
sub.bf16x2 $1, magnitude, sign;
}"""
"""0x4300 is 128, whose last 7 bits count by 1: 128 and the low bits, less 128, or 256 of a negative number. 0xea: (a & b) | c."""

E4M3 = """{
.reg .b32 sorted, low, high;
.reg .b16 first, second, a, b, c, d;
.reg .f32 x, y, z, w;
prmt.b32 sorted, $2, 0, 0x3120;
mov.b32 {first, second}, sorted;
cvt.rn.f16x2.e4m3x2 low, first;
cvt.rn.f16x2.e4m3x2 high, second;
mov.b32 {a, b}, low;
mov.b32 {c, d}, high;
cvt.f32.f16 x, a;
cvt.f32.f16 y, b;
cvt.f32.f16 z, c;
cvt.f32.f16 w, d;
cvt.rn.bf16x2.f32 $0, y, x;
cvt.rn.bf16x2.f32 $1, w, z;
}"""
"""By way of float16, which is all that the hardware makes of e4m3, and float32."""


def widened(pairs: Any, narrow: Any) -> tuple[Any, Any]:
    """(the first, the second number of each pair) in bfloat16: pairs (rows, n) int16 in WGMMA's layout, of int8 or float8_e4m3fn,
    the first number in the low byte."""
    result = plgpu.ShapeDtypeStruct(pairs.shape, jnp.bfloat16, layout=TILE)
    code = INT8 if narrow == jnp.int8 else E4M3

    def both(_: Any, pairs: Any) -> Any:
        bf16x2 = ir.VectorType.get((2,), ir.BF16Type.get())
        tiles = pairs.registers.copy(), pairs.registers.copy()
        for index, register in np.ndenumerate(pairs.registers):
            pair = ptx(code, "=r,=r,r", [i32(), i32()], [mgpu.utils.bitcast(register, i32())])
            for into, found in zip(tiles, pair, strict=True):
                into[index] = mgpu.utils.bitcast(found, bf16x2)
        return tuple(mgpu.FragmentedArray(_registers=own, _layout=pairs.layout, _is_signed=None) for own in tiles)

    run: Any = plgpu.inline_mgpu(arg_types=(TILE,), return_type=(result, result))(both)
    return run(pairs)
