"""Two hundred steps of a decoder that is nothing but attention: a loss that tells a gradient that is 1 % too large.

Pairs of symbols, and at the end one of the first symbols again: the answer is the symbol that followed it. Two layers of attention on
fixed embeddings learn that, by plain gradient descent on one batch (Adam would hide an error of scale, sampling would drown it).
Everything but attention is float32; attention is in bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sdpa import scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.implementations.efficient import Efficient
from jax_sdpa.implementations.flash import Flash

STEPS, RATE, BATCH, PAIRS, SYMBOLS, FEATURES, HEADS = 200, 0.03, 64, 20, 32, 64, 2
MATH, EFFICIENT, FLASH = SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION


def problem():
    """(embeddings of the tokens (B, L, features), the symbol asked for (B,))."""
    rng = np.random.default_rng(0)
    first = np.stack([rng.permutation(SYMBOLS)[:PAIRS] for _ in range(BATCH)])
    second = rng.integers(0, SYMBOLS, (BATCH, PAIRS))
    asked = rng.integers(0, PAIRS, BATCH)
    rows = np.arange(BATCH)
    table = rng.standard_normal((2 * SYMBOLS, FEATURES)) / np.sqrt(FEATURES)
    # a pair is one token, which bears both: recall is one step of attention
    pairs = table[first] + table[SYMBOLS + second]
    last = table[first[rows, asked]][:, None]
    tokens = np.concatenate([pairs, last], 1)
    return jnp.asarray(tokens, jnp.float32), jnp.asarray(second[rows, asked]), jnp.asarray(table[SYMBOLS:], jnp.float32)


def weights():
    keys = jax.random.split(jax.random.key(0), 6)
    return [jax.random.normal(key, (FEATURES, FEATURES)) / 8 for key in keys]


def loss(weights, tokens, answers, table, noise):
    """noise: None, or a key: every rounding to bfloat16 then goes up or down at random, each with the chance of its nearness."""
    x = tokens
    for layer in range(2):
        q, k, v = (jnp.swapaxes((x @ w).reshape(*x.shape[:2], HEADS, -1), 1, 2) for w in weights[3 * layer : 3 * layer + 3])
        keys = [None] * 3 if noise is None else jax.random.split(jax.random.fold_in(noise, layer), 3)
        q, k, v = (rounded(4 * x, key) for x, key in zip((q, k, v), keys, strict=True))
        out = scaled_dot_product_attention(q, k, v, is_causal=True).astype(jnp.float32)
        x = x + jnp.swapaxes(out, 1, 2).reshape(x.shape)
    scores = x[:, -1] @ table.T
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), answers[:, None], 1).mean()


def rounded(x, noise):
    if noise is None:
        return x.astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint32)
    bits = (bits + (jax.random.bits(noise, bits.shape, jnp.uint32) >> 16)) & np.uint32(0xFFFF0000)
    other = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return (x + jax.lax.stop_gradient(other - x)).astype(jnp.bfloat16)


def curve(backend, seed=None):
    """(STEPS,) losses."""
    data = problem()

    def step(weights, n):
        noise = None if seed is None else jax.random.fold_in(jax.random.key(seed), n)
        value, gradient = jax.value_and_grad(loss)(weights, *data, noise)
        return [w - RATE * g for w, g in zip(weights, gradient, strict=True)], value

    with sdpa_kernel(backend):
        return np.asarray(jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(STEPS))[1])(weights()))


SEEDS, NEAR = 4, 10


@functools.cache
def measure():
    """MATH's curve, and at each step the largest distance from it of MATH's own runs with perturbed rounding, near that step."""
    plain = curve(MATH)
    distance = np.max([np.abs(curve(MATH, seed) - plain) for seed in range(SEEDS)], axis=0)
    spread = np.array([distance[max(0, n - NEAR) : n + NEAR + 1].max() for n in range(STEPS)])
    assert plain[-1] < 0.05 * plain[0]  # it learns
    assert 0 < spread.max() < 0.01
    return plain, spread


def stays(backend):
    """Whether the loss is at every step within twice the spread."""
    plain, spread = measure()
    return bool((np.abs(curve(backend) - plain) <= 2 * spread).all())


@pytest.fixture
def planted(monkeypatch):
    """A function (implementation, operand): its gradient is 1 % too large from then on."""

    def plant(implementation, name):
        honest = implementation.backward

        def backward(self, request, out, lse, dout, dlse, wrt):
            found = honest(self, request, out, lse, dout, dlse, wrt)
            return {one: (1.01 * x).astype(x.dtype) if one == name else x for one, x in found.items()}

        monkeypatch.setattr(implementation, "backward", backward)
        jax.clear_caches()

    yield plant
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("operand", ["query", "key", "value"])
@pytest.mark.parametrize(
    ("backend", "implementation"),
    [
        pytest.param(EFFICIENT, Efficient, marks=pytest.mark.slow, id="efficient"),
        pytest.param(FLASH, Flash, marks=pytest.mark.gpu, id="flash"),
    ],
)
def test_the_loss_stays_in_the_spread_and_with_a_planted_error_it_does_not(backend, implementation, operand, planted):
    if operand == "query":
        assert stays(backend)
    planted(implementation, operand)
    assert not stays(backend)
