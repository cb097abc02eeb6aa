"""A decoder-only transformer, the one that Qwen2 and the small GPT of these examples share, and its generation loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sdpa.nn import Attention, KVCache, Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches; the names of Hugging Face's `config.json` stand beside those that differ."""

    vocab_size: int
    features: int  # hidden_size
    hidden: int  # intermediate_size
    layers: int  # num_hidden_layers
    q_heads: int  # num_attention_heads
    kv_heads: int  # num_key_value_heads
    head_dim: int | None = None
    rope_theta: float = 10000.0
    epsilon: float = 1e-6  # rms_norm_eps
    qkv_bias: bool = True
    tied: bool = False  # tie_word_embeddings
    windows: tuple[int | None, ...] = ()  # one for each layer; () = none
    dropout_rate: float = 0.0
    remat: bool = False  # recompute each block in the backward
    dtype: Any = None


class MLP(nnx.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, rngs=rngs)

        self.gate = linear(config.features, config.hidden)
        self.up = linear(config.features, config.hidden)
        self.down = linear(config.hidden, config.features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, index: int, rngs: nnx.Rngs):
        norm = {"epsilon": config.epsilon, "dtype": config.dtype, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(config.features, **norm)
        self.attention = Attention(
            config.features, config.q_heads, config.kv_heads, config.head_dim, rope=Rope(config.rope_theta),
            window=config.windows[index] if config.windows else None, qkv_bias=config.qkv_bias,
            dropout_rate=config.dropout_rate, dtype=config.dtype, rngs=rngs,
        )  # fmt: skip
        self.mlp_norm = nnx.RMSNorm(config.features, **norm)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: jax.Array, cache: KVCache | None, lengths: Any, padding: str, deterministic: bool
    ) -> tuple[jax.Array, KVCache | None]:
        y = self.attention(self.attention_norm(x), cache=cache, lengths=lengths, padding=padding, deterministic=deterministic)
        y, cache = (y, None) if cache is None else y
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Tokens (B, L) to logits (B, L, vocabulary), float32."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(config.vocab_size, config.features, dtype=config.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, i, rngs) for i in range(config.layers)])
        self.norm = nnx.RMSNorm(config.features, epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        head = (
            None if config.tied else nnx.Linear(config.features, config.vocab_size, use_bias=False, dtype=config.dtype, rngs=rngs)
        )
        self.head = nnx.data(head)

    def make_caches(self, batch: int, length: int) -> list[KVCache]:
        """An empty cache for each block."""
        return [block.attention.make_cache(batch, length) for block in self.blocks]

    def __call__(
        self,
        tokens: jax.Array,
        caches: list[KVCache] | None = None,
        *,
        lengths: Any = None,
        padding: str = "right",
        last_only: bool = False,
        deterministic: bool = True,
    ) -> Any:
        """Logits, and with caches (logits, caches). lengths, padding: as `Attention`'s.

        last_only: the logits of each sequence's last token alone, (B, vocabulary): what generation needs of a prefill.
        """
        x = self.embedding(tokens)
        apply = nnx.remat(_apply, static_argnums=(4, 5), policy=KEEP_ATTENTION) if self.config.remat else _apply
        extended = []
        for i, block in enumerate(self.blocks):
            x, cache = apply(block, x, None if caches is None else caches[i], lengths, padding, deterministic)
            extended.append(cache)
        if last_only:
            last = x.shape[1] - 1 if lengths is None or padding == "left" else jnp.maximum(lengths - 1, 0)
            x = jnp.take_along_axis(x, jnp.broadcast_to(last, x.shape[0])[:, None, None], 1)[:, 0]
        x = self.norm(x)
        logits = self.embedding.attend(x) if self.head is None else self.head(x)
        logits = logits.astype(jnp.float32)
        return logits if caches is None else (logits, extended)


KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names("sdpa_out", "sdpa_lse")
"""Of a block that is recomputed in the backward, attention is not: its output is small beside its cost."""


def _apply(block: Block, x: Any, cache: Any, lengths: Any, padding: str, deterministic: bool) -> Any:
    return block(x, cache, lengths, padding, deterministic)


@nnx.jit(static_argnames=("padding", "last_only"), donate_argnames="caches")
def extend(
    model: Decoder, tokens: Any, caches: list[KVCache], lengths: Any = None, *, padding: str = "right", last_only: bool = True
) -> Any:
    """`model` on a chunk, compiled once for each shape: one program for the prefill, one for every decode step.

    The caches are donated: they are written in place, and those that were handed over are gone.
    """
    return model(tokens, caches, lengths=lengths, padding=padding, last_only=last_only)


def generate(
    model: Decoder, prompts: jax.Array, new_tokens: int, *, lengths: Any = None, padding: str = "left", chunk: int | None = None
) -> jax.Array:
    """Greedy continuation: prompts (B, L) of the given lengths, padded on one side, to (B, new_tokens).

    chunk: prefill by so many tokens at a time (the prompts then have to be padded on the left, or not at all).
    """
    B, L = prompts.shape
    caches = model.make_caches(B, L + new_tokens)
    counts = jnp.full(B, L, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    if chunk is not None and lengths is not None and padding == "right":
        raise ValueError("chunked prefill needs prompts that end together: pad them on the left.")
    logits = None
    for start in range(0, L, chunk or L):
        tokens = prompts[:, start : start + (chunk or L)]
        before = start if padding == "right" else L - start - tokens.shape[1]  # tokens on the other side of the chunk
        here = jnp.clip(counts - before, 0, tokens.shape[1])
        logits, caches = extend(model, tokens, caches, here, padding=padding)
    if logits is None:
        raise ValueError("a prompt needs at least one token.")
    out = [jnp.argmax(logits, -1)]
    for _ in range(new_tokens - 1):
        logits, caches = extend(model, out[-1][:, None], caches)
        out.append(jnp.argmax(logits, -1))
    return jnp.stack(out, 1)
