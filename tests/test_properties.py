"""What must hold for any call: key order, splitting keys, grouped heads, shifts, padding, and random shapes against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import forget_programs_when_many, make, on_jax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import band, check, lengths, same_segment

from jax_sdpa import dot_product_attention, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import Band, KeyLengths, SegmentIds, causal

few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
XLA = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return rng, tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@pytest.fixture(scope="module", params=XLA, ids=lambda backend: backend.name)
def attend(request):
    """(q, k, v, bool mask, bias) -> (out, lse) in JAX's layout, compiled once."""

    @jax.jit
    def f(q, k, v, mask, bias):
        return dot_product_attention(q, k, v, bias, mask, return_residual=True)

    def call(*args):
        with sdpa_kernel(request.param):
            return f(*args)

    return call


SHAPES = ((2, 9, 4, 8), (2, 140, 2, 8), (2, 140, 2, 5))


@few
@given(seeds)
def test_the_order_of_the_keys_means_nothing(attend, seed):
    rng, (q, k, v, bias) = draw(seed, *SHAPES, (2, 1, 9, 140))
    mask, order = jnp.asarray(rng.random((2, 4, 9, 140)) < 0.3), rng.permutation(140)
    wanted = attend(q, k, v, mask, bias)
    got = attend(q, k[:, order], v[:, order], mask[..., order], bias[..., order])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), got, wanted)


@few
@given(seeds, st.integers(0, 140))
def test_keys_split_anywhere_and_merged_by_lse(attend, seed, at):
    """One half or the other may hold no key at all: lse -inf weighs nothing."""
    rng, (q, k, v, bias) = draw(seed, *SHAPES, (2, 1, 9, 140))
    mask = jnp.asarray(rng.random((2, 1, 9, 140)) < 0.2)
    first = jnp.arange(140) < at
    wanted, lse = attend(q, k, v, mask, bias)
    (a, lse_a), (b, lse_b) = attend(q, k, v, mask & first, bias), attend(q, k, v, mask & ~first, bias)
    merged = np.logaddexp(lse_a, lse_b)

    def weigh(x, part):
        return np.where(np.isneginf(part), 0, np.exp(part - np.where(np.isneginf(merged), 0, merged)))[..., None] * x

    np.testing.assert_allclose(merged, lse, atol=5e-6)
    np.testing.assert_allclose(weigh(a, lse_a) + weigh(b, lse_b), wanted, atol=5e-6)


@few
@given(seeds)
def test_grouped_heads_are_repeated_heads(attend, seed):
    rng, (q, k, v, bias) = draw(seed, *SHAPES, (2, 4, 9, 140))
    mask = jnp.asarray(rng.random((2, 4, 9, 140)) < 0.5)
    got = attend(q, k, v, mask, bias)
    wanted = attend(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), mask, bias)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), got, wanted)


@few
@given(seeds, st.floats(-1000, 1000, width=32))
def test_a_constant_added_to_a_row_moves_only_lse(attend, seed, shift):
    rng, (q, k, v, bias) = draw(seed, *SHAPES, (2, 1, 9, 140))
    mask = jnp.asarray(rng.random((2, 1, 9, 140)) < 0.5)
    rows = jnp.asarray(rng.random((2, 1, 9, 1)) < 0.5) * jnp.float32(shift)
    (out, lse), (moved, moved_lse) = attend(q, k, v, mask, bias), attend(q, k, v, mask, bias + rows)
    tolerance = 1e-5 + 1e-6 * abs(shift)
    np.testing.assert_allclose(moved, out, atol=tolerance)
    np.testing.assert_allclose(moved_lse, lse + jnp.swapaxes(rows[..., 0], 1, 2), atol=tolerance)


@few
@given(seeds)
def test_outputs_are_averages_of_the_values(attend, seed):
    _, (q, k, v) = draw(seed, *SHAPES)
    out, _ = attend(q, k, v, jnp.ones((1, 1), bool), jnp.zeros((1, 1)))
    assert (out <= v.max(1)[:, None].repeat(2, 2) + 1e-6).all()
    assert (out >= v.min(1)[:, None].repeat(2, 2) - 1e-6).all()
    ones, _ = attend(q * 10, k, jnp.ones_like(v), jnp.ones((1, 1), bool), jnp.zeros((1, 1)))
    np.testing.assert_allclose(ones, 1, atol=2e-6)


