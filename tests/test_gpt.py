"""The small GPT: it learns, it goes on from a checkpoint, and every backend gives its curve to rounding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sdpa.attention import SDPBackend
from jax_sdpa.examples import gpt
from jax_sdpa.nn import layer

STEPS, BATCH, LENGTH = 200, 8, 64


def run(backend, steps=STEPS):
    model, optimizer = gpt.make(steps=steps)
    return gpt.train(model, optimizer, steps, backend=backend, batch=BATCH, length=LENGTH)


@pytest.fixture
def rounded_otherwise(monkeypatch):
    """A function (seed) after which attention rounds to bfloat16 up or down at random, each with the chance of its nearness."""
    exact = layer.dot_product_attention

    def patch(seed):
        def stochastic(q, k, v, **options):
            out = exact(*(x.astype(jnp.float32) for x in (q, k, v)), **options)
            bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(out), jnp.uint32)
            key = jax.random.fold_in(
                jax.random.key(seed), jnp.bitwise_xor.reduce(bits, axis=None)
            )  # another in each layer and step
            bits = (bits + (jax.random.bits(key, bits.shape, jnp.uint32) >> 16)) & np.uint32(0xFFFF0000)
            rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
            return (out + jax.lax.stop_gradient(rounded - out)).astype(q.dtype)

        monkeypatch.setattr(layer, "dot_product_attention", stochastic)
        jax.clear_caches()  # recomputed blocks are traced once and for all

    yield patch
    monkeypatch.undo()
    jax.clear_caches()


def smooth(curve):
    return np.convolve(curve, np.ones(10) / 10, "valid")


def distance(a, b):
    return np.abs(smooth(a) - smooth(b)).max()


def hold_to_the_spread(backends, rounded_otherwise):
    """Each backend's curve within twice the spread of MATH's own runs whose rounding was perturbed."""
    math = run(SDPBackend.MATH)
    assert math[-10:].mean() < 0.25 * math[0]
    curves = {backend: run(backend) for backend in backends}
    spread = 0.0
    for seed in range(3):
        rounded_otherwise(seed)
        spread = max(spread, distance(run(SDPBackend.MATH), math))
    assert 0 < spread < 0.1  # wide enough to be a measure, narrow enough to say something
    for backend, curve in curves.items():
        assert distance(curve, math) <= 2 * spread, (backend.name, distance(curve, math), spread)


@pytest.mark.slow
def test_the_same_curve_through_every_backend(rounded_otherwise):
    hold_to_the_spread([SDPBackend.EFFICIENT_ATTENTION], rounded_otherwise)


@pytest.mark.gpu
def test_the_same_curve_through_flash(rounded_otherwise):
    hold_to_the_spread([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], rounded_otherwise)


TINY = dataclasses.replace(gpt.SMALL, features=32, hidden=64, layers=1, q_heads=2, kv_heads=1)


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint(tmp_path):
    """Six steps, and three, saved, restored into another model, and three: the same losses, the same dropout."""
    train = functools.partial(gpt.train, batch=4, length=16)
    whole = train(*gpt.make(TINY, steps=6), 6)
    model, optimizer = gpt.make(TINY, steps=6)
    half = train(model, optimizer, 3)
    gpt.save(tmp_path / "three", model, optimizer)
    other = gpt.make(TINY, seed=9, steps=6)
    gpt.restore(tmp_path / "three", *other)
    np.testing.assert_array_equal(np.concatenate([half, train(*other, 3, first=3)]), whole)


def test_dropout_and_recomputation_do_what_they_say():
    model, _ = gpt.make(TINY)
    tokens = jnp.asarray(gpt.batches(0, 4, 16)(0))
    loss = nnx.jit(gpt.loss, static_argnames="deterministic")
    plain, again = (loss(model, tokens, deterministic=True) for _ in range(2))
    dropped = [loss(model, tokens, deterministic=False) for _ in range(2)]
    assert len({float(plain), float(again), *map(float, dropped)}) == 3
    assert plain == again
    kept, _ = gpt.make(dataclasses.replace(TINY, remat=False))
    both = nnx.jit(nnx.value_and_grad(gpt.loss))
    gradients = [both(m, tokens) for m in (gpt.make(TINY)[0], kept)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), *gradients)  # bfloat16, fused differently


def test_the_text_is_ours_and_the_same_each_time():
    assert gpt.text(0, 2) == gpt.text(0, 2) != gpt.text(1, 2)
    assert gpt.decode(gpt.encode(gpt.text(0, 5))) == gpt.text(0, 5)
    assert gpt.encode(gpt.text(0, 100)).max() < gpt.SMALL.vocab_size


@pytest.mark.slow
def test_it_runs_as_a_module(tmp_path, capsys):
    arguments = ["--steps", "2", "--batch", "2", "--length", "16", "--layers", "1", "--backends", "MATH"]
    gpt.main([*arguments, "--plot", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "MATH  step    1  loss" in printed
    assert "ada feeds 4 red owls" in printed
