"""What Pallas has no word for, in PTX or in MLIR, on the registers of a warpgroup and on tiles in shared memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels.hopper_memory import COLUMN, ROW, TILE, WORDS, swizzle_of, transforms


def ptx(code: str, constraints: str, results: Sequence[Any], operands: Sequence[Any], *, effects: bool = False) -> list[Any]:
    """What `code` makes of the operands, in LLVM's notation: $0 and on are the results, then the operands. effects: it does
    something beside, and must stay where it is."""
    wanted: dict[str, Any] = {"asm_string": ir.StringAttr.get(code), "constraints": ir.StringAttr.get(constraints)}
    if effects:
        wanted["has_side_effects"] = ir.UnitAttr.get()
    if len(results) < 2:
        return list(ir.Operation.create("llvm.inline_asm", list(results), list(operands), wanted).results)
    struct = ir.Type.parse(f"!llvm.struct<({', '.join(map(str, results))})>")
    found = ir.Operation.create("llvm.inline_asm", [struct], list(operands), wanted).result
    at = [ir.DenseI64ArrayAttr.get([n]) for n in range(len(results))]
    return [op("llvm.extractvalue", kind, found, position=place) for kind, place in zip(results, at, strict=True)]


def program(code: str, out_type: Any, programs: int) -> Any:
    """A kernel that is PTX alone, as a function of one array: programs of 128 threads, $0 the array's address, $1 the result's."""

    def kernel(given: Any, out: Any) -> None:
        def run(_: Any, *refs: Any) -> None:
            ptx(code, "l,l,~{memory}", [], [mgpu.utils.memref_ptr(ref) for ref in refs], effects=True)

        both: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(run)
        both(given, out)

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        num_threads=1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True),
    )


def op(name: str, result: Any, *operands: Any, **attributes: Any) -> Any:
    """The result of one operation of MLIR."""
    return ir.Operation.create(name, [result], list(operands), attributes).result


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def element(register: Any, k: int) -> Any:
    """The k-th float32 of a register."""
    return op("vector.extract", ir.F32Type.get(), register, static_position=ir.DenseI64ArrayAttr.get([k]))


def kept(s: Any, words: Sequence[Any], same_rows: bool) -> Any:
    """The scores that a dense mask keeps, the others -inf: s (rows, keys) float32, words (rows, 4) of each piece (`dense.pack`).

    same_rows: all rows have the same words.

    A thread has the words of its own columns, so that each number is one bit at a place that is known. Six neighbours of a byte in
    a row become predicates by one instruction (R2P), if they are asked for one after another; the last two of each byte by one
    each, or, moved by 6, of which ptxas must not know, together. Where two rows share them, that is ahead: random keys, D64, 1183
    to 1150 us, D256 755 to 749, padding at D128 697 to 687; but with words of its own for each row 1212 to 1219 (H200, 2026-11-29).
    """

    def keep(_: Any, s: Any, *words: Any) -> Any:
        i1, f32 = ir.IntegerType.get_signless(1), ir.F32Type.get()
        hidden = op("arith.constant", f32, value=ir.FloatAttr.get_f32(-math.inf))
        unequal = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), 1)  # arith.cmpi's "ne"
        registers, pieces = np.empty(s.registers.shape, object), [_whole(word) for word in words]
        eights = s.registers.size // 2 // len(pieces)  # of a piece's columns, in each of which a row has a register
        moved = (
            [[ptx("shr.u32 $0, $1, 6;", "=r,r", [i32()], [word])[0] for word in piece] for piece in pieces] if same_rows else pieces
        )
        found, by = list(s.registers.flat), 6 if same_rows else 0
        for n in sorted(range(len(found)), key=lambda n: (n // 8, n // 2 % 4 == 3, n % 2)):
            (piece, j), row, register = divmod(n // 2, eights), n % 2, found[n]
            word, at = (moved[piece][row], 2 * j - by) if j % 4 == 3 else (pieces[piece][row], 2 * j)
            bits = [op("arith.andi", i32(), word, mgpu.utils.c(_signed(1 << at + e), i32())) for e in (0, 1)]
            tests = [op("arith.cmpi", i1, bit, mgpu.utils.c(0, i32()), predicate=unequal) for bit in bits]
            chosen = [op("arith.select", f32, test, element(register, e), hidden) for e, test in enumerate(tests)]
            registers.flat[n] = op("vector.from_elements", register.type, *chosen)
        return mgpu.FragmentedArray(_registers=registers, _layout=s.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(s.shape, s.dtype, layout=TILE)
    run: Any = plgpu.inline_mgpu(arg_types=(TILE, *[WORDS] * len(words)), return_type=result)(keep)
    return run(s, *words)


def clear(memory: Any, seen: tuple[Any, ...]) -> None:
    """Zeros for rows of a tile (64, dim) in shared memory, a bit for each in two words, whose bit is 0.

    TMA's swizzle moves 16 bytes about within a row of as many bytes as it is wide, so that many can be cleared without knowing of
    it, by threads that have 16 each. Through registers, as a tile, it takes 16 of a loader's 24 at a time, which then spill.
    """
    swizzle, columns = swizzle_of(memory.shape[1], memory.dtype)
    threads, pieces = swizzle // 16, memory.shape[1] // columns  # of a row, in each piece of its columns
    at_once, stores = 128 // threads, ""
    for first in range(0, 64, at_once):
        stores += f"shr.u64 bits, seen, row;\nand.b64 bits, bits, 1;\nsetp.eq.u64 hidden, bits, 0;\nadd.u32 row, row, {at_once};\n"
        for piece in range(pieces):
            offset = (first * pieces + 8 * piece) * swizzle  # of tiles of 8 rows, each `pieces` times
            stores += f"@hidden st.shared.v4.b32 [at + {offset}], {{zero, zero, zero, zero}};\n"
    code = f"""{{
.reg .pred hidden;
.reg .b32 thread, row, at, more, zero;
.reg .b64 seen, bits;
mov.b64 seen, {{$1, $2}};
mov.b32 zero, 0;
mov.u32 thread, %tid.x;
and.b32 thread, thread, 127;
shr.u32 row, thread, {threads.bit_length() - 1};
and.b32 at, thread, {threads - 1};
mad.lo.u32 at, at, 16, $0;
shr.u32 more, row, 3;
mad.lo.u32 at, more, {8 * pieces * swizzle}, at;
and.b32 more, row, 7;
mad.lo.u32 at, more, {swizzle}, at;
{stores}
}}"""

    def run(_: Any, memory: Any, low: Any, high: Any) -> None:
        at = op("llvm.ptrtoint", i32(), mgpu.utils.memref_ptr(memory))
        ptx(code, "r,r,r,~{memory}", [], [at, low.registers.item(), high.registers.item()], effects=True)

    kind = plgpu.RefType(transforms(memory.shape[1], memory.dtype))
    call: Any = plgpu.inline_mgpu(arg_types=(kind, ROW, ROW))(run)  # of a number the layout means nothing
    call(memory, *seen)


def store(memory: Any, tile: Any) -> None:
    """A tile (64, columns) of halves in WGMMA's layout into shared memory that begins at a multiple of 1024 bytes; columns a
    multiple of 64, so that TMA's swizzle is of 128 bytes.

    As `memory[...] = tile`, but Mosaic makes two places a thread that no step changes, and both wait in registers all through a
    loop that has none left.
    """
    _, columns = tile.shape
    pieces = columns // 64  # of 128 bytes a row, in each of which TMA's swizzle exchanges 16 bytes by the row's place among 8
    stores, operand = "", 1
    for piece in range(pieces):
        for pair in range(4):  # two times 8 columns of 16 rows a warp
            words = ", ".join(f"${operand + n}" for n in range(4))
            stores += f"xor.b32 place, at, {32 * pair};\n"
            stores += f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [place + {1024 * piece}], {{{words}}};\n"
            operand += 4
    code = f"""{{
.reg .b32 thread, at, place, row, odd;
mov.u32 thread, %tid.x;
shr.u32 place, thread, 3;
shr.u32 odd, thread, 4;
and.b32 row, odd, 6;
and.b32 odd, odd, 1;
and.b32 place, place, 1;
or.b32 row, row, place;
mad.lo.u32 at, row, {1024 * pieces}, $0;
and.b32 row, thread, 7;
mad.lo.u32 at, row, 128, at;
xor.b32 row, row, odd;
mad.lo.u32 at, row, 16, at;
{stores}
}}"""

    def run(_: Any, memory: Any, tile: Any) -> None:
        at = op("llvm.ptrtoint", i32(), mgpu.utils.memref_ptr(memory))
        words = [mgpu.utils.bitcast(register, i32()) for register in tile.registers.flat]
        ptx(code, ",".join("r" * (1 + len(words))) + ",~{memory}", [], [at, *words], effects=True)

    kind = plgpu.RefType(transforms(columns, tile.dtype))
    call: Any = plgpu.inline_mgpu(arg_types=(kind, TILE))(run)
    call(memory, tile)


def _whole(word: Any) -> list[Any]:
    """A thread's registers of an array of WORDS or a ROW, as numbers: each is a vector of one."""
    at = ir.DenseI64ArrayAttr.get([0])
    return [op("vector.extract", i32(), register, static_position=at) for register in word.registers.flat]


