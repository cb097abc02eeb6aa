"""A small GPT, trained for a few hundred steps on text that this file makes: bfloat16, dropout, recomputed blocks, every backend.

    python -m jax_sdpa.examples.gpt --steps 300 --backends MATH EFFICIENT_ATTENTION --plot curves.png
    python -m jax_sdpa.examples.gpt --steps 300 --save /tmp/gpt          # an Orbax checkpoint, to be continued by --restore

Dropout draws the same bits in every backend, so that the curves differ by rounding alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.examples.decoder import Decoder, DecoderConfig, generate

FIRST_CHARACTER = 32  # printable ASCII
SMALL = DecoderConfig(
    vocab_size=96, features=128, hidden=256, layers=3, q_heads=4, kv_heads=2, qkv_bias=False, tied=True, dropout_rate=0.1,
    remat=True, dtype=jnp.bfloat16,
)  # fmt: skip


def text(seed: int, sentences: int) -> str:
    """Sentences about animals and sums: regular enough to learn in minutes, and with something to look up far back."""
    rng = np.random.default_rng(seed)
    names, colours = ["ada", "bela", "carl", "dora", "emil"], ["red", "green", "blue", "white"]
    animals, verbs = ["fox", "cat", "owl", "hen", "bee"], ["sees", "feeds", "counts", "finds"]
    out = []
    for _ in range(sentences):
        name, colour, animal, verb = (words[rng.integers(len(words))] for words in (names, colours, animals, verbs))
        a, b = rng.integers(0, 10, 2)
        out.append(f"{name} {verb} {a} {colour} {animal}s and {b} more, so {name} has {a + b} {animal}s.")
    return " ".join(out)


def encode(characters: str) -> np.ndarray:
    return np.frombuffer(characters.encode("ascii"), np.uint8).astype(np.int32) - FIRST_CHARACTER


def decode(tokens: Any) -> str:
    return (np.asarray(tokens) + FIRST_CHARACTER).astype(np.uint8).tobytes().decode("ascii")


def batches(seed: int, batch: int, length: int) -> Callable[[int], np.ndarray]:
    """step -> (batch, length + 1) tokens, the same for every run."""
    tokens = encode(text(seed, 3000))

    def at(step: int) -> np.ndarray:
        starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - length - 1, batch)
        return tokens[starts[:, None] + np.arange(length + 1)]

    return at


def make(
    config: DecoderConfig = SMALL, seed: int = 0, steps: int = 300, learning_rate: float = 3e-3
) -> tuple[Decoder, nnx.Optimizer]:
    """A model and its AdamW, with a warm-up and a cosine decay."""
    model = Decoder(config, rngs=nnx.Rngs(seed, dropout=seed + 1))
    return model, nnx.Optimizer(model, _transform(steps, learning_rate), wrt=nnx.Param)


@functools.cache  # one transform for equal settings is one program for `jit`
def _transform(steps: int, learning_rate: float) -> optax.GradientTransformation:
    warm = max(1, min(20, steps // 4))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm + 1), learning_rate / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def loss(model: Decoder, tokens: jax.Array, deterministic: bool = False) -> jax.Array:
    """Mean cross entropy of the next character, in nats."""
    logits = model(tokens[:, :-1], deterministic=deterministic)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def update(model: Decoder, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One step, in place; the loss before it."""
    value, gradients = nnx.value_and_grad(loss)(model, tokens)
    optimizer.update(model, gradients)
    return value


def train(
    model: Decoder,
    optimizer: nnx.Optimizer,
    steps: int,
    *,
    backend: SDPBackend | None = None,
    batch: int = 16,
    length: int = 128,
    first: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> np.ndarray:
    """Train in place; the loss of each step. backend: None = the choice of the device."""
    data, losses = batches(0, batch, length), []
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        for step in range(first, first + steps):
            losses.append(update(model, optimizer, jnp.asarray(data(step))))
            if report is not None:
                report(step, float(losses[-1]))
    return np.asarray(losses, np.float32)


def save(directory: Path, model: Decoder, optimizer: nnx.Optimizer) -> None:
    """Parameters, the optimizer's state and the dropout streams, by Orbax."""
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), _plain(model, optimizer), force=True)


def restore(directory: Path, model: Decoder, optimizer: nnx.Optimizer) -> None:
    """Put a saved state into a model and an optimizer of the same making."""
    import orbax.checkpoint

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(model, optimizer))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(directory.absolute(), like)
    for module, name in ((model, "model"), (optimizer, "optimizer")):
        state = nnx.state(module)
        leaves = [
            jax.random.wrap_key_data(new) if jnp.issubdtype(old.dtype, jax.dtypes.prng_key) else new
            for old, new in zip(jax.tree.leaves(state), found[name], strict=True)
        ]
        nnx.update(module, jax.tree.unflatten(jax.tree.structure(state), leaves))


def _plain(model: Decoder, optimizer: nnx.Optimizer) -> dict[str, list[jax.Array]]:
    """Every array of the two, keys as their words."""

    def words(x: jax.Array) -> jax.Array:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return {name: [words(x) for x in jax.tree.leaves(nnx.state(m))] for name, m in (("model", model), ("optimizer", optimizer))}


def plot(curves: dict[str, np.ndarray], path: Path) -> None:
    """The curves over one another, smoothed over 10 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        width = min(10, len(curve))
        axes.plot(np.convolve(curve, np.ones(width) / width, "valid"), label=name)
    axes.set(xlabel="step", ylabel="loss (nats a character)")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=SMALL.layers)
    names = [backend.name for backend in SDPBackend if backend.value >= 0 and backend is not SDPBackend.OVERRIDEABLE]
    parser.add_argument("--backends", nargs="*", choices=names, default=[], help="train once through each; default: our own choice")
    parser.add_argument("--plot", type=Path, help="write the curves to this file")
    parser.add_argument("--save", type=Path, help="write an Orbax checkpoint of the last run to this directory")
    parser.add_argument("--restore", type=Path, help="begin with this checkpoint")
    options = parser.parse_args(arguments)

    def report(name: str, step: int, value: float) -> None:
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            print(f"{name:>20}  step {step:4}  loss {value:.4f}", flush=True)

    curves, model = {}, None
    for name in options.backends or ["default"]:
        model, optimizer = make(dataclasses.replace(SMALL, layers=options.layers), steps=options.steps)
        if options.restore:
            restore(options.restore, model, optimizer)
        backend = SDPBackend[name] if options.backends else None
        start, first = time.perf_counter(), int(optimizer.step[...])
        curves[name] = train(
            model, optimizer, options.steps, backend=backend, batch=options.batch, length=options.length, first=first,
            report=functools.partial(report, name),
        )  # fmt: skip
        print(f"{name:>20}  {options.steps} steps in {time.perf_counter() - start:.1f} s")
        if options.save:
            save(options.save, model, optimizer)
    if options.plot:
        plot(curves, options.plot)
    if model is not None:
        prompt = "ada feeds 4 red owls and 3 more, so"
        print(prompt + decode(generate(model, jnp.asarray(encode(prompt))[None], 24)[0]))


if __name__ == "__main__":
    main()
