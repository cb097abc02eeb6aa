"""Which configuration a decode gets. Not measured yet: reckoned from the forward's figures (NOTES.md, "Hopper decode")."""

from __future__ import annotations

import dataclasses

from pallas_kernels.contracts import DecodeConfig
from pallas_kernels.tuning import SHARED_MEMORY, SMS
from pallas_kernels.visits import cdiv


def decode_config(*, rows: int, head_dim: int, value_head_dim: int) -> DecodeConfig:
    """The configuration for a group's rows (heads times queries) and head dims, multiples of 16.

    Memory gives an SM some 33 GB/s of 4.3 TB/s, at about a microsecond of latency: 32 KB have to be on their way at any time. All
    memory beside the queries and results is the ring's; tiles are small, so that the first one is soon there.

    >>> decode_config(rows=7, head_dim=128, value_head_dim=128).stages
    5
    """
    warpgroups = cdiv(rows, 64)
    registers = (248, 80) if warpgroups == 1 else (216, 72)  # few rows, so the loader need not spill what it clears
    config = DecodeConfig(
        block_k=64, stages=2, warpgroups=warpgroups, registers=registers, row_tiles=2,
        queries=2 if max(head_dim, value_head_dim) <= 128 else 1, programs=SMS,
    )  # fmt: skip
    left = SHARED_MEMORY - shared_bytes(config, head_dim, value_head_dim)
    stages = config.stages + left // (2 * config.block_k * (head_dim + value_head_dim))
    return dataclasses.replace(config, stages=min(8, stages))


def shared_bytes(config: DecodeConfig, head_dim: int, value_head_dim: int) -> int:
    """Of a program's queries, keys and values, half precision, and of its results, float32, so many columns of them as leave at a
    time."""
    queries = config.rows * config.queries * head_dim
    keys = config.stages * config.block_k * (head_dim + value_head_dim)
    return 2 * (queries + keys) + 4 * config.rows * config.out_columns(head_dim, value_head_dim)
