"""The functions that people call: torch's face, JAX's face, and `explain`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_sdpa import attention, check, dispatch, primitive
from jax_sdpa import device as devices
from jax_sdpa.attention import SDPBackend
from jax_sdpa.request import SdpaRequest


def attend(request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a request; zeros and -inf where there is no score at all."""
    if check.is_empty(request):
        lse = jnp.full(request.lse_shape, -jnp.inf, jnp.promote_types(request.query.dtype, jnp.float32))
        if request.sinks is not None:
            lse = jnp.logaddexp(lse, request.sinks[:, :, None].astype(lse.dtype))
        return jnp.zeros(request.out_shape, request.query.dtype), lse
    dispatch.check_viable(request, devices.imaginable())
    if attention.WARN_FOR_UNFUSED_KERNELS and request.masks:
        choice = dispatch.choose(request, devices.default())
        if choice.backend is SDPBackend.MATH:
            warnings.warn("MATH materialises the structured mask as an L x S array.", UserWarning, stacklevel=3)
    return primitive.attend(request)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
    dropout_rng: Any = None,
) -> jax.Array:
    """Scaled dot product attention with torch's signature and meaning, on the backend that suits the call.

    ::

        scores = scale * query @ key.mT                                   # scale: 1 / sqrt(E) unless given
        scores = where(attn_mask, scores, -inf)  or  scores + attn_mask   # bool or float; is_causal: k <= q
        weights = dropout(softmax(scores), dropout_p)                     # rows of -inf alone: 0, not NaN
        return weights @ value

    L, S = query and key length; E, Ev = head dim of query and key, and of value; Hq, H = query heads, key/value heads.

    Args:
        query: (..., Hq, L, E), float16, bfloat16, float32 or float64; any number of leading dims, also none and no heads.
        key: (..., H, S, E), of the query's dtype. Leading dims broadcast; H = Hq or 1, or any divisor of Hq with `enable_gqa`.
        value: (..., H, S, Ev), of the query's dtype; with `enable_gqa` its number of heads may differ from the key's.
        attn_mask: broadcastable into (..., Hq, L, S): bool, True = takes part; or float32 or the query's dtype, added to the
            scores (-inf masks, a large negative number is a number). Or a structured mask of `jax_sdpa.attention.bias`
            (`causal_lower_right(L, S)`, `sliding_window(left, right)`, `SegmentIds`, `KeyLengths`, `&` of them), which no fused
            backend ever makes an L x S array of, and whose hidden keys never reach the result, whatever they hold.
        dropout_p: probability of dropping a weight, a number in [0, 1], rounded to a multiple of 2^-32.
        is_causal: upper-left triangle, k <= q, for any L and S. With `attn_mask` it is an error.
        scale: a number, or a scalar array (may be traced, has a gradient).
        enable_gqa: query head h attends with key/value head h // (Hq / H); nothing is repeated in memory.
        dropout_rng: a JAX key; needed where dropout_p > 0. The same key gives the same mask on every backend, and on any mesh
            under plain `jit`; in a manual `shard_map` say where the part begins (`jax_sdpa.dropout.at`).

    Returns:
        (..., Hq, L, Ev) in the query's dtype. float16 and bfloat16 are computed in float32 and rounded once.

    Raises:
        TypeError: dtypes and types. ValueError: shapes, ranges, conflicts (torch raises RuntimeError for both).
        NoViableBackendError: no backend that `sdpa_kernel` or the toggles allow can run the call.

    Differentiable in query, key, value, a float attn_mask and an array scale, any number of times, in both modes.

    Source: torch.nn.functional.scaled_dot_product_attention, torch 2.13. Differs: explicit `dropout_rng`; mask with is_causal and
    key/value lengths that differ are errors on every backend; integer masks are errors; no in-place state.

    >>> import jax.numpy as jnp
    >>> query = jnp.ones((32, 8, 128, 64), jnp.float16)
    >>> key = value = jnp.ones((32, 2, 128, 64), jnp.float16)
    >>> scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).shape
    (32, 8, 128, 64)
    """
    request, shape = check.torch_request(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, dropout_rng=dropout_rng
    )
    out, _ = attend(request)
    return jnp.reshape(out, shape)


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    dropout_rng: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
) -> Any:
    """Attention in JAX's own convention, (…, L, H, E), on the same engine as `scaled_dot_product_attention`.

    ::

        scores = scale * einsum("...lhe,...she->...hls", query, key)
        scores = softcap * tanh(scores / softcap)                         # if softcap
        scores = where(mask & causal & window & lengths, scores + bias, -inf)
        lse = logsumexp([scores, sinks])                                  # sinks: one more logit per head, with no value
        return einsum("...hls,...she->...lhe", dropout(exp(scores - lse), dropout_p), value)

    Args:
        query: (…, L, Hq, E), float16, bfloat16, float32 or float64; any leading dims, or none.
        key, value: (…, S, H, E) and (…, S, H, Ev); Hq is a multiple of H.
        bias: float32 or the query's dtype, broadcastable into (…, Hq, L, S); has a gradient.
        mask: bool, the same shape, True = takes part; or a structured mask of `jax_sdpa.attention.bias`.
        scale: number or scalar array, default 1 / sqrt(E).
        is_causal: k <= q.
        query_seq_lengths, key_value_seq_lengths: integer (B,) (the batch dims); rows behind a query length give 0.
        local_window_size: (left, right) inclusive distances around k = q, or one int for both.
        implementation: 'xla' (EFFICIENT or MATH), 'cudnn', None (our choice, or a surrounding `sdpa_kernel`'s).
        return_residual: also return lse.
        softcap: positive number, as in Gemma 2; applied after scale, before bias and masks.
        sinks: float (Hq,), a logit per head that takes part in the softmax and has no value, as in gpt-oss; has a gradient.
        dropout_p, dropout_rng: probability of dropping a weight, and the JAX key that it then needs, as in
            `scaled_dot_product_attention`, with the same bits.
        key_scale, value_scale: float, broadcastable into (…, H, S), heads before keys: a scale for each key of each head, for each
            head, or one for all. Then key and value are int8 or float8_e4m3fn, a quantised cache, and stand for
            `key * key_scale` and `value * value_scale`, computed in float32 and rounded to the query's dtype. For inference: these
            four have no derivative. Scales of hidden keys may be anything, NaN included.

    FLASH widens such keys and values on their way where the call is a decode step: a bfloat16 query, L of at most 16, L * Hq / H of
    at most 64, S of at least 256; it multiplies the scores and the weights by the scales, in
    float32. EFFICIENT widens a block at a time. Elsewhere, and for gradients, they are widened first, a copy in the query's dtype;
    `explain` says which.

    Returns:
        (…, L, Hq, Ev) in the query's dtype; with `return_residual` also lse (…, L, Hq), float32 (float64 for float64 calls),
        natural logarithm, differentiable; -inf in a row that attends to nothing.

    Raises:
        As `scaled_dot_product_attention`; ValueError where `implementation` contradicts a surrounding `sdpa_kernel`.

    Source: jax.nn.dot_product_attention, jax 0.12. Differs: rows that may attend to nothing give 0 (there: mean of the values); lse
    is neither rounded nor cut off from differentiation; float64 is computed in float64; Ev may differ from E; any leading dims.

    >>> import jax.numpy as jnp
    >>> query, key = jnp.ones((2, 5, 8, 64)), jnp.ones((2, 7, 2, 64))
    >>> out, lse = dot_product_attention(query, key, key, key_value_seq_lengths=jnp.array([7, 3]), return_residual=True)
    >>> out.shape, lse.shape
    ((2, 5, 8, 64), (2, 5, 8))

    A cache of 8 bits, with a scale for each key of each head:

    >>> scale = jnp.abs(key).max(-1) / 127                                     # (2, 7, 2)
    >>> key8, scale = jnp.rint(key / scale[..., None]).astype(jnp.int8), jnp.swapaxes(scale, 1, 2)
    >>> dot_product_attention(query, key8, key8, key_scale=scale, value_scale=scale).dtype
    dtype('float32')
    """
    request, shape = check.jax_request(
        query, key, value, bias, mask, scale=scale, is_causal=is_causal, query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths, local_window_size=local_window_size, implementation=implementation,
        return_residual=return_residual, softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_rng=dropout_rng,
        key_scale=key_scale, value_scale=value_scale,
    )  # fmt: skip
    out, lse = attend(request)
    out = jnp.reshape(out, shape)
    return (out, jnp.reshape(jnp.swapaxes(lse, 1, 2), shape[:-1])) if return_residual else out


