"""Which configuration a backward call gets. Chosen by what ptxas says of registers and spills (NOTES.md, "Hopper backward")."""

from __future__ import annotations

from pallas_kernels.contracts import BackwardConfig, WalkConfig


def backward_config(*, head_dim: int, value_head_dim: int) -> BackwardConfig:
    """The configuration for these head dims.

    >>> backward_config(head_dim=256, value_head_dim=256).dkv is None
    True
    """
    wide = max(head_dim, value_head_dim)
    if wide <= 64:
        return BackwardConfig(dq=WalkConfig(), dkv=WalkConfig(), dk=WalkConfig(), dv=WalkConfig())
    if wide <= 128:
        return BackwardConfig(dq=WalkConfig(), dkv=WalkConfig(half=True, masks_all=True), dk=WalkConfig(), dv=WalkConfig())
    all_ = WalkConfig(masks_all=True)
    if wide <= 192:
        return BackwardConfig(dq=all_, dkv=None, dk=all_, dv=all_)
    one = WalkConfig(warpgroups=1, masks_all=True, half=True)
    return BackwardConfig(dq=one, dkv=None, dk=one, dv=all_)
