"""Which configuration a forward call gets. Measured on an H200, 2026-11-24, jax 0.11.2 (NOTES.md, "Hopper forward")."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.contracts import ForwardConfig
from pallas_kernels.visits import cdiv

SMS = 132  # of an H100 SXM and an H200

THREE = ForwardConfig(warpgroups=3, registers=(160, 32))
"""D64: its accumulators leave room for a third warpgroup, which is more than what either overlap gives (551 to 459 TFLOP/s)."""


def forward_config(
    *, heads: int, query_len: int, key_len: int, head_dim: int, value_head_dim: int, masked: bool = False, sloped: bool = False,
    drops: bool = False, bias_bytes: int = 0,
) -> ForwardConfig:  # fmt: skip
    """The configuration for `heads` = B * Hq heads of these lengths and head dims.

    masked: there is a mask; sloped: a causal one or a window, which cuts other keys off for each row; drops: dropout; bias_bytes:
    of an element of a bias as large as the scores, 0 without one.

    >>> forward_config(heads=512, query_len=512, key_len=512, head_dim=128, value_head_dim=128).row_tiles
    16
    """
    wide = max(head_dim, value_head_dim)
    if wide <= 64:
        config = _narrow(query_len, masked, sloped, drops)
    elif wide <= 128:
        config = ForwardConfig()
    else:
        config = ForwardConfig(block_k=64)
    row_tiles = _row_tiles(config, heads, query_len, key_len, sloped)
    config = dataclasses.replace(config, row_tiles=row_tiles, queries=2 if row_tiles > 1 else 1)
    for less in LESS:
        if shared_bytes(config, head_dim, value_head_dim, bias_bytes) <= SHARED_MEMORY:
            break
        config = dataclasses.replace(config, **less)
    return config


SHARED_MEMORY = 232448 - 2048
"""Bytes of a program: 227 KB (CUDA C++ programming guide, compute capability 9.0) less barriers, lse and alignment."""

LESS: tuple[dict[str, Any], ...] = (
    {"queries": 1},
    {"row_tiles": 1},
    {"bias_stages": 1},
    {"block_k": 64},
    {"warpgroups": 1, "registers": (240, 24)},
)
"""What a configuration gives up, in this order, until it fits the shared memory: 128 keys with one tile of a float32 bias in flight
are faster than 64 keys with two (402 to 372 TFLOP/s)."""


def shared_bytes(config: ForwardConfig, head_dim: int, value_head_dim: int, bias_bytes: int) -> int:
    """Of a program's queries, keys, values, results and bias tiles; head dims as the kernel pads them."""
    E, Ev = (cdiv(dim, 16) * 16 for dim in (head_dim, value_head_dim))
    queries = config.rows * E * config.queries
    results = config.rows * config.out_columns(E, Ev) if config.own_out(E, Ev) else 0
    keys = config.stages * config.block_k * (E + Ev)
    return 2 * (queries + results + keys) + config.bias_stages * config.rows * config.block_k * bias_bytes


def _narrow(query_len: int, masked: bool, sloped: bool, drops: bool) -> ForwardConfig:
    """D64. Three warpgroups have 160 registers a thread: dropout's words and a mask together spill there; and 192 rows waste more
    of a short causal triangle (L 2048: 332 to 368 TFLOP/s) and of a length that is far from a multiple of them."""
    if (masked and drops) or (sloped and query_len <= 4096):
        return ForwardConfig(pinned=not drops and query_len > 1024)
    if cdiv(query_len, THREE.rows) * THREE.rows > 1.25 * query_len:
        return ForwardConfig()
    return dataclasses.replace(THREE, pinned=not sloped and not drops)


def _row_tiles(config: ForwardConfig, heads: int, query_len: int, key_len: int, sloped: bool) -> int:
    """Several to a program where each has few steps: what lies between two row tiles is then hidden.

    16 of 4 steps: 564 to 470 TFLOP/s (D128, L 512); 8 of 8.5 steps: 548 to 501 (causal, L 2048); 8 of 16 steps: nothing. As many as
    leave no SM idle: 3072 row tiles by 16 are 192 programs, which is 2 rounds where 1.45 would do (D64, L 512: 285 to 381 by 8).
    """
    steps = cdiv(key_len, config.block_k) * (0.5 if sloped else 1)
    wanted = 16 if steps <= 6 else 8 if steps <= 12 else 1
    total = heads * cdiv(query_len, config.rows)

    def busy(row_tiles: int) -> float:
        """The share of the SMs' time in which they have a program."""
        return total / (SMS * row_tiles * cdiv(cdiv(total, row_tiles), SMS))

    return next((n for n in range(wanted, 0, -1) if busy(n) >= 0.93), 1)