@pytest.mark.parametrize("backend", XLA, ids=lambda backend: backend.name)
def test_padding_with_key_lengths_changes_nothing(backend):
    """A batch of ragged sequences is each sequence alone; so is a packed row of segments."""
    sizes = [1, 70, 130, 64]
    _, (q, k, v) = draw(0, (4, 2, 130, 8), (4, 2, 130, 8), (4, 2, 130, 8))
    stops = jnp.array(sizes)
    ids = jnp.asarray(np.repeat(np.arange(4), sizes))

    def pack(x):
        return jnp.concatenate([x[i, :, :n] for i, n in enumerate(sizes)], axis=1)

    with sdpa_kernel(backend):
        padded = scaled_dot_product_attention(q, k, v, KeyLengths(stops) & causal())
        packed = scaled_dot_product_attention(*map(pack, (q, k, v)), SegmentIds(ids) & causal())
        start = 0
        for i, n in enumerate(sizes):
            alone = scaled_dot_product_attention(q[i, :, :n], k[i, :, :n], v[i, :, :n], is_causal=True)
            np.testing.assert_allclose(padded[i, :, :n], alone, atol=5e-6)
            np.testing.assert_allclose(packed[:, start : start + n], alone, atol=5e-6)
            start += n


@st.composite
def calls(draw):
    """A random call in JAX's face with everything that it knows: sizes, heads, masks, bias, softcap, sinks, scale."""
    L, S, B = draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.integers(1, 2))
    H, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(seeds))
    keep, mask = np.ones((L, S), bool), Band()
    for kind in draw(st.lists(st.sampled_from(["band", "traced band", "lengths", "segments"]), max_size=2, unique=True)):
        if "band" in kind:
            left, right = draw(st.integers(-1, S)), draw(st.integers(-1, L))
            offset = draw(st.integers(-L, S)) if kind == "band" else rng.integers(-L, S, B)
            keep, mask = (
                keep & band(L, S, left, right, offset),
                mask & Band(left, right, offset if kind == "band" else jnp.asarray(offset)),
            )
        elif kind == "lengths":
            stops, starts = rng.integers(0, S + 1, B), rng.integers(0, S, B) // 2
            keep, mask = keep & lengths(L, S, stops, starts), mask & KeyLengths(jnp.asarray(stops), jnp.asarray(starts))
        else:
            ids = rng.integers(-1, 3, (B, L)), rng.integers(-1, 3, (B, S))
            keep, mask = keep & same_segment(*ids), mask & SegmentIds(*map(jnp.asarray, ids))
    bias = draw(st.sampled_from([None, (1, S), (L, 1), (B, 1, L, S), (H * group, 1, S)]))
    problem = make(
        L, S, B=B, Hq=H * group, Hk=H, E=draw(st.integers(1, 9)), Ev=draw(st.integers(1, 9)), dlse=True, keep=keep,
        bias=None if bias is None else rng.standard_normal(bias), softcap=draw(st.sampled_from([None, 1.5])),
        sinks=rng.standard_normal(H * group) if draw(st.booleans()) else None, scale=draw(st.sampled_from([None, -0.5, 2.0])),
    )  # fmt: skip
    return problem, mask


@pytest.mark.parametrize("backend", XLA, ids=lambda backend: backend.name)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(call=calls())
def test_random_calls_give_the_oracles_numbers(backend, call):
    problem, mask = call
    problem = problem.rounded(np.float32)
    check(problem, on_jax(problem, backend, mask=mask, face="jax"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", XLA, ids=lambda backend: backend.name)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(call=calls())
def test_many_random_calls(backend, call):
    forget_programs_when_many()  # 300 examples are some 300 programs times a hundred maps
    problem, mask = call
    problem = problem.rounded(np.float32)
    check(problem, on_jax(problem, backend, mask=mask, face="jax"))
