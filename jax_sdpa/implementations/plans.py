"""How the blockwise backend cuts a request: heads per chunk, block sizes, and which of its two walks it takes. All measured.

    whole   a row block sees its whole key range at once, in one to three pieces (no rescaling); row blocks and their ranges are
            unrolled while tracing, so that static masks skip exactly what they exclude
    blocks  loops over row blocks and key blocks, online softmax; loop bounds may be traced

The constants are for 2 cores of a Zen 4, jax 0.10.2, 2026-11-22 (README, "Figures"): fewer, larger products win until a tile no
longer fits the cache, and YNNPACK needs several hundred rows, or many heads, to use both cores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_sdpa import compat
from jax_sdpa.implementations.chunks import FEW_ROWS
from jax_sdpa.request import SdpaRequest

SMALL_TILE = 2 * 128 * 128  # scores of a head up to which many heads go together
SMALL_HEADS = {"forward": 64, "backward": 32}
FEW_ROWS_KEYS = 2**19  # elements of K in a chunk with few rows: a decode step reads K and V once, from the cache if it can
IN_PLACE_KEYS = 2**20  # elements of K from which a decode step reads it in place: a program with both ways takes longer to compile
FEW_ROWS_BLOCK = 1024  # keys of a block, of a decode step that goes by blocks
AREA = {"forward": 2**20, "backward": 2**18}  # scores in a chunk's tile
WHOLE_KEYS = {"forward": 1024, "backward": 2048}  # key length up to which a row block takes its whole range at once
WHOLE_KEYS_BACKWARD_SKIPPING = 512  # the same, backward, where masks leave blocks out
UNROLLED = 8  # row blocks at most in the unrolled walk: compile time


@dataclasses.dataclass(frozen=True)
class Plan:
    """nb batch entries and nh key/value heads a chunk; block_q queries (times the group: rows), block_k keys."""

    nb: Any
    nh: Any
    block_q: Any
    block_k: Any
    whole: bool = False


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _heads(request: SdpaRequest, wanted: int) -> tuple[Any, Any]:
    """(nb, nh): about `wanted` heads, whole batch entries where it is more than one has."""
    B, H = request.batch, request.kv_heads
    if compat.is_symbolic(H):
        return 1, 1
    if wanted < H:
        return 1, _divisor(H, wanted)
    return (1 if compat.is_symbolic(B) else _divisor(B, wanted // H)), H


def _block(length: Any, wanted: int) -> Any:
    """A block length near `wanted`: the length itself, a divisor of it, else `wanted` (and the last block is padded)."""
    if compat.is_symbolic(length):
        return wanted
    if length <= wanted:
        return length
    divisor = _divisor(length, wanted)
    return divisor if 2 * divisor > wanted else wanted


def _rows(request: SdpaRequest, wanted: int) -> Any:
    """A block of queries near `wanted`; no longer than the longest of packed sequences, up to a power of two: decode steps stand
    side by side, and a block of several would visit all of their keys for each."""
    longest = request.spec.longest_query
    return _block(request.query_len, wanted if longest is None else min(wanted, 1 << max(0, longest - 1).bit_length()))


def is_static(request: SdpaRequest) -> bool:
    """Whether the structured masks' ranges are numbers while tracing."""
    return all(isinstance(bound, int) for bound in request.mask.kv_range(0, 1, request.query_len, request.key_len))


def cpu_plan(request: SdpaRequest, direction: str) -> Plan:
    """The plan of a 'forward' or 'backward' pass on a CPU."""
    L, S, R = request.query_len, request.key_len, request.group
    skips = bool(request.masks)  # something to skip: finer blocks
    blocks = _rows(request, max(64, (512 if skips else 1024) // R)), _block(S, 512)
    if any(map(compat.is_symbolic, (L, S, request.batch, R))):
        return Plan(*_heads(request, 1), *blocks)
    if not is_static(request):
        if blocks[0] * R > FEW_ROWS or direction != "forward":
            return Plan(*_heads(request, 1), *blocks)
        keys = _block(S, FEW_ROWS_BLOCK)
        return Plan(1, _divisor(request.kv_heads, 2 * FEW_ROWS_KEYS // (keys * max(1, request.head_dim))), blocks[0], keys)
    if L * R <= FEW_ROWS:
        if direction == "forward" and not skips and reads_in_place(request):
            return in_place(request)
        return Plan(*_heads(request, FEW_ROWS_KEYS // (S * max(1, request.head_dim))), L, S, whole=True)
    if L * R * S <= SMALL_TILE:
        return Plan(*_heads(request, SMALL_HEADS[direction]), L, S, whole=True)
    block_q, backward = max(64, 512 // R), direction == "backward"
    most = WHOLE_KEYS_BACKWARD_SKIPPING if skips and backward else WHOLE_KEYS[direction]
    if S <= most and -(-L // block_q) <= UNROLLED:
        area = AREA[direction] // 2 if skips and backward else AREA[direction]
        return Plan(*_heads(request, area // (block_q * R * S)), min(L, block_q), S, whole=True)
    return Plan(*_heads(request, 2 if skips and not backward else 1), *blocks)


def reads_in_place(request: SdpaRequest) -> bool:
    """Whether a CPU's product takes all keys and values of a decode step where they are, and what it makes of them is small: 17 ms,
    where blocks, which are copied first, take 35 (8 x 32/8 heads, 1 x 4096, 128, float32; 2 cores of a Zen 4)."""
    L, S, R, E = request.query_len, request.key_len, request.group, request.head_dim
    if any(map(compat.is_symbolic, (L, S, R, request.batch))) or L * R > FEW_ROWS or request.spec.layout != "BHLE":
        return False
    few_scores = 8 * L * R <= E + request.value_head_dim
    as_it_is = request.query.dtype in (jnp.float32, jnp.float64) and request.key_scale is None  # else all are widened first
    return as_it_is and few_scores and request.batch * request.kv_heads * S * E >= IN_PLACE_KEYS


def in_place(request: SdpaRequest) -> Plan:
    """All keys of all heads at once."""
    return Plan(request.batch, request.kv_heads, request.query_len, request.key_len, whole=True)


def wide_plan(request: SdpaRequest) -> Plan:
    """For an accelerator: every head at once, loops over blocks."""
    return Plan(request.batch, request.kv_heads, _rows(request, 512), _block(request.key_len, 512))
