"""A bool mask as large as the scores into the words of `dense.pack`, read once: for a row's own keys, or for a key's queries.

XLA takes several passes, 44 to 95 us for 67 million bools whose bytes are 16 us of memory (H200; NOTES.md, "A mask's words").

Across a row, four threads read 32 neighbours each, and have a byte of each of the four words then: a 4 x 4 matrix of bytes, which
three exchanges turn. Down the columns a thread reads four neighbours of every row, so that what it adds up has four keys side by
side, a byte each, and no thread needs another one's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dense
from pallas_kernels.hopper_ptx import program
from pallas_kernels.visits import cdiv

PIECE = dense.PIECE
ROWS = 64
"""Of a program of 128 threads that reads across: two for every four of them."""

KEYS = 512
"""Of a program that reads down: four for each thread."""


def packed(keep: jax.Array, rows: int, block_k: int, *, transposed: bool = False, interpret: Any = None) -> jax.Array:
    """`dense.pack` of keep (B|1, Hq|1, L|1, S|1), or of the same with queries and keys exchanged; by a kernel of ours where it can.

    rows, block_k: of the tiles, after the exchange.
    """
    of_rows, of_columns = keep.shape[:1:-1] if transposed else keep.shape[2:]
    fits = dense.kind(keep) == "tile" and of_columns % PIECE == of_columns % block_k == 0
    if interpret is not None or not fits or (transposed and of_rows % rows):
        return dense.pack(jnp.swapaxes(keep, 2, 3) if transposed else keep, rows, block_k)
    heads, pieces = keep.shape[0] * keep.shape[1], of_columns // PIECE
    if transposed:
        code, length, programs = down(of_columns, of_rows), of_rows, cdiv(of_rows, KEYS)
    else:
        length = cdiv(of_rows, rows) * rows
        code, programs = across(of_rows, of_columns, length), length // ROWS

    out_type = jax.ShapeDtypeStruct((*keep.shape[:2], pieces, length, 4), jnp.int32)
    return program(code, out_type, heads * programs * pieces)(keep)


def across(L: int, S: int, length: int) -> str:
    """PTX of a program of 64 rows and 128 keys: $0 the bools, $1 the words; `length` rows, those beyond L with nothing to keep."""
    return f"""{{
.reg .pred inside;
.reg .b32 v<8>, a, b, c, mine, x, y, z, pick, place, piece, row, last, head, w, n;
.reg .b64 order, from, to;
mov.u32 n, %ctaid.x;
rem.u32 piece, n, {S // PIECE};
div.u32 n, n, {S // PIECE};
rem.u32 row, n, {length // ROWS};
div.u32 head, n, {length // ROWS};
mov.u32 n, %tid.x;
and.b32 w, n, 3;
and.b32 a, n, 0x60;
shr.u32 a, a, 1;
shl.b32 row, row, 6;
add.u32 row, row, a;
and.b32 a, n, 0x1c;
shr.u32 a, a, 2;
add.u32 row, row, a;
mad.lo.u32 pick, w, 0x11, 0x40;
shl.b32 place, w, 4;
mov.b64 order, 0x0145105445015410;
shr.b64 order, order, place;
cvt.u32.u64 place, order;
{"add.u32 row, row, 8;".join([_row_across(L, S, length)] * 2)}
}}"""


def _row_across(L: int, S: int, length: int) -> str:
    """Word w of one row for thread w of its four.

    lop3 0xa8: (a | b) & c, two bools of each half side by side. prmt's selectors: byte w of either; then thread k's byte, which
    came by the exchange with w ^ k, to place k.
    """
    bits = "".join(
        f"shr.b32 c, v{2 * q}, 7;\nlop3.b32 a, v{2 * q}, c, 0x00030003, 0xa8;\n"
        f"shr.b32 c, v{2 * q + 1}, 7;\nlop3.b32 b, v{2 * q + 1}, c, 0x00030003, 0xa8;\n"
        f"prmt.b32 c, a, b, 0x6420;\nshl.b32 c, c, {2 * q};\nor.b32 mine, mine, c;\n"
        for q in range(4)
    )
    return f"""
min.u32 last, row, {L - 1};
mad.lo.u32 n, head, {L}, last;
mad.wide.u32 from, n, {S}, $0;
mul.wide.u32 to, piece, {PIECE};
add.u64 from, from, to;
mul.wide.u32 to, w, 32;
add.u64 from, from, to;
ld.global.nc.v4.b32 {{v0, v1, v2, v3}}, [from];
ld.global.nc.v4.b32 {{v4, v5, v6, v7}}, [from + 16];
mov.b32 mine, 0;
{bits}
shfl.sync.bfly.b32 x, mine, 1, 0x1f, 0xffffffff;
shfl.sync.bfly.b32 y, mine, 2, 0x1f, 0xffffffff;
shfl.sync.bfly.b32 z, mine, 3, 0x1f, 0xffffffff;
prmt.b32 a, mine, x, pick;
prmt.b32 b, y, z, pick;
prmt.b32 c, a, b, place;
setp.lt.u32 inside, row, {L};
selp.b32 c, c, 0, inside;
mad.lo.u32 n, head, {S // PIECE}, piece;
mad.lo.u32 n, n, {length}, row;
mad.wide.u32 to, n, 16, $1;
mul.wide.u32 from, w, 4;
add.u64 to, to, from;
st.global.b32 [to], c;
"""


def down(L: int, S: int) -> str:
    """PTX of a program of 512 keys and 128 queries: $0 the bools (queries, keys), $1 the words of each key.

    x: bools of four keys at one query. s<4 t + m>: byte m of word t, of the four keys. The last ones turn bytes m and keys.
    """
    sums = "".join(f"ld.global.nc.b32 x{q}, [from + {q * S}];\n" for q in range(PIECE)) + "".join(
        f"mad.lo.u32 s{4 * (q % 8 // 2) + q // 32}, x{q}, {1 << (2 * (q // 8 % 4) + q % 2)}, s{4 * (q % 8 // 2) + q // 32};\n"
        for q in range(PIECE)
    )
    words = ""
    for t in range(4):
        s = [f"s{4 * t + m}" for m in range(4)]
        words += f"prmt.b32 a0, {s[0]}, {s[1]}, 0x5140;\nprmt.b32 a1, {s[2]}, {s[3]}, 0x5140;\n"
        words += f"prmt.b32 a2, {s[0]}, {s[1]}, 0x7362;\nprmt.b32 a3, {s[2]}, {s[3]}, 0x7362;\n"
        words += "".join(
            f"prmt.b32 w{4 * key + t}, a{2 * (key // 2)}, a{2 * (key // 2) + 1}, {'0x5410' if key % 2 == 0 else '0x7632'};\n"
            for key in range(4)
        )
    stores = "".join(
        f"st.global.v4.b32 [to + {16 * key}], {{w{4 * key}, w{4 * key + 1}, w{4 * key + 2}, w{4 * key + 3}}};\n" for key in range(4)
    )
    return f"""{{
.reg .pred outside;
.reg .b32 n, key, piece, head, x<{PIECE}>, s<16>, w<16>, a<4>;
.reg .b64 from, to;
mov.u32 n, %ctaid.x;
rem.u32 key, n, {cdiv(S, KEYS)};
div.u32 n, n, {cdiv(S, KEYS)};
rem.u32 piece, n, {L // PIECE};
div.u32 head, n, {L // PIECE};
mov.u32 n, %tid.x;
mad.lo.u32 key, key, 128, n;
shl.b32 key, key, 2;
setp.ge.u32 outside, key, {S};
@outside bra DONE;
mad.lo.u32 n, head, {L}, 0;
mad.lo.u32 n, piece, {PIECE}, n;
mad.wide.u32 from, n, {S}, $0;
mul.wide.u32 to, key, 1;
add.u64 from, from, to;
{"".join(f"mov.b32 s{n}, 0;{chr(10)}" for n in range(16))}
{sums}
{words}
mad.lo.u32 n, head, {L // PIECE}, piece;
mad.lo.u32 n, n, {S}, key;
mad.wide.u32 to, n, 16, $1;
{stores}
DONE:
}}"""
