"""The launch of a decode: queries folded into rows, key tiles shared out, pieces merged.

For calls with few queries and nothing but structured masks by numbers: what serving asks for. `takes` says which.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import visits
from pallas_kernels.contracts import SCALES_OF_PAGE, DecodeConfig, ForwardShape
from pallas_kernels.decode_tuning import decode_config, eight_bit_config
from pallas_kernels.flash_attention import longer, up
from pallas_kernels.shares import Shares

QUERIES = 16
"""More of them are chunked prefill, which the forward serves."""

ROWS = 128
"""Of a group's heads times their queries: two warpgroups'."""

KEYS = 256
"""Fewer of them are not worth a second launch."""


def takes(*, query_len: int, key_len: int, group: int, has_ids: bool, dense: bool, drops: bool, whole: bool = False) -> bool:
    """Whether a call is a decode: few queries, and keys that only numbers hide.

    group: query heads per key/value head; has_ids: a mask with an id for each position; dense: a bias or a dense mask. whole: of
    however many keys, which is what the batch's longest sequence has.

    >>> takes(query_len=1, key_len=4096, group=7, has_ids=False, dense=False, drops=False)
    True
    """
    few = query_len <= QUERIES and group * query_len <= ROWS
    return few and (whole or key_len >= KEYS) and not (has_ids or dense or drops)


def takes_pages(*, pages: int, page: int, head_dim: int, value_head_dim: int, eight_bits: bool = False) -> bool:
    """Whether a pool of so many pages is read where it lies: a tile is whole pages, or lies in one, and to pad the pool would cost
    more than to gather what is read of it.

    >>> takes_pages(pages=1000, page=16, head_dim=128, value_head_dim=128)
    True
    """
    return pages > 0 and page >= 8 and page & (page - 1) == 0 and whole_dims(head_dim, value_head_dim, eight_bits) == (
        head_dim, value_head_dim
    )  # fmt: skip


def takes_eight_bits(*, query_dtype: Any, rows: int, head_dim: int, value_head_dim: int) -> bool:
    """Whether keys and values of 8 bits are widened on their way: for queries of bfloat16, whose range the values' scales have, and
    rows (a group's heads times queries) and head dims for which both widths fit into shared memory.

    >>> takes_eight_bits(query_dtype=jnp.bfloat16, rows=7, head_dim=128, value_head_dim=128)
    True
    """
    E, Ev = whole_dims(head_dim, value_head_dim, True)
    return query_dtype == jnp.bfloat16 and eight_bit_config(rows=rows, head_dim=E, value_head_dim=Ev) is not None


def padding(key_len: int, head_dim: int, value_head_dim: int, *, eight_bits: bool = False) -> tuple[str, ...]:
    """Which of key and value are copied to be padded, by name; the few queries are copied into rows where they do not lie so."""
    given = head_dim, value_head_dim
    whole = zip(("key", "value"), given, whole_dims(*given, eight_bits), strict=True)
    return tuple(name for name, dim, wanted in whole if key_len % 8 or dim != wanted)


def whole_dims(head_dim: int, value_head_dim: int, eight_bits: bool) -> tuple[int, int]:
    """The head dims that kernels take: of half precision in sixteens, of 8 bits in thirty-twos, the first widths of a swizzle. Of
    values of 8 bits beyond 128 columns only whole 128s: TMA wants whole swizzles where there is more than one.

    >>> whole_dims(72, 72, False), whole_dims(72, 144, True)
    ((80, 80), (96, 256))
    """
    if not eight_bits:
        return up(head_dim, 16), up(value_head_dim, 16)
    return up(head_dim, 32), up(value_head_dim, 32 if value_head_dim <= 128 else 128)


def query_rows(rows: int) -> int:
    """Of a tensor that holds them, for TMA in tiles of 8 rows: a whole number of tiles, or less than one. One copy less for few.

    >>> query_rows(7), query_rows(9)
    (7, 16)
    """
    return rows if rows < 8 else up(rows, 8)


def decode(
    query: jax.Array, key: jax.Array, value: jax.Array, *, layout: str, scale: Any, softcap: float | None = None, mask: Any = None,
    sinks: Any = None, pages: Any = None, key_scale: Any = None, value_scale: Any = None, whole: bool = False,
    config: DecodeConfig | None = None, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out, lse) of few queries, as `flash_attention.forward`: `softmax(scale * q @ k.T, kept keys) @ v`, lse (B, Hq, L), float32.

    Args:
        query, key, value, layout, scale, softcap, mask, sinks: as `flash_attention.forward`'s; the mask by numbers only.
        pages: int32 (B, n): which pages of key and value, then (pages, page, H, E) and (pages, page, H, Ev) with layout 'BLHE',
            hold a sequence's keys, one after another; page a power of two of at least 8 (`takes_pages`). Pages that the mask hides
            may be any number.
        key_scale, value_scale: float (1|B, 1|H, 1|S) where key and value are int8 or float8_e4m3fn (`takes_eight_bits`), and stand
            for key * key_scale[..., None] and value * value_scale[..., None]; with pages (1|pages, 1|H, 1|page). Those of hidden
            keys may be anything, NaN included.
        whole: no sequence is cut (torch's num_splits=1): it has the same bits alone and in a batch.
        config: how to cut the work; None: `decode_tuning`'s. interpret: `plgpu.InterpretGPUParams`, to run without a GPU.
    """
    from pallas_kernels import hopper_decode, hopper_eight_bits, hopper_merge  # jax 0.11.2 and newer only

    heads_axis = 1 if layout == "BHLE" else 2
    length_axis = 3 - heads_axis
    B, Hq, L, E = query.shape[0], query.shape[heads_axis], query.shape[length_axis], query.shape[3]
    H, Ev, page = key.shape[heads_axis], value.shape[3], None
    S = key.shape[length_axis]
    if pages is not None:
        page = key.shape[1]
        S = pages.shape[1] * page
    group = Hq // H
    static_scale = scale if isinstance(scale, float) else None
    narrow = None if key_scale is None else key.dtype
    whole_key, whole_value = whole_dims(E, Ev, narrow is not None)
    shape = ForwardShape(
        B, Hq, H, L, S, whole_key, whole_value, query.dtype, layout, static_scale, softcap, 0.0, sinks is not None
    )  # fmt: skip
    if config is None:
        chosen = (decode_config if narrow is None else eight_bit_config)(
            rows=group * L, head_dim=shape.head_dim, value_head_dim=shape.value_head_dim
        )
        assert chosen is not None  # `takes_eight_bits`
        config = chosen
    steps = visits.ranges(mask, 0, L, L, S, config.block_k).steps
    shares = Shares(B, H, config.programs, steps if isinstance(steps, int) else None, whole)
    before = shares.before(jnp.atleast_1d(steps)) if shares.searches else None
    if layout == "BLHE":
        query = jnp.swapaxes(query, 1, 2)  # (B, Hq, L, E); with L = 1 nothing moves
    rows = jnp.reshape(query, (B, H, group * L, E))
    rows_to = {} if pages is not None else {length_axis: up(S, 8)}
    key, value = (longer(x, {**rows_to, 3: dim}) for x, dim in ((key, whole_key), (value, whole_value)))
    given: dict[str, Any] = {}
    if narrow is not None:
        gathered = page is not None and page < SCALES_OF_PAGE
        given = {
            name: _scales(x, S, key, pages, gathered=gathered)
            for name, x in (("key_scale", key_scale), ("value_scale", value_scale))
        }
    if narrow is None:
        run, padded = hopper_decode.forward(shape, config, shares, mask, page=page, interpret=interpret), query_rows(group * L)
    else:
        run = hopper_eight_bits.forward(shape, config, shares, mask, narrow=narrow, page=page, interpret=interpret)
        padded = up(group * L, 8)
    parts, lses = run(
        longer(rows, {2: padded, 3: whole_key}), key, value, before=before, mask_arrays=jax.tree.leaves(mask),
        scale=None if static_scale is not None else scale, pages=pages, **given,
    )  # fmt: skip
    out, lse = hopper_merge.merge(shape, shares, in_pairs=narrow is not None, interpret=interpret)(parts, lses, before, sinks)
    return out[..., :Ev], lse


def copies_scales(key_scale: Any, value_scale: Any, key_len: int, pages: Any) -> bool:
    """Whether the scales of keys or values are not read where they lie: numbers that keys share are made many, others are made
    float32, or padded to a multiple of 8 keys. Of shapes alone."""

    def copied(scale: Any) -> bool:
        shared = scale.shape[2] == 1 or (pages is not None and scale.shape[0] == 1)
        return shared or scale.dtype != jnp.float32 or (pages is None and key_len % 8 != 0)

    return copied(key_scale) or copied(value_scale)


def _scales(scale: Any, key_len: int, key: jax.Array, pages: Any, *, gathered: bool) -> jax.Array:
    """As `hopper_decode.forward` wants them: numbers that all keys share are made many, those of small pages gathered."""
    scale = scale.astype(jnp.float32)
    if pages is None:
        return longer(jnp.broadcast_to(scale, (*scale.shape[:2], key_len)), {2: up(key_len, 8)})
    scale = jnp.broadcast_to(scale, (key.shape[0], scale.shape[1], key.shape[1]))  # (pages, 1|H, page)
    if not gathered:
        return scale
    found = jnp.swapaxes(jnp.take(scale, pages, axis=0, mode="clip"), 1, 2)  # (B, 1|H, n, page)
    return jnp.reshape(found, (*found.shape[:2], key_len))
