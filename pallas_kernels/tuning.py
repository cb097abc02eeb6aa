"""Which configuration a forward call gets. Each rule has the figures that it follows from in NOTES.md, "Hopper forward"."""

from __future__ import annotations

import dataclasses

from pallas_kernels.contracts import ForwardConfig
from pallas_kernels.visits import cdiv

SMS = 132  # of an H100 SXM and an H200


def forward_config(
    *, heads: int, query_len: int, key_len: int, head_dim: int, value_head_dim: int, bias_bytes: int = 0
) -> ForwardConfig:
    """The configuration for `heads` = B * Hq heads of these lengths and head dims; bias_bytes: an element of a bias as large as the
    scores takes, 0 without one."""
    wide = max(head_dim, value_head_dim)
    if wide <= 64:
        config = ForwardConfig(warpgroups=3, registers=(160, 32))
    elif wide <= 128:
        config = ForwardConfig()
    else:
        config = ForwardConfig(block_k=64)
    if bias_bytes == 4:  # float32 tiles beside two of K and V each: no room for 128 keys
        config = dataclasses.replace(config, block_k=64, bias_stages=1 if wide > 128 else 2)
    items = heads * cdiv(query_len, config.rows)
    steps = cdiv(key_len, config.block_k)
    row_tiles = 1
    while row_tiles < 4 and row_tiles * steps < 32 and items >= 4 * SMS * row_tiles:
        row_tiles *= 2
    return dataclasses.replace(config, row_tiles=row_tiles)
