"""A ViT (arXiv:2010.11929): patches, a class token, an encoder whose length, 197, is no multiple of any block.

python -m jax_sdpa.examples.vit --batch 8                            ViT-B/16's shape with random weights, timed
python -m jax_sdpa.examples.vit --checkpoint DIR --image image.npy   a Hugging Face ViT: config.json and *.safetensors
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_sdpa.examples.encoder import EncoderBlock
from jax_sdpa.examples.weights import Checkpoint, read_directory

BASE = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-12,
}  # fmt: skip
"""ViT-B/16, by the names of Hugging Face's `config.json`."""


class ViT(nnx.Module):
    """Images (B, height, width, channels) to hidden states (B, 1 + patches, features); the first one is the class token's."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs):
        features, patch, epsilon = config["hidden_size"], config["patch_size"], config["layer_norm_eps"]
        self.patch = patch
        self.embed = nnx.Linear(patch * patch * config["num_channels"], features, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, features)))
        self.positions = nnx.Param(0.02 * rngs.params.normal((1, 1 + (config["image_size"] // patch) ** 2, features)))
        heads, hidden = config["num_attention_heads"], config["intermediate_size"]
        self.blocks = nnx.List([
            EncoderBlock(features, heads, hidden, epsilon=epsilon, norm_first=True, rngs=rngs)
            for _ in range(config["num_hidden_layers"])
        ])  # fmt: skip
        self.norm = nnx.LayerNorm(features, epsilon=epsilon, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p = self.patch
        x = images.reshape(batch, height // p, p, width // p, p, channels)
        x = self.embed(jnp.einsum("bhpwqc->bhwcpq", x).reshape(batch, -1, p * p * channels))  # a convolution of stride p
        x = jnp.concatenate([jnp.broadcast_to(self.token[...], (batch, 1, x.shape[-1])), x], 1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def load(config: Mapping[str, Any], weights: Mapping[str, Any]) -> ViT:
    """A `ViT` with the tensors of a stored Hugging Face `ViTModel`; a classifier or pooler on top of it is left out."""
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    weights = {name.removeprefix("vit."): tensor for name, tensor in weights.items()}
    top = tuple(name for name in weights if name.startswith(("pooler.", "classifier.")))
    kernel = "embeddings.patch_embeddings.projection.weight"
    weights = {**weights, kernel: weights[kernel].reshape(weights[kernel].shape[0], -1)}  # (out, channels * patch * patch)
    checkpoint = Checkpoint(weights, ignore=top)
    checkpoint.into(model.token, "embeddings.cls_token")
    checkpoint.into(model.positions, "embeddings.position_embeddings")
    checkpoint.linear(model.embed, "embeddings.patch_embeddings.projection")
    for i, block in enumerate(model.blocks):
        block.read(
            checkpoint, f"encoder.layer.{i}.", attention="attention.attention.", norms=("layernorm_before", "layernorm_after")
        )
    checkpoint.norm(model.norm, "layernorm")
    checkpoint.done()
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=BASE["num_hidden_layers"])
    parser.add_argument("--checkpoint", type=Path, help="a directory with config.json and *.safetensors")
    parser.add_argument("--image", type=Path, help="a .npy of normalised floats, (height, width, channels)")
    options = parser.parse_args(arguments)
    if options.checkpoint:
        config, weights = read_directory(options.checkpoint)
        model = load(config, weights)
    else:
        config = {**BASE, "num_hidden_layers": options.layers}
        model = ViT(config, rngs=nnx.Rngs(0))
    size, channels = config["image_size"], config["num_channels"]
    noise = np.random.default_rng(0).standard_normal((options.batch, size, size, channels))
    images = jnp.asarray(np.load(options.image)[None] if options.image else noise, jnp.float32)
    forward = nnx.jit(lambda model, images: model(images))
    jax.block_until_ready(forward(model, images))
    start = time.perf_counter()
    out = jax.block_until_ready(forward(model, images))
    print(f"{len(images)} images in {time.perf_counter() - start:.3f} s: hidden states {out.shape}, class token {out[0, 0, :4]}")


if __name__ == "__main__":
    main()