_REQUESTS: dict[Callable[..., Any], Callable[..., Any]] = {
    scaled_dot_product_attention: check.torch_request,
    dot_product_attention: check.jax_request,
}
_NOTES: dict[Callable[..., Any], Callable[..., tuple[str, ...]]] = {}


def explains(call: Callable[..., Any], request: Callable[..., Any], notes: Callable[..., tuple[str, ...]]) -> None:
    """Lets `explain(call=call)` know: `request(*args, **kwargs)[0]` is what it runs, `notes` what it does beside that."""
    _REQUESTS[call], _NOTES[call] = request, notes


def request_of(check_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `check_call(*args, **kwargs)`, one of `check`'s, makes, with shapes in place of arrays; of these, or of shapes."""

    def shape_only(leaf: Any) -> bool:
        return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))

    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if shape_only(leaf)]

    def make(arrays: list[jax.Array]) -> Any:
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(treedef, [next(given) if shape_only(leaf) else leaf for leaf in leaves])
        return check_call(*args, **kwargs)

    return jax.eval_shape(make, arrays)


def explain(
    *args: Any,
    call: Callable[..., Any] = scaled_dot_product_attention,
    device: str | None = None,
    grad: bool = False,
    **kwargs: Any,
) -> dispatch.Choice:
    """Which backend a call would run on, and for each other one every reason why not; nothing is run.

    Args:
        *args, **kwargs: those of the call; arrays may be `jax.ShapeDtypeStruct`s.
        call: `scaled_dot_product_attention` (default), `dot_product_attention` or `jax_sdpa.attention.varlen.varlen_attn`.
        device: 'cpu', 'cuda:sm90', 'cuda:sm90:cudnn91600', …, there or not; default: the one that the call would use now.
        grad: ask for the call under differentiation (by every operand that has a gradient).

    Returns:
        a `Choice`: `.backend` (None if there is none), `.rejected` ({backend: sentences}), `.notes`, `.device`; `print` it.

    Raises:
        What the call itself would raise for its arguments.

    Source: torch.backends.cuda.can_use_*_attention(params, debug=True) tells the same, a backend at a time.

    >>> import jax
    >>> q = jax.ShapeDtypeStruct((1, 8, 4096, 64), "bfloat16")
    >>> print(explain(q, q, q, is_causal=True, device="cpu").backend.name)
    EFFICIENT_ATTENTION
    """
    request = request_of(lambda *args, **kwargs: _REQUESTS[call](*args, **kwargs)[0], args, kwargs)
    if grad:
        request = request.with_spec(wrt=request.differentiable)
    choice = dispatch.choose(request, devices.default() if device is None else devices.parse(device))
    notes = _NOTES[call](*args, **kwargs) if call in _NOTES else ()
    return dataclasses.replace(choice, notes=(*choice.notes, *notes))
