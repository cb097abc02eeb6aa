"""Rotary position embedding, and the positions of packed sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding in the rotate-half form (Llama, Qwen, Mistral): pairs are (x[i], x[i + D/2]).

    ::

        angle = position * theta ** (-2 i / D)                         # i = 0 … D/2 - 1
        x[i], x[i + D/2] = x[i] cos - x[i + D/2] sin, x[i + D/2] cos + x[i] sin

    Args:
        theta: the base of the wavelengths.
        fraction: the part of the head dim that is rotated, D = fraction * E (GPT-NeoX, Phi); the rest stays as it is.

    Called with x (..., L, heads, E) of any float dtype and integer positions (..., L); computed in float32 (float64 for float64),
    rounded once.

    Source: Su et al., "RoFormer", arXiv:2104.09864; the pairing is that of Hugging Face's `rotate_half`.

    >>> Rope()(jnp.ones((1, 1, 4)), jnp.array([0])).tolist()  # position 0: nothing moves
    [[[1.0, 1.0, 1.0, 1.0]]]
    """

    theta: float = 10000.0
    fraction: float = 1.0

    def __call__(self, x: Any, positions: Any) -> jax.Array:
        E = x.shape[-1]
        D = round(E * self.fraction)
        if D % 2 or not 0 < D <= E:
            raise ValueError(f"rope rotates pairs: fraction * head dim must be even and in 1 to {E}, got {D}.")
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        frequencies = (self.theta ** (-np.arange(0, D, 2) / D)).astype(dtype)  # (D/2,)
        positions = positions.reshape((1,) * (x.ndim - 2 - positions.ndim) + positions.shape)
        angles = positions[..., None, None].astype(dtype) * frequencies.reshape((1,) * (x.ndim - 1) + (-1,))
        cos, sin = jnp.cos(angles), jnp.sin(angles)  # (..., L, 1, D/2)
        a, b, rest = x[..., : D // 2].astype(dtype), x[..., D // 2 : D].astype(dtype), x[..., D:]
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return jnp.concatenate([rotated.astype(x.dtype), rest], -1)


def positions_in_segments(segment_ids: Any) -> jax.Array:
    """Each token's position in its own packed sequence: integer ids (..., L) in, int32 (..., L) out.

    >>> positions_in_segments(jnp.array([0, 0, 0, 1, 1, -1])).tolist()
    [0, 1, 2, 0, 1, 0]
    """
    index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, segment_ids.ndim - 1)
    begins = segment_ids[..., 1:] != segment_ids[..., :-1]
    begins = jnp.concatenate([jnp.ones_like(begins[..., :1], shape=(*segment_ids.shape[:-1], 1)), begins], -1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), segment_ids.ndim - 1)
