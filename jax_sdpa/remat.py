"""A policy for `jax.checkpoint` that keeps what the backward of attention starts from."""

from __future__ import annotations

from typing import Any

import jax

from jax_sdpa.primitive import LSE_NAME, OUT_NAME

__all__ = ["LSE_NAME", "OUT_NAME", "save_attention"]

_BY_NAME = jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)


def save_attention(primitive: Any, *args: Any, **params: Any) -> Any:
    """Save out (B, Hq, L, Ev) and lse (B, Hq, L) of every attention call, and nothing else: no forward runs twice.

    A `policy` of `jax.checkpoint`: everything else of the block is computed again in the backward pass, attention is not, whose
    backward needs only q, k, v and these two. They are named `OUT_NAME` and `LSE_NAME` ("sdpa_out", "sdpa_lse"), for policies of
    your own; `jax.checkpoint_policies.save_from_both_policies(save_attention, ...)` adds to it. Source: torch's selective
    activation checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`), where one lists the operators.

    >>> import jax, jax.numpy as jnp
    >>> from jax_sdpa import scaled_dot_product_attention
    >>> block = jax.checkpoint(lambda x: scaled_dot_product_attention(x, x, x).sum(), policy=save_attention)
    >>> str(jax.jit(jax.grad(block)).trace(jnp.ones((1, 2, 4, 8))).jaxpr).count("sdpa_forward[")
    1
    """
    return _BY_NAME(primitive, *args, **params)
