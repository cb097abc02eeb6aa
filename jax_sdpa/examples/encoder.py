"""The encoder block that MiniLM (BERT's order: norms behind the sums) and ViT (norms before) share."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jax_sdpa.nn import Attention


class EncoderBlock(nnx.Module):
    """norm_first: x + attention(norm(x)), then x + mlp(norm(x)); else norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, features: int, heads: int, hidden: int, *, epsilon: float, norm_first: bool, rngs: nnx.Rngs):
        self.norm_first = norm_first
        self.attention = Attention(features, heads, is_causal=False, qkv_bias=True, out_bias=True, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.up, self.down = nnx.Linear(features, hidden, rngs=rngs), nnx.Linear(hidden, features, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(features, epsilon=epsilon, rngs=rngs)

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))

    def __call__(self, x: jax.Array, lengths: Any = None) -> jax.Array:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), lengths=lengths)
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, lengths=lengths))
        return self.mlp_norm(x + self._mlp(x))
