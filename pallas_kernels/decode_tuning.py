"""Which configuration a decode gets. Measured on an H100, 2026-11-25 (NOTES.md, "Hopper decode")."""

from __future__ import annotations

import dataclasses

from pallas_kernels.contracts import DecodeConfig
from pallas_kernels.tuning import SHARED_MEMORY, SMS
from pallas_kernels.visits import cdiv


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
    """The configuration where keys and values come in 8 bits; None where shared memory does not hold both rings, or where the four
    warpgroups of two for the rows have too few registers to start with for a product with so many columns.

    Two tiles in half precision, one of which is read while the other is made, and four in 8 bits, of which two are on their way:
    32 KB. Not measured.

    >>> eight_bit_config(rows=7, head_dim=128, value_head_dim=128).narrow_stages
    4
    >>> eight_bit_config(rows=128, head_dim=256, value_head_dim=256) is None
    True
    """
    warpgroups, wide = cdiv(rows, 64), max(head_dim, value_head_dim) > 128
    if wide and warpgroups == 2:
        return None
    registers, converters, own = ((184, 32), 1, 112) if warpgroups == 2 else ((248, 40), 1, 160) if wide else ((224, 32), 2, 128)
    config = DecodeConfig(
        block_k=64, stages=2, warpgroups=warpgroups, registers=registers, row_tiles=2, queries=1 if wide else 2, programs=SMS,
        narrow_stages=1, converters=converters, converter_registers=own,
    )  # fmt: skip
    left = SHARED_MEMORY - shared_bytes(config, head_dim, value_head_dim)
    if left < 0:
        return None
    more = left // (config.block_k * (head_dim + value_head_dim + 2 * 4))
    return dataclasses.replace(config, narrow_stages=min(4, 1 + more))


def shared_bytes(config: DecodeConfig, head_dim: int, value_head_dim: int) -> int:
    """Of a program's queries, keys and values, half precision, and of its results, float32, so many columns of them as leave at a
    time; of keys and values in 8 bits and their scales, where they come so."""
    queries = config.rows * config.queries * head_dim
    keys = config.stages * config.block_k * (head_dim + value_head_dim)
    narrow = 0
    if config.narrow_stages:
        narrow = config.block_k * (config.narrow_stages * (head_dim + value_head_dim) + 2 * 4 * config.scale_stages)
    return narrow + 2 * (queries + keys) + 4 * config.rows * config.out_columns(head_dim, value_head_dim)
