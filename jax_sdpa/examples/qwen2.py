"""Qwen2 (arXiv:2407.10671) with the weights of a Hugging Face checkpoint: the same logits, in prefill, chunks and decode.

    python -m jax_sdpa.examples.qwen2                                     a small one with random weights
    python -m jax_sdpa.examples.qwen2 --checkpoint DIR --tokens 9707 11 856   a real one: config.json and *.safetensors in DIR

Tokens are numbers: a tokenizer is somebody else's work (`tokenizers`, `transformers`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sdpa.examples.decoder import Decoder, DecoderConfig, generate
from jax_sdpa.examples.weights import Checkpoint, read_directory

SMALL = {
    "model_type": "qwen2", "vocab_size": 256, "hidden_size": 224, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 14, "num_key_value_heads": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
"""7 query heads per key/value head, as the 28/4 of Qwen2-7B."""


def config_from(given: Mapping[str, Any], dtype: Any = None) -> DecoderConfig:
    """A `config.json` of Hugging Face's Qwen2 as ours; what it asks for and we do not have is a ValueError."""
    if given.get("model_type", "qwen2") != "qwen2":
        raise ValueError(f"expected a Qwen2 checkpoint, got model_type {given['model_type']!r}.")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or given.get("hidden_act", "silu") != "silu":
        raise ValueError(f"only plain RoPE and SiLU are here, got rope type {kind!r} and {given.get('hidden_act')!r}.")
    layers, q_heads = given["num_hidden_layers"], given["num_attention_heads"]
    windows: tuple[int | None, ...] = ()
    if given.get("use_sliding_window"):
        first = given.get("max_window_layers", layers)
        kinds = given.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        windows = tuple(given["sliding_window"] if name == "sliding_attention" else None for name in kinds)
    return DecoderConfig(
        vocab_size=given["vocab_size"], features=given["hidden_size"], hidden=given["intermediate_size"], layers=layers,
        q_heads=q_heads, kv_heads=given.get("num_key_value_heads", q_heads), head_dim=given.get("head_dim"),
        rope_theta=rope.get("rope_theta", given.get("rope_theta", 10000.0)), epsilon=given.get("rms_norm_eps", 1e-6),
        tied=given.get("tie_word_embeddings", False), windows=windows, dtype=dtype,
    )  # fmt: skip


def load(config: DecoderConfig, weights: Mapping[str, Any], dtype: Any = jnp.float32) -> Decoder:
    """A `Decoder` with the tensors of a checkpoint, by their Hugging Face names; every one must be there, and of its shape."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    checkpoint = Checkpoint(weights, dtype, ignore=("lm_head.weight",) if config.tied else ())
    checkpoint.into(model.embedding.embedding, "model.embed_tokens.weight")
    for i, block in enumerate(model.blocks):
        name = f"model.layers.{i}."
        checkpoint.norm(block.attention_norm, name + "input_layernorm")
        checkpoint.norm(block.mlp_norm, name + "post_attention_layernorm")
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
            checkpoint.linear(getattr(block.attention, ours), f"{name}self_attn.{theirs}")
        for part in ("gate", "up", "down"):
            checkpoint.linear(getattr(block.mlp, part), f"{name}mlp.{part}_proj")
    checkpoint.norm(model.norm, "model.norm")
    if model.head is not None:
        checkpoint.linear(model.head, "lm_head")
    checkpoint.done()
    return model


def load_directory(directory: str | Path, dtype: Any = jnp.bfloat16) -> Decoder:
    """The model of a local checkpoint: `config.json` and one or more `*.safetensors`."""
    config, weights = read_directory(directory)
    return load(config_from(config, dtype), weights, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a directory with config.json and *.safetensors")
    parser.add_argument("--tokens", type=int, nargs="+", default=[9, 8, 7, 6, 5], help="the prompt, as token numbers")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args(arguments)
    if options.checkpoint:
        model = load_directory(options.checkpoint, jnp.dtype(options.dtype))
    else:
        model = Decoder(config_from(SMALL, jnp.dtype(options.dtype)), rngs=nnx.Rngs(0))
    prompts = jnp.asarray([options.tokens], jnp.int32)
    generate(model, prompts, options.new_tokens)  # compiles
    start = time.perf_counter()
    tokens = jax.block_until_ready(generate(model, prompts, options.new_tokens))
    seconds = time.perf_counter() - start
    print(f"{options.new_tokens} tokens in {seconds:.3f} s after a prompt of {len(options.tokens)}: {tokens[0].tolist()}")


if __name__ == "__main__":
    main()
