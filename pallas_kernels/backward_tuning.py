"""Which configuration a backward call gets. Measured on an H200, 2026-11-25, jax 0.11.2 (NOTES.md, "Hopper backward")."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.contracts import BackwardConfig, WalkConfig
from pallas_kernels.visits import cdiv


def backward_config(
    *, head_dim: int, value_head_dim: int, masked: bool = False, drops: bool = False, bias_bytes: int = 0
) -> BackwardConfig:
    """The configuration for these head dims.

    masked: there is a mask; drops: dropout; bias_bytes: of an element of a bias as large as the scores, 0 without one.

    >>> backward_config(head_dim=256, value_head_dim=256).dkv is None
    True
    """
    wide = max(head_dim, value_head_dim)
    dkv: WalkConfig | None = None
    if wide <= 64:
        # beside the words of dropout and a mask 128 keys spill, and 128 queries serialise the products (C7512)
        dq = dv = WalkConfig() if masked and drops else WalkConfig(block_k=128)
        # causal, L 16384: 128 queries a tile 3870 us, 64 and float32 p 4417; without a mask 7354 and 7148
        dkv = dk = WalkConfig(block_k=128, half=True, masks_all=True) if masked and not drops else WalkConfig()
    elif wide <= 128:
        dq = WalkConfig(stages=3)  # L 16384: 4233 us, two stages 5506, two of 128 keys 6145
        dkv = dk = dv = WalkConfig(half=True)  # causal: 3104 us, every tile masked 3262, p in float32 3803
    elif wide <= 192:
        dq = dk = dv = WalkConfig(masks_all=True)
    else:
        # not measured: two warpgroups that spill 170 to 400 bytes, for one that spills 60 to 270 and has nobody to fill its gaps
        dq = WalkConfig(masks_all=True, brief=1, plain=True)
        dk = WalkConfig(masks_all=True, half=True, brief=1, ahead=0)
        dv = WalkConfig(masks_all=True)
    found = {"dq": dq, "dkv": dkv, "dk": dk, "dv": dv}
    dims = {"head_dim": head_dim, "value_head_dim": value_head_dim, "drops": drops, "bias_bytes": bias_bytes}
    return BackwardConfig(**{name: own and fitted(name, own, **dims) for name, own in found.items()})  # type: ignore[arg-type]


PROGRAMS = 3 * tuning.SMS
"""Fewer of them leave SMs idle under a causal mask, where the heaviest is twice the average one."""


def shared_out(config: BackwardConfig, *, heads: int, key_len: int, group: int) -> BackwardConfig:
    """The configuration whose dk and dv kernels have PROGRAMS programs, if the group's query heads can be divided for it.

    heads: B * H, of keys. Qwen2-7B's 4, at 4096 keys and causal: 128 programs, the heaviest of which takes twice as long as all of
    them would if they were even.

    >>> base = backward_config(head_dim=128, value_head_dim=128)
    >>> shared_out(base, heads=4, key_len=4096, group=7).dk.split, shared_out(base, heads=16, key_len=16384, group=1).dk.split
    (4, 1)
    """

    def own(one: WalkConfig | None) -> Any:
        return one and dataclasses.replace(one, split=min(group, cdiv(PROGRAMS, heads * cdiv(key_len, one.rows))))

    return dataclasses.replace(config, dkv=own(config.dkv), dk=own(config.dk), dv=own(config.dv))


LESS: tuple[dict[str, Any], ...] = (
    {"row_tiles": 1},
    {"bias_stages": 1},
    {"stages": 2},
    {"brief": 1},
    {"ahead": 0},
    {"block_k": 64},
    {"warpgroups": 1},
)
"""What a configuration gives up, in this order, until it fits the shared memory."""


def fitted(kernel: str, config: WalkConfig, **facts: Any) -> WalkConfig:
    """The configuration, with less where it needs more shared memory than there is."""
    return tuning.fitted(config, LESS, lambda config: shared_bytes(kernel, config, **facts))


def shared_bytes(
    kernel: str, config: WalkConfig, *, head_dim: int, value_head_dim: int, drops: bool = False, bias_bytes: int = 0
) -> int:
    """Of a program of 'dq', 'dkv', 'dk', 'dv' or 'fused': its rows, tiles of columns, and what comes with each query."""
    E, Ev = (cdiv(dim, 16) * 16 for dim in (head_dim, value_head_dim))
    ring = config.bias_stages * config.rows * config.block_k * bias_bytes
    if kernel == "dq":
        stored = config.rows * config.block_k * bias_bytes  # a tile of the bias's gradient on its way out
        tiles = config.block_k * (config.stages * E + config.brief_stages * Ev)
        results = config.rows * E if config.row_tiles > 1 else 0  # else they leave from the memory of their queries
        return 2 * (config.rows * (E + Ev) + tiles + results) + ring + stored
    q_stages = config.stages + (0 if kernel == "fused" else config.ahead)
    own = config.rows * (E + (Ev if kernel != "dv" or E != Ev else 0))
    tiles = config.block_k * (q_stages * E + (config.stages if kernel == "fused" else config.brief_stages) * Ev)
    numbers = 4 * q_stages * config.block_k * ((3 if bias_bytes else 2) + (2 if drops else 0))
    dq = 2 * 2 * config.rows * config.block_k + 4 * config.block_k * E if kernel == "fused" else 0
    return 2 * (own + tiles) + numbers + dq + ring
