"""The encoder block that MiniLM (BERT's order: norms behind the sums) and ViT (norms before) share."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jax_sdpa.examples.weights import Checkpoint
from jax_sdpa.nn import Attention


class EncoderBlock(nnx.Module):
    """norm_first: x + attention(norm(x)), then x + mlp(norm(x)); else norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, features: int, heads: int, hidden: int, *, epsilon: float, norm_first: bool, rngs: nnx.Rngs):
        self.norm_first = norm_first
        self.attention = Attention(features, heads, is_causal=False, qkv_bias=True, out_bias=True, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.up, self.down = nnx.Linear(features, hidden, rngs=rngs), nnx.Linear(hidden, features, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(features, epsilon=epsilon, rngs=rngs)

    def read(self, checkpoint: Checkpoint, name: str, *, attention: str, norms: tuple[str, str]) -> None:
        """Take block `name` of a BERT-like checkpoint; attention: what precedes query, key, value; norms: of attention, of mlp."""
        for part in ("query", "key", "value"):
            checkpoint.linear(getattr(self.attention, part), f"{name}{attention}{part}")
        checkpoint.linear(self.attention.out, name + "attention.output.dense")
        checkpoint.norm(self.attention_norm, name + norms[0])
        checkpoint.linear(self.up, name + "intermediate.dense")
        checkpoint.linear(self.down, name + "output.dense")
        checkpoint.norm(self.mlp_norm, name + norms[1])

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))

    def __call__(self, x: jax.Array, lengths: Any = None) -> jax.Array:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), lengths=lengths)
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, lengths=lengths))
        return self.mlp_norm(x + self._mlp(x))
