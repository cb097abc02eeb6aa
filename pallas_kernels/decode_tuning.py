"""Which configuration a decode gets. Not measured yet: reckoned from the forward's figures (NOTES.md, "Hopper decode")."""

from __future__ import annotations

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
    queries = 2 if max(head_dim, value_head_dim) <= 128 else 1
    left = SHARED_MEMORY - 64 * warpgroups * (2 * queries * head_dim + 4 * min(64, value_head_dim))
    stages = max(2, min(8, left // (2 * 64 * (head_dim + value_head_dim))))
    registers = (240, 80) if warpgroups == 1 else (216, 72)  # few rows, so the loader need not spill what it clears
    return DecodeConfig(
        block_k=64, stages=stages, warpgroups=warpgroups, registers=registers, row_tiles=2, queries=queries, programs=SMS
    )  # fmt: skip
