"""The mirror of `torch.nn.attention.varlen`: attention of sequences of different lengths, packed one behind the other."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jax_sdpa import functional
from jax_sdpa.check_varlen import AuxRequest, varlen_request

__all__ = ["AuxRequest", "varlen_attn"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inference_only(name: str, operand: Any) -> Any:
    """The operand; a derivative by it is an error."""
    return operand


@_inference_only.defjvp
def _no_derivative(name: str, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"{name} is an inference-only parameter: varlen_attn has no derivative with it (nor has torch's). Without it, pass "
        "cu_seq_k of the keys that take part."
    )


def varlen_attn(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
    key_scale: Any = None,
    value_scale: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of N packed sequences, each to its own keys alone; no padding anywhere, and sequences skip one another's blocks.

    ::

        for n in range(N):
            q = query[cu_seq_q[n] : cu_seq_q[n + 1]]                          # (L, Hq, D)
            k, v = (x[cu_seq_k[n] : cu_seq_k[n + 1]][: seqused_k[n]] for x in (key, value))          # (S, H, D)
            i, j = arange(L)[:, None] + S - L, arange(S)[None, :]             # the last query stands at the last key
            keep = (j >= i - left) & (j <= i + right)                         # -1: unlimited
            out[cu_seq_q[n] : cu_seq_q[n + 1]] = softmax(where(keep, scale * q @ k.T, -inf)) @ v     # a head at a time

    T_q, T_k = tokens of queries and of keys, Hq, H = query heads and key/value heads, D = head dim.

    Args:
        query: (T_q, Hq, D), float16, bfloat16, float32 or float64.
        key: (T_k, H, D), of the query's dtype; with `block_table` a pool of pages (pages, page, H, D).
        value: as key; its head dim may be another.
        cu_seq_q: integer (N + 1,), ascending: where each sequence's queries begin, and the end of the last one. Tokens behind it
            belong to nobody and give 0 and lse -inf.
        cu_seq_k: the same for the keys. None only with `block_table`, which does not need it.
        max_q, max_k: static ints: no sequence has more queries, or keys. Without `block_table` they are hints of how to cut the
            work; with it, a sequence of more than max_q queries gives NaN.
        return_aux: `AuxRequest(lse=True)` returns lse as well.
        scale: a number, or a scalar array; default 1 / sqrt(D).
        window_size: (left, right), static inclusive distances; (-1, -1) everything, (-1, 0) causal, (W, 0) causal with a window.
        enable_gqa: query head h attends with key/value head h // (Hq / H).
        seqused_k: integer (N,): only the first so many keys of each sequence exist. Inference only.
        block_table: integer (N, max_pages), with `seqused_k`: key j of sequence n is row j % page of page
            block_table[n, j // page]. Entries behind the pages that are used may be anything. Inference only.
        num_splits: None, or an int >= 1: how often a sequence's keys may be split. 1 asks for the same bits for a sequence alone
            and in any batch: FLASH keeps that with a `block_table` and max_q of at most 16, max_q * Hq / H of at most 128 (keys
            of 8 bits: 64); all else is refused. Other numbers are hints, which nothing here needs.
        key_scale, value_scale: float, broadcastable into (H, T_k), with `block_table` into (pages, H, page), of key and value in
            int8 or float8_e4m3fn: as in `jax_sdpa.dot_product_attention`.

    All arrays may be traced: other boundaries, lengths or pages are other numbers of the same program, and compile nothing.

    Returns:
        (T_q, Hq, D of value) in the query's dtype; with lse also (Hq, T_q), float32 (float64 for float64 calls), differentiable.
        A query that sees no key gives 0, gradient 0 and lse -inf.

    Raises:
        TypeError: dtypes and types. ValueError: shapes, ranges, conflicts; `seqused_k` or `block_table` under differentiation.
        NoViableBackendError: no backend that is allowed can run the call, or keep what `num_splits=1` asks for.

    Differentiable in query, key, value and an array scale. What no query sees may hold anything, NaN included.

    FLASH reads the pages of a decode step where they lie: max_q of at most 16, max_q * Hq / H of at most 128, max_pages * page of
    at least 256, a page of 8, 16, 32 … keys, head dims in multiples of 16. Of keys of 8 bits: max_q * Hq / H of at most 64, head
    dims in multiples of 32, of values beyond 128 in multiples of 128. Otherwise, and on the other backends, XLA gathers them into
    (N, max_pages * page, H, D) first, a copy of the sequences' own cache; `explain` says which.

    Source: torch.nn.attention.varlen.varlen_attn, torch 2.13. Differs: runs on every backend and device; the head dim of values may
    be another; lse is (Hq, T_q), as torch's kernels return it (its docstring has it transposed); no `varlen_attn_out`.

    >>> import jax.numpy as jnp
    >>> query, key = jnp.ones((9, 4, 64)), jnp.ones((9, 2, 64))
    >>> cu_seq = jnp.array([0, 3, 8])                                          # two sequences, and a token of padding
    >>> out, lse = varlen_attn(
    ...     query, key, key, cu_seq, cu_seq, 5, 5, window_size=(-1, 0), enable_gqa=True, return_aux=AuxRequest(lse=True))
    >>> out.shape, lse.shape
    ((9, 4, 64), (4, 9))
    """
    for name, given in (("seqused_k", seqused_k), ("block_table", block_table)):
        if given is not None:
            query, key, value, scale = (
                _inference_only(name, x) if isinstance(x, jax.Array) else x for x in (query, key, value, scale)
            )
    request, restore = varlen_request(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale, window_size=window_size,
        enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table, num_splits=num_splits, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip
    out, lse = restore(*functional.attend(request))
    return (out, lse) if return_aux is not None and return_aux.lse else out


def _notes(*args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("Inference only: with seqused_k or block_table there is no derivative.",) if kwargs.get("seqused_k") is not None else ()


functional.explains(varlen_attn, varlen_request, _notes)
