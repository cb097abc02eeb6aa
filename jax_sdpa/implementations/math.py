"""MATH: the definition, to be read. What it gives is what every other backend must give.

Source: `_scaled_dot_product_attention_math` and `_safe_softmax` of torch 2.13 (aten/src/ATen/native/transformers/attention.cpp).
Differs: -inf rows by guarding the maximum, so that their derivatives are 0 as well; lse, softcap and sinks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa.context import SDPBackend
from jax_sdpa.device import Device
from jax_sdpa.implementations import scores
from jax_sdpa.implementations.base import Implementation, Tangents
from jax_sdpa.request import SdpaRequest


def attention(request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
    """softmax(softcap(scale * q @ k.T) + masks) @ v, everything in float32 (float64), one rounding at the end."""
    p, lse = probabilities(request)
    return mixture(request, dropped(request, p)), lse


def _dtype(request: SdpaRequest) -> Any:
    return request.query.dtype if request.spec.low_precision_math else scores.compute_dtype(request)


def probabilities(request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
    """(softmax(softcap(scale * q @ k.T) + masks), lse): (B, Hq, L, S) and (B, Hq, L), before dropout."""
    s = logits(request)
    m = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    sinks = None if request.sinks is None else request.sinks[:, :, None, None].astype(s.dtype)
    if sinks is not None:
        m = jnp.maximum(m, lax.stop_gradient(sinks))
    m = jnp.where(jnp.isneginf(m), 0, m)  # a row without keys: exp(-inf - 0) = 0, where -inf - -inf would be NaN
    p = jnp.exp(s - m)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - m)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    p = p / total
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(total))[..., 0]
    return p, lse.astype(scores.compute_dtype(request))


def logits(request: SdpaRequest) -> jax.Array:
    """softcap(scale * q @ k.T) + masks, (B, Hq, L, S); -inf for what is hidden."""
    dtype = _dtype(request)
    einsum = partial(jnp.einsum, precision=request.spec.precision)
    b, h, g = request.batch, request.kv_heads, request.group
    q = request.query.astype(dtype)
    k = scores.seen_only(request, request.key).astype(dtype)
    q, k = scores.split_scale(request, q, k)
    if request.spec.layout == "BHLE":
        q = q.reshape(b, h, g, *q.shape[2:])
        s = einsum("bhgle,bhse->bhgls", q, k)
    else:
        q = q.reshape(b, q.shape[1], h, g, q.shape[3])
        s = einsum("blhge,bshe->bhgls", q, k)
    s = s.reshape(b, h * g, request.query_len, request.key_len)

    s, _ = scores.cap(request, s)
    everything = (0, request.query_len, 0, request.key_len)
    if (addend := scores.addend(request, *everything, s.dtype)) is not None:
        s = s + addend
    if (kept := scores.kept(request, *everything)) is not None:
        s = jnp.where(kept, s, -jnp.inf)
    return s


def dropped(request: SdpaRequest, p: jax.Array) -> jax.Array:
    """p with the request's dropout."""
    survivors = scores.survivors(request, 0, request.query_len, 0, request.key_len, p.dtype)
    return p if survivors is None else p * survivors


def mixture(request: SdpaRequest, p: jax.Array) -> jax.Array:
    """p @ v in the request's layout and dtype; p: (B, Hq, L, S), what the softmax, and dropout, left."""
    v = scores.seen_only(request, request.value).astype(_dtype(request))
    p = p.reshape(request.batch, request.kv_heads, request.group, request.query_len, request.key_len)
    equation = "bhgls,bhse->bhgle" if request.spec.layout == "BHLE" else "bhgls,bshe->blhge"
    out = jnp.einsum(equation, p, v, precision=request.spec.precision)
    return out.reshape(request.out_shape).astype(request.query.dtype)


def of_operands(request: SdpaRequest, wrt: tuple[str, ...], function: Any = attention) -> Any:
    """`attention`, or another function of a request, as one of the operands named in `wrt` alone."""
    return lambda *operands: function(dataclasses.replace(request, **dict(zip(wrt, operands, strict=True))))


def share(request: SdpaRequest, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(p @ v, p.sum(-1)) with p = exp(s - lse), lse given: what these keys add to a softmax over more keys than these."""
    p = jnp.exp(logits(request) - jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None].astype(_dtype(request)))
    return mixture(request, dropped(request, p)), p.sum(-1)


class Math(Implementation):
    """The readable definition: everywhere, every dtype, every mask, every transform; memory O(L * S)."""

    backend = SDPBackend.MATH
    heading = "Math attention kernel not used because:"
    needs_partitioning = False

    def reasons_against(self, request: SdpaRequest, device: Device) -> list[str]:
        return []

    def run(self, request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
        return attention(request)

    def tangent(self, request: SdpaRequest, out: jax.Array, lse: jax.Array, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
        wrt = tuple(tangents)
        request = self._clean(request, lse)
        primals = [getattr(request, name) for name in wrt]
        return jax.jvp(of_operands(request, wrt), primals, list(tangents.values()))[1]

    def backward(
        self, request: SdpaRequest, out: jax.Array, lse: jax.Array, dout: Any, dlse: Any, wrt: tuple[str, ...]
    ) -> Tangents:
        request = self._clean(request, lse)
        dout = jnp.zeros_like(out) if dout is None else scores.existing_only(request, lse, dout)
        if request.spec.part:  # ds = p * (dp - delta): the cotangents of p @ v and of p.sum(-1) are dout and -delta
            delta = scores.row_deltas(request, out, lse, dout, dlse)
            operands = [getattr(request, name) for name in wrt]
            _, pullback = jax.vjp(of_operands(request, wrt, lambda request: share(request, lse)), *operands)
            return dict(zip(wrt, pullback((dout, -delta.astype(_dtype(request)))), strict=True))
        _, pullback = jax.vjp(of_operands(request, wrt), *(getattr(request, name) for name in wrt))
        dlse = jnp.zeros_like(lse) if dlse is None else dlse
        return dict(zip(wrt, pullback((dout, dlse)), strict=True))

    @staticmethod
    def _clean(request: SdpaRequest, lse: jax.Array) -> SdpaRequest:
        if not request.masks:
            return request
        return dataclasses.replace(request, query=scores.existing_only(request, lse, request.query))
