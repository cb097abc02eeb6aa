"""The launch: from the arrays of a call to the kernel that answers it, and back. What TMA cannot read is padded here, by XLA.

TMA wants strides in multiples of 16 bytes and lengths in eights, a wgmma 16 head dims at a time. So there is a copy of an operand
where L or S is no multiple of 8 or a head dim none of 16 (`padding` says which), and only there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dense, tuning, visits
from pallas_kernels.contracts import ForwardConfig, ForwardShape
from pallas_kernels.visits import cdiv


def up(size: int, to: int) -> int:
    return cdiv(size, to) * to


def padding(query_len: int, key_len: int, head_dim: int, value_head_dim: int, bias_bytes: int = 0) -> tuple[str, ...]:
    """Which operands of a call are copied to be padded, by name; bias_bytes: of an element of a bias as large as the scores."""
    names = []
    if query_len % 8 or head_dim % 16:
        names.append("query")
    if key_len % 8 or head_dim % 16:
        names.append("key")
    if key_len % 8 or value_head_dim % 16:
        names.append("value")
    if (query_len % 8 and bias_bytes) or key_len * bias_bytes % dense.SWIZZLE:
        names.append("bias")
    return tuple(names)


def longer(x: jax.Array, sizes: dict[int, int]) -> jax.Array:
    """x with zeros behind, up to the size given for an axis."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(more for _, more in widths) else x


def slope(mask: Any, L: int, S: int) -> tuple[bool, float]:
    """(whether rows see different keys, how many keys 128 of them see on average); a guess where the mask holds arrays."""
    if mask is None or mask.is_prefix:
        return False, S
    if jax.tree.leaves(mask):
        return True, S / 2
    ranges = [mask.kv_range(start, min(start + 128, L), L, S) for start in range(0, L, max(128, L // 16))]
    return len(set(ranges)) > 1, sum(hi - lo for lo, hi in ranges) / len(ranges)


def cut_once(mask: Any, L: int, S: int) -> bool:
    """Whether there is a mask that only the first tile of a walk needs, by the tiles of `tuning.forward_config` at head dim 128."""
    if mask is None:
        return False
    config = ForwardConfig()
    return mask.is_prefix or visits.cut_once(mask, config.rows, config.block_q, L, S, config.block_k, leads=False)


def facts_of(mask: Any, keep: Any) -> dict[str, bool]:
    """What tuning asks of a structured mask and a dense one."""
    return {
        "masked": mask is not None or keep is not None, "dense": keep is not None,
        "tiled": keep is not None and dense.kind(keep) == "tile",
    }  # fmt: skip


def chosen(*, query_len: int, key_len: int, mask: Any, keep: Any, **facts: Any) -> ForwardConfig:
    """`tuning`'s configuration of a call with these masks; facts: the others of `tuning.forward_config`."""
    sloped, seen = slope(mask, query_len, key_len)
    return tuning.forward_config(
        query_len=query_len, key_len=key_len, sloped=sloped, seen=seen,
        cut_once=keep is None and cut_once(mask, query_len, key_len), **facts_of(mask, keep), **facts,
    )  # fmt: skip


def hidden_by(mask: Any, keep: jax.Array, L: int, S: int) -> tuple[Any, jax.Array]:
    """(mask, keep) with the structured mask inside of the dense one where that makes it no larger: less is left to compute."""
    arrays = jax.tree.leaves(mask)
    if mask is None or dense.kind(keep) != "tile" or keep.shape[0] < max((array.shape[0] for array in arrays), default=1):
        return mask, keep
    q_idx, k_idx = jnp.arange(L, dtype=jnp.int32)[:, None], jnp.arange(S, dtype=jnp.int32)[None, :]
    return None, keep & mask.keep(q_idx, k_idx)


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, layout: str, scale: Any, softcap: float | None = None, mask: Any = None,
    bias: Any = None, keep: Any = None, sinks: Any = None, seeds: Any = None, dropout_p: float = 0.0, generator: Any = None,
    config: ForwardConfig | None = None, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out, lse) by the Hopper kernel: `softmax(scale * q @ k.T + bias, kept keys) @ v`, natural lse (B, Hq, L), float32.

    Args:
        query, key, value: (B, Hq, L, E), (B, H, S, E), (B, H, S, Ev) for layout 'BHLE', heads behind lengths for 'BLHE'; float16
            or bfloat16; no size is 0, E and Ev at most 256, H divides Hq.
        scale: a finite number, or a float32 array (1|B,). softcap: positive, or None.
        mask: a `contracts.Mask` with arrays (1|B, ...), or None. bias, float, and keep, bool: (B|1, Hq|1, L|1, S|1).
        sinks: (B|1, Hq). seeds: uint32 (B|1, Hq|1, 2), or 4 with the positions of the first query and key; with dropout_p > 0
            and the generator of the bits.
        config: how to cut the work; None: `tuning`'s. interpret: `plgpu.InterpretGPUParams`, to run without a GPU.

    Keys that a mask hides may hold anything, and so may the values that `mask` hides from every query; values that only `keep`
    hides must be numbers.
    """
    from pallas_kernels import hopper_forward, hopper_hidden  # jax 0.11.2 and newer only

    heads_axis = 1 if layout == "BHLE" else 2
    length_axis = 3 - heads_axis
    B, Hq, L, E = query.shape[0], query.shape[heads_axis], query.shape[length_axis], query.shape[3]
    H, S, Ev = key.shape[heads_axis], key.shape[length_axis], value.shape[3]
    static_scale = scale if isinstance(scale, float) else None
    drops = dropout_p > 0 and generator.rounded(dropout_p) < 1
    bias_bytes = dense.tile_bytes(bias)
    if config is None:
        config = chosen(
            heads=B * Hq, group=Hq // H, query_len=L, key_len=S, head_dim=E, value_head_dim=Ev, mask=mask, keep=keep, drops=drops,
            bias_bytes=bias_bytes, keyed=dense.is_keyed(bias), readers=dense.readers(bias, B, Hq),
        )  # fmt: skip
    given = mask
    if keep is not None:
        mask, keep = hidden_by(mask, keep, L, S)
    if bias_bytes:
        bias = dense.padded(bias)
    shape = ForwardShape(
        B, Hq, H, L, S, up(E, 16), up(Ev, 16), query.dtype, layout, static_scale, softcap, dropout_p if drops else 0.0,
        sinks is not None,
    )  # fmt: skip
    seen = hopper_hidden.seen_keys(given, mask, L, S)
    run = hopper_forward.forward(
        shape, config, mask, bias=bias, keep=keep, generator=generator, told=seen is not None, interpret=interpret
    )
    out, lse = run(
        longer(query, {length_axis: up(L, 8), 3: up(E, 16)}), longer(key, {length_axis: up(S, 8), 3: up(E, 16)}),
        longer(value, {length_axis: up(S, 8), 3: up(Ev, 16)}), mask_arrays=jax.tree.leaves(mask), bias=bias, keep=keep,
        sinks=sinks, seeds=seeds if drops else None, scale=None if static_scale is not None else scale, seen=seen,
    )  # fmt: skip
    out = jax.lax.slice(out, (0, 0, 0, 0), (*query.shape[:3], Ev))
    if dropout_p > 0 and not drops:  # p = 1: every weight is dropped; lse is that of the softmax before
        out = jnp.zeros_like(out)
    return out, lse