def _signed(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits


def rows(length: int) -> Any:
    """0 to length - 1 in ROW, int32. `plgpu.broadcasted_iota` in that layout does the same, but where nobody uses what it makes
    Mosaic's layout inference fails (jax 0.11.2), and whether a mask looks at rows is not known before it is asked."""

    def count(_: Any) -> Any:
        return mgpu.FragmentedArray.broadcasted_iota(i32(), (length,), 0, ROW.to_mgpu(), is_signed=True)

    run: Any = plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((length,), jnp.int32, layout=ROW))(count)
    return run()


def apart(tile: tuple[int, int], start: Any) -> Any:
    """start + row - (column & 6) over a tile (64, columns), int32, start a scalar.

    All that a thread has to know of where it is in a tile, as one number beside `start`: a row and 8 rows below it, less a column,
    are three to LLVM, made before a loop and held in registers all through it.
    """

    def count(_: Any, start: Any) -> Any:
        def part(by: int, bits: int) -> Any:
            shifted = op("arith.shrui", i32(), mgpu.utils.thread_idx(), mgpu.utils.c(by, i32()))
            return op("arith.andi", i32(), shifted, mgpu.utils.c(bits, i32()))

        row, column = op("arith.ori", i32(), part(1, 48), part(2, 7)), op("arith.shli", i32(), part(0, 3), mgpu.utils.c(1, i32()))
        first = op("arith.addi", i32(), op("arith.subi", i32(), row, column), _whole(start)[0])
        both = [first, op("arith.addi", i32(), first, mgpu.utils.c(8, i32()))]
        pair = ir.VectorType.get((2,), i32())
        found = mgpu.FragmentedArray.splat(mgpu.utils.c(0, i32()), tile, TILE.to_mgpu(), is_signed=True)
        registers = np.empty(found.registers.shape, object)
        for n in range(registers.size):  # a row and that 8 below it, in turns
            registers.flat[n] = op("vector.from_elements", pair, *[both[n % 2]] * 2)
        return mgpu.FragmentedArray(_registers=registers, _layout=found.layout, _is_signed=True)

    run: Any = plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct(tile, jnp.int32, layout=TILE))(count)
    return run(plgpu.layout_cast(jnp.full((tile[0],), start), ROW))


