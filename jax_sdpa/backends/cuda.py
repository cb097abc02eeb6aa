"""The mirror of `torch.backends.cuda`: the switches of the attention backends, and the question whether one can run a call.

The switches are global, for every thread, and part of `jit`'s key: a jitted function that ran before a switch was turned is
traced again after it. A surrounding `jax_sdpa.attention.sdpa_kernel` wins in its thread. What was allowed when a call was traced
holds for its backward pass too. They hold on every platform, not only on CUDA, since the backends here exist on every one.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jax_sdpa.attention import sdpa_kernel
from jax_sdpa.context import TOGGLES, SDPBackend, allowed_now
from jax_sdpa.dispatch import HEADINGS
from jax_sdpa.functional import explain

__all__ = [
    "SDPAParams",
    "allow_fp16_bf16_reduction_math_sdp",
    "can_use_cudnn_attention",
    "can_use_efficient_attention",
    "can_use_flash_attention",
    "cudnn_sdp_enabled",
    "enable_cudnn_sdp",
    "enable_flash_sdp",
    "enable_math_sdp",
    "enable_mem_efficient_sdp",
    "flash_sdp_enabled",
    "fp16_bf16_reduction_math_sdp_allowed",
    "is_flash_attention_available",
    "math_sdp_enabled",
    "mem_efficient_sdp_enabled",
]

_turning = threading.Lock()  # two threads that turn different switches at once both get their way


def _turn(switch: str, enabled: bool, function: str) -> None:
    if not isinstance(enabled, bool):
        raise TypeError(f"{function} expects a bool, but got {type(enabled).__name__}: pass True or False.")
    with _turning:
        TOGGLES.set_global(dataclasses.replace(TOGGLES.get_global(), **{switch: enabled}))


def _allowed(backend: SDPBackend) -> bool:
    return backend in allowed_now().backends


def enable_flash_sdp(enabled: bool) -> None:
    """Allow or forbid FLASH_ATTENTION, our Pallas kernels, in every thread.

    Args:
        enabled: True (the state at the start) or False.

    Raises:
        TypeError: `enabled` is no bool (torch: RuntimeError).

    Source: torch.backends.cuda.enable_flash_sdp, torch 2.13. Differs: holds on every platform; part of `jit`'s key.

    >>> enable_flash_sdp(False)
    >>> flash_sdp_enabled()
    False
    >>> enable_flash_sdp(True)
    """
    _turn("flash", enabled, "enable_flash_sdp")


def flash_sdp_enabled() -> bool:
    """Whether FLASH_ATTENTION is allowed at this point: by a surrounding `sdpa_kernel`, else by its switch.

    Source: torch.backends.cuda.flash_sdp_enabled, torch 2.13.

    >>> flash_sdp_enabled()
    True
    >>> with sdpa_kernel(SDPBackend.MATH):
    ...     flash_sdp_enabled()
    False
    """
    return _allowed(SDPBackend.FLASH_ATTENTION)


def enable_mem_efficient_sdp(enabled: bool) -> None:
    """Allow or forbid EFFICIENT_ATTENTION, blockwise attention in plain XLA, in every thread.

    Args:
        enabled: True (the state at the start) or False.

    Raises:
        TypeError: `enabled` is no bool (torch: RuntimeError).

    Source: torch.backends.cuda.enable_mem_efficient_sdp, torch 2.13. Differs: holds on every platform; part of `jit`'s key.

    >>> enable_mem_efficient_sdp(False)
    >>> mem_efficient_sdp_enabled()
    False
    >>> enable_mem_efficient_sdp(True)
    """
    _turn("mem_efficient", enabled, "enable_mem_efficient_sdp")


def mem_efficient_sdp_enabled() -> bool:
    """Whether EFFICIENT_ATTENTION is allowed at this point: by a surrounding `sdpa_kernel`, else by its switch.

    Source: torch.backends.cuda.mem_efficient_sdp_enabled, torch 2.13.

    >>> mem_efficient_sdp_enabled()
    True
    """
    return _allowed(SDPBackend.EFFICIENT_ATTENTION)


def enable_math_sdp(enabled: bool) -> None:
    """Allow or forbid MATH, the definition, in every thread.

    Args:
        enabled: True (the state at the start) or False.

    Raises:
        TypeError: `enabled` is no bool (torch: RuntimeError).

    Source: torch.backends.cuda.enable_math_sdp, torch 2.13. Differs: holds on every platform; part of `jit`'s key.

    >>> enable_math_sdp(False)
    >>> math_sdp_enabled()
    False
    >>> enable_math_sdp(True)
    """
    _turn("math", enabled, "enable_math_sdp")


def math_sdp_enabled() -> bool:
    """Whether MATH is allowed at this point: by a surrounding `sdpa_kernel`, else by its switch.

    Source: torch.backends.cuda.math_sdp_enabled, torch 2.13.

    >>> math_sdp_enabled()
    True
    """
    return _allowed(SDPBackend.MATH)


def enable_cudnn_sdp(enabled: bool) -> None:
    """Allow or forbid CUDNN_ATTENTION, cuDNN's kernels, in every thread.

    Args:
        enabled: True (the state at the start) or False.

    Raises:
        TypeError: `enabled` is no bool (torch: RuntimeError).

    Source: torch.backends.cuda.enable_cudnn_sdp, torch 2.13. Differs: holds on every platform; part of `jit`'s key.

    >>> enable_cudnn_sdp(False)
    >>> cudnn_sdp_enabled()
    False
    >>> enable_cudnn_sdp(True)
    """
    _turn("cudnn", enabled, "enable_cudnn_sdp")


def cudnn_sdp_enabled() -> bool:
    """Whether CUDNN_ATTENTION is allowed at this point: by a surrounding `sdpa_kernel`, else by its switch.

    Source: torch.backends.cuda.cudnn_sdp_enabled, torch 2.13.

    >>> cudnn_sdp_enabled()
    True
    """
    return _allowed(SDPBackend.CUDNN_ATTENTION)


def allow_fp16_bf16_reduction_math_sdp(enabled: bool) -> None:
    """Let MATH compute float16 and bfloat16 calls in their own dtype, or in float32 as at the start, in every thread.

    Args:
        enabled: True or False (the state at the start).

    Raises:
        TypeError: `enabled` is no bool (torch: RuntimeError).

    Source: torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, torch 2.13. Differs: holds on every platform; part of `jit`'s
    key.

    >>> allow_fp16_bf16_reduction_math_sdp(True)
    >>> fp16_bf16_reduction_math_sdp_allowed()
    True
    >>> allow_fp16_bf16_reduction_math_sdp(False)
    """
    _turn("low_precision_math", enabled, "allow_fp16_bf16_reduction_math_sdp")


def fp16_bf16_reduction_math_sdp_allowed() -> bool:
    """Whether MATH computes float16 and bfloat16 calls in their own dtype.

    Source: torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed, torch 2.13.

    >>> fp16_bf16_reduction_math_sdp_allowed()
    False
    """
    return TOGGLES.value.low_precision_math


class SDPAParams:
    """The arguments of one call, for the `can_use_*_attention` functions; positional only, as in torch.

    Args:
        query, key, value: arrays, or `jax.ShapeDtypeStruct`s.
        attn_mask: array, structured mask or None.
        dropout: a number.
        is_causal, enable_gqa: bools.

    Source: torch.backends.cuda.SDPAParams, torch 2.13.

    >>> q = jax.ShapeDtypeStruct((1, 8, 128, 64), "bfloat16")
    >>> SDPAParams(q, q, q, None, 0.0, True, False).is_causal
    True
    """

    __slots__ = ("attn_mask", "dropout", "enable_gqa", "is_causal", "key", "query", "value")

    def __init__(
        self, query: Any, key: Any, value: Any, attn_mask: Any, dropout: float, is_causal: bool, enable_gqa: bool, /
    ) -> None:
        self.query, self.key, self.value, self.attn_mask = query, key, value, attn_mask
        self.dropout, self.is_causal, self.enable_gqa = dropout, is_causal, enable_gqa


def _can_use(backend: SDPBackend, params: SDPAParams, debug: bool, name: str) -> bool:
    if not isinstance(params, SDPAParams):
        raise TypeError(f"params must be an SDPAParams, got {type(params).__name__}.")
    reasons = [] if _allowed(backend) else [f"{name} has been runtime disabled."]
    with sdpa_kernel(backend):
        choice = explain(
            params.query, params.key, params.value, params.attn_mask, params.dropout, params.is_causal,
            enable_gqa=params.enable_gqa, dropout_rng=jax.random.key(0) if params.dropout else None,
        )  # fmt: skip
    reasons += choice.rejected.get(backend, [])
    if reasons and debug:
        warnings.warn("\n".join([HEADINGS[backend], *reasons]), UserWarning, stacklevel=3)
    return not reasons


def can_use_flash_attention(params: SDPAParams, debug: bool = False) -> bool:
    """Whether FLASH_ATTENTION is allowed and can run this call on the device that it would use now.

    Args:
        params: the call.
        debug: if it can't, warn with every reason.

    Raises:
        What the call itself would raise for its arguments (torch answers False to some of them).

    Source: torch.backends.cuda.can_use_flash_attention, torch 2.13. Differs: asks about the forward; `jax_sdpa.explain(...,
    grad=True)` answers for a call that is differentiated, and for devices that are not here.

    >>> q = jax.ShapeDtypeStruct((1, 8, 128, 64), "float32")
    >>> can_use_flash_attention(SDPAParams(q, q, q, None, 0.0, True, False))
    False
    """
    return _can_use(SDPBackend.FLASH_ATTENTION, params, debug, "Flash attention")


def can_use_efficient_attention(params: SDPAParams, debug: bool = False) -> bool:
    """Whether EFFICIENT_ATTENTION is allowed and can run this call on the device that it would use now.

    Args:
        params: the call.
        debug: if it can't, warn with every reason.

    Raises:
        What the call itself would raise for its arguments (torch answers False to some of them).

    Source: torch.backends.cuda.can_use_efficient_attention, torch 2.13. Differs: on the CPU as well, where torch answers False.

    >>> q = jax.ShapeDtypeStruct((1, 8, 128, 64), "float32")
    >>> can_use_efficient_attention(SDPAParams(q, q, q, None, 0.0, True, False))
    True
    """
    return _can_use(SDPBackend.EFFICIENT_ATTENTION, params, debug, "Memory efficient attention")


def can_use_cudnn_attention(params: SDPAParams, debug: bool = False) -> bool:
    """Whether CUDNN_ATTENTION is allowed and can run this call on the device that it would use now.

    Args:
        params: the call.
        debug: if it can't, warn with every reason.

    Raises:
        What the call itself would raise for its arguments (torch answers False to some of them).

    Source: torch.backends.cuda.can_use_cudnn_attention, torch 2.13. Differs: asks about the forward; `jax_sdpa.explain(...,
    grad=True)` answers for a call that is differentiated, and for devices that are not here.

    >>> q = jax.ShapeDtypeStruct((1, 8, 128, 64), "float32")
    >>> can_use_cudnn_attention(SDPAParams(q, q, q, None, 0.0, True, False))
    False
    """
    return _can_use(SDPBackend.CUDNN_ATTENTION, params, debug, "cuDNN attention")


def is_flash_attention_available() -> bool:
    """Whether FLASH_ATTENTION can run at all on the device that a call would use now, whatever the switches say.

    Source: torch.backends.cuda.is_flash_attention_available, torch 2.13. Differs: torch asks how it was built; here the question
    goes to the device and the JAX version.

    >>> is_flash_attention_available() in (True, False)
    True
    """
    q = jax.ShapeDtypeStruct((1, 1, 128, 64), jnp.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return explain(q, q, q).backend is SDPBackend.FLASH_ATTENTION
