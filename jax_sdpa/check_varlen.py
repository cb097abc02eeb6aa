"""From `varlen_attn`'s arguments to an `SdpaRequest`, and from its results back to packed tokens; every error of that call is here.

Packed keys stay as they are, one row of a batch of 1, under a `Packed` mask. With pages, which stay where they are too, the queries
become rows of a batch of N: what a decode step is, under `KeyLengths`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_sdpa import check, compat
from jax_sdpa.context import allowed_now
from jax_sdpa.masks import Band, KeyLengths, Mask, Packed, QueryLengths
from jax_sdpa.request import SdpaRequest, taken

Restore = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

COMPARED = 2**22
"""Up to so many pairs of a token and a boundary are all compared, in one small kernel: a binary search is a loop of XLA's."""


class AuxRequest(NamedTuple):
    """What `varlen_attn` returns beside its output: `lse`, the log-sum-exp of each row's scores.

    Source: torch.nn.attention.varlen.AuxRequest, torch 2.13.
    """

    lse: bool = False


def _size(value: Any, name: str, least: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"argument '{name}' must be a (static) int, not {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return int(value)


def _integers(value: Any, name: str, shape: tuple[Any, ...], legend: str) -> jax.Array:
    """An integer array of this shape (None: any size); legend: the shape in words."""
    array = check.as_array(value, name)
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not jnp.issubdtype(array.dtype, jnp.integer) or not fits:
        raise (TypeError if fits else ValueError)(
            f"{name} must be an integer array {legend}, got {array.dtype}{list(array.shape)}."
        )
    return array.astype(jnp.int32)


def _window(window_size: Any) -> tuple[int, int]:
    if window_size is None:
        return -1, -1
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(f"argument 'window_size' must be (left, right), not {type(window_size).__name__}.")
    if len(window_size) != 2:
        raise ValueError(f"window_size must have length 2, got {len(window_size)}")
    band = Band(*window_size)  # checks them
    return band.left, band.right


def _check_heads(Hq: int, Hk: int, Hv: int, enable_gqa: bool) -> None:
    if Hk != Hv:
        raise ValueError(f"Expect key and value to have the same number of heads but got {Hk} and {Hv}.")
    if not enable_gqa and Hq != Hk:
        raise ValueError(
            f"Expect query and key/value to have the same number of heads but got Hq={Hq} and Hkv={Hk}. "
            "Try setting enable_gqa=True for GQA."
        )
    if enable_gqa and (Hk == 0 or Hq % Hk):
        raise ValueError(f"Expect number of query heads to be a multiple of kv heads for GQA but got Hq={Hq} and Hkv={Hk}.")


def varlen_request(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: Any,
    max_k: Any,
    *,
    return_aux: Any = None,
    scale: Any = None,
    window_size: Any = (-1, -1),
    enable_gqa: Any = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
) -> tuple[SdpaRequest, Restore]:
    """The request, and what makes (T_q, Hq, Ev) and (Hq, T_q) of its out and lse."""
    q, k, v = check.operands(query, key, value, 3, key_scale, value_scale)
    paged = block_table is not None
    kv_rank, kv_legend = (4, "(pages, page, H, D)") if paged else (3, "(T_k, H, D)")
    if q.ndim != 3 or k.ndim != kv_rank or v.ndim != kv_rank:
        raise ValueError(
            f"query must be packed, (T_q, Hq, D), and key and value {kv_legend}{' with a block_table' if paged else ''}, got "
            f"{q.shape}, {k.shape} and {v.shape}."
        )
    if k.shape[:-2] != v.shape[:-2]:
        raise ValueError(f"key and value must have the same tokens, got {k.shape[:-2]} and {v.shape[:-2]}.")
    _check_heads(q.shape[-2], k.shape[-2], v.shape[-2], check.flag(enable_gqa, "enable_gqa"))
    left, right = _window(window_size)
    max_q, _ = _size(max_q, "max_q", 0), _size(max_k, "max_k", 0)
    invariant = num_splits is not None and _size(num_splits, "num_splits", 1) == 1
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(f"argument 'return_aux' must be an AuxRequest or None, not {type(return_aux).__name__}.")

    cu_q = _integers(cu_seq_q, "cu_seq_q", (None,), "of shape (N + 1,)")
    N = cu_q.shape[0] - 1
    if N < 0:
        raise ValueError("cu_seq_q must be an integer array of shape (N + 1,), got an empty one.")
    used = None if seqused_k is None else _integers(seqused_k, "seqused_k", (N,), f"of shape (N,) = ({N},)")
    common: dict[str, Any] = {
        "layout": "BLHE", "enable_gqa": True, "mask_name": "mask", "allowed": allowed_now(), "scale": scale,
        "returns_lse": return_aux is not None and return_aux.lse,
    }  # fmt: skip
    if not paged:
        if cu_seq_k is None:
            raise ValueError("cu_seq_k may be None only where a block_table says which keys are whose; pass the keys' boundaries.")
        cu_k = _integers(cu_seq_k, "cu_seq_k", (N + 1,), f"of shape (N + 1,) = ({N + 1},)")
        mask: Mask = Packed(cu_q, cu_k, left, right, used_k=used)
        request = check.make_request(
            q[None], k[None], v[None], mask=mask, key_scale=key_scale, value_scale=value_scale, **common
        )  # fmt: skip
        return request.with_spec(longest_query=max_q, batch_invariant=invariant), lambda out, lse: (out[0], lse[0])

    if used is None:
        raise ValueError("block_table needs seqused_k: how many keys of each sequence its pages hold.")
    if cu_seq_k is not None:
        _integers(cu_seq_k, "cu_seq_k", (N + 1,), f"of shape (N + 1,) = ({N + 1},)")
    table = _integers(block_table, "block_table", (N, None), f"of shape (N, max_pages) = ({N}, max_pages)")
    cache = table.shape[1] * k.shape[1]
    mask = _mask_of_pages(cu_q[1:] - cu_q[:-1], used, cache, left, right, max_q)
    rows = taken(q, cu_q[:-1, None] + jnp.arange(max_q, dtype=jnp.int32)[None])
    own: Any = (jax.ShapeDtypeStruct((N, cache, *pool.shape[2:]), pool.dtype) for pool in (k, v))  # what the pages stand for
    pools: dict[str, Any] = {"key": k, "value": v, "pages": table}
    if key_scale is not None:
        for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
            pools[name] = check.scales_of_keys(scale, name, k.shape[:1], k.shape[2], k.shape[2], k.shape[1])
    request = dataclasses.replace(check.make_request(rows, *own, mask=mask, **common), **pools)
    return request.with_spec(batch_invariant=invariant), lambda out, lse: _packed_again(out, lse, cu_q, q.shape[0])


def _mask_of_pages(queries: jax.Array, keys: jax.Array, cache: Any, left: int, right: int, max_q: int) -> Mask:
    """What sequences with so many queries and keys, (N,) each, see of their pages, `cache` keys. A single query stands at the last
    key: its window is a start. (Rows behind `queries` are nobody's: hidden where that saves work.)"""
    if max_q == 1 and left < 0:
        return KeyLengths(keys)  # as they are: there are no more keys than pages, whatever they say
    keys = jnp.clip(keys, 0, cache)
    if max_q == 1:
        return KeyLengths(keys, jnp.maximum(keys - 1 - left, 0))
    mask = KeyLengths(keys) & QueryLengths(queries)
    return mask if left < 0 and right < 0 else mask & Band(left, right, keys - queries)


def _packed_again(out: jax.Array, lse: jax.Array, cu_q: jax.Array, tokens: Any) -> tuple[jax.Array, jax.Array]:
    """Rows of a batch -> packed tokens; 0 and -inf outside of all sequences, NaN in one of more than max_q queries."""
    N, longest, Hq, Ev = out.shape
    t = jnp.arange(tokens, dtype=jnp.int32)
    few = not compat.is_symbolic(tokens) and not compat.is_symbolic(N) and tokens * N <= COMPARED
    n = jnp.searchsorted(cu_q, t, side="right", method="compare_all" if few else "scan_unrolled").astype(jnp.int32) - 1
    inside, n = (n >= 0) & (n < N), jnp.clip(n, 0, max(N - 1, 0))
    i = t - cu_q[n]
    at = n * longest + jnp.minimum(i, longest - 1)
    no_out, no_lse = (jnp.where(inside, jnp.nan, fill) for fill in (0.0, -jnp.inf))  # where no row is the token's
    here = inside & (cu_q[n + 1] - cu_q[n] <= longest)
    flat, flat_lse = out.reshape(N * longest, Hq, Ev), jnp.moveaxis(lse, 1, 0).reshape(Hq, N * longest)
    found = jnp.where(here[:, None, None], taken(flat, at), no_out[:, None, None].astype(out.dtype))
    return found, jnp.where(here[None], jnp.swapaxes(taken(flat_lse.T, at), 0, 1), no_lse[None].astype(lse.dtype))