def columns(length: int, bits: int = -1) -> Any:
    """Those bits of 0 to length - 1, in COLUMN, int32: thread t of four has 8j + 2t and the next one.

    Registers whose columns share the bits are one value to LLVM; from Mosaic's own index, which comes by divisions, or from masks
    applied afterwards, it does not see that (dropout at D128: 22 mixes of a key's index where there are 8)."""

    def count(_: Any) -> Any:
        thread = op("arith.andi", i32(), mgpu.utils.thread_idx(), mgpu.utils.c(3, i32()))
        own, pair = op("arith.shli", i32(), thread, mgpu.utils.c(1, i32())), ir.VectorType.get((2,), i32())
        own = op("arith.andi", i32(), own, mgpu.utils.c(bits & 6, i32()))
        registers = np.empty((length // 8, 1, 1), object)
        for j in range(length // 8):
            both = [mgpu.utils.c((8 * j + e) & bits, i32()) for e in (0, 1)]
            both = [op("arith.ori", i32(), own, rest) for rest in both] if bits & 6 else both  # else no thread's own
            registers[j, 0, 0] = op("vector.from_elements", pair, *both)
        return mgpu.FragmentedArray(_registers=registers, _layout=COLUMN.to_mgpu(), _is_signed=True)

    run: Any = plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((length,), jnp.int32, layout=COLUMN))(count)
    return run()


def fence() -> None:
    """What this thread has read of shared memory comes before what TMA will write there, once that is told.

    `plgpu.commit_smem` without its barrier of the warpgroup (D256 with a bias, H200, 2026-11-27: 631 to 643 TFLOP/s). CUTLASS's
    sm90 epilogue gives its tiles back so.
    """

    def order(_: Any) -> None:
        ptx("fence.proxy.async.shared::cta;", "~{memory}", [], [], effects=True)

    run: Any = plgpu.inline_mgpu()(order)
    run()


def reciprocal(x: Any) -> Any:
    """1 / x of float32 in WGMMA's layout, to a unit in the last place, 0 beyond 2**126: the one instruction, which a division
    stands between four others (jax 0.11.2)."""

    def invert(_: Any, x: Any) -> Any:
        f32, registers = ir.F32Type.get(), np.empty(x.registers.shape, object)
        for index, register in np.ndenumerate(x.registers):
            found = [ptx("rcp.approx.ftz.f32 $0, $1;", "=f,f", [f32], [element(register, k)])[0] for k in (0, 1)]
            registers[index] = op("vector.from_elements", register.type, *found)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    run: Any = plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=TILE))(invert)
    return run(x)


def widened(pairs: Any) -> Any:
    """bfloat16 in WGMMA's layout as float32: a register's low half moved up, its high half with the low one cleared.

    One operation a number; what is made of `astype` takes halves out of registers first, 93 for 64 (jax 0.11.2).
    """

    def widen(_: Any, pairs: Any) -> Any:
        f32x2 = ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty(pairs.registers.shape, object)
        for index, register in np.ndenumerate(pairs.registers):
            both = mgpu.utils.bitcast(register, i32())
            low = op("arith.shli", i32(), both, mgpu.utils.c(16, i32()))
            high = op("arith.andi", i32(), both, mgpu.utils.c(-65536, i32()))
            numbers = [mgpu.utils.bitcast(half, ir.F32Type.get()) for half in (low, high)]
            registers[index] = op("vector.from_elements", f32x2, *numbers)
        return mgpu.FragmentedArray(_registers=registers, _layout=pairs.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(pairs.shape, jnp.float32, layout=TILE)
    run: Any = plgpu.inline_mgpu(arg_types=(TILE,), return_type=result)(widen)
    return run(pairs)
