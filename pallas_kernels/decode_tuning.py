"""Which configuration a decode gets. Measured on an H100, 2026-11-25 (NOTES.md, "Hopper decode")."""

from __future__ import annotations

import dataclasses

from pallas_kernels.contracts import DecodeConfig
from pallas_kernels.tuning import SHARED_MEMORY, SMS
from pallas_kernels.visits import cdiv

ROWS_OF_EIGHT_BITS = 64
"""Of a group's heads times queries, where keys come in 8 bits: what the registers of one warpgroup hold."""


def decode_config(*, rows: int, head_dim: int, value_head_dim: int) -> DecodeConfig:
    """The configuration for a group's rows (heads times queries) and head dims, multiples of 16.

    Memory gives an SM some 33 GB/s of 4.3 TB/s, at about a microsecond of latency: 32 KB have to be on their way at any time. Tiles
    are small, so that the first one is soon there. Three of them in flight are never worse than five (D128, us: B1 S32768 30.5 to
    30.9, B64 S4096 187.0 to 187.9, with lengths 8:1 123.9 to 127.0); beyond 128 head dims, as many as memory holds: not measured.

    >>> decode_config(rows=7, head_dim=128, value_head_dim=128).stages
    3
    """
    warpgroups, wide = cdiv(rows, 64), max(head_dim, value_head_dim) > 128
    registers = (248, 80) if warpgroups == 1 else (216, 72)  # few rows, so the loader need not spill what it clears
    config = DecodeConfig(
        block_k=64, stages=2 if wide else 3, warpgroups=warpgroups, registers=registers, row_tiles=2, queries=1 if wide else 2,
        programs=SMS,
    )  # fmt: skip
    if not wide:
        return config
    left = SHARED_MEMORY - shared_bytes(config, head_dim, value_head_dim)
    more = left // (2 * config.block_k * (head_dim + value_head_dim))
    return dataclasses.replace(config, stages=min(8, config.stages + more))


def eight_bit_config(*, rows: int, head_dim: int, value_head_dim: int) -> DecodeConfig | None:
    """The configuration where keys and values come in 8 bits; None where the registers do not hold what so many rows need.

    Two programs an SM, whose waits fill one another's. B64 S4096, int8, H100, us: one with 10 stages 105.4; two with 3, 4, 5 and 6
    stages 103.3, 103.8, 105.0 and 106.8; three do not fit the registers.

    >>> eight_bit_config(rows=7, head_dim=128, value_head_dim=128).stages
    4
    >>> eight_bit_config(rows=65, head_dim=128, value_head_dim=128) is None
    True
    """
    if rows > ROWS_OF_EIGHT_BITS:
        return None
    config = DecodeConfig(block_k=64, stages=2, warpgroups=1, programs=2 * SMS)
    stages = next(
        n for n in (4, 3, 2) if n == 2 or 2 * (eight_bit_bytes(n, rows, head_dim, value_head_dim) + 1024) <= SHARED_MEMORY
    )
    return dataclasses.replace(config, stages=stages)


def eight_bit_bytes(stages: int, rows: int, head_dim: int, value_head_dim: int) -> int:
    """Of shared memory: keys and values in 8 bits and their scales, queries, p, results and what warps exchange."""
    columns, values = cdiv(rows, 8) * 8, cdiv(value_head_dim, 128) * 128
    return stages * 64 * (head_dim + values + 2 * 4) + columns * (2 * 2 * head_dim + 2 * 64 + 4 * values + 4 + 128)


def shared_bytes(config: DecodeConfig, head_dim: int, value_head_dim: int) -> int:
    """Of a program's queries, keys and values, half precision, and of its results, float32, so many columns of them as leave at a
    time."""
    queries = config.rows * config.queries * head_dim
    keys = config.stages * config.block_k * (head_dim + value_head_dim)
    return 2 * (queries + keys) + 4 * config.rows * config.out_columns(head_dim, value_head_dim)
