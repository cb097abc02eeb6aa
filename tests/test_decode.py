"""Decode steps and chunks on a cache: every combination against the oracle, NaN in what is hidden, one program for all lengths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import _program, make, on_jax
from oracle import band, check, lengths

from jax_sdpa import dot_product_attention, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import Band, KeyLengths, SegmentIds
from jax_sdpa.implementations import plans

MATH, EFFICIENT = SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION
B, S = 3, 61  # a length that no block divides


@pytest.fixture(params=["in place", "blocks"])
def way(request, monkeypatch):
    """EFFICIENT's two ways of a decode step, on keys as few as these: in place where most are visited, else in blocks of 16."""
    monkeypatch.setattr(plans, "IN_PLACE_KEYS", 0 if request.param == "in place" else 2**60)
    monkeypatch.setattr(plans, "FEW_ROWS_BLOCK", 16)
    _program.cache_clear()
    jax.clear_caches()  # the plan is no part of jit's key
    yield request.param
    _program.cache_clear()
    jax.clear_caches()


def on_cache(kind, L):
    """(mask, picture) of L queries that end a sequence of each length, in a cache of S slots."""
    stops = np.array([S, max(L, 40), L])
    offset = stops - L
    if kind == "lengths":  # the queries are the last tokens
        return Band(-1, 0, jnp.asarray(offset)) & KeyLengths(jnp.asarray(stops)), band(L, S, -1, 0, offset) & lengths(L, S, stops)
    if kind == "left padding":
        starts = np.array([7, 0, L])  # the last sequence has no key at all
        mask = Band(-1, 0, jnp.asarray(offset)) & KeyLengths(jnp.asarray(stops), jnp.asarray(starts))
        return mask, band(L, S, -1, 0, offset) & lengths(L, S, stops, starts)
    if kind == "window":
        mask = Band(9, 0, jnp.asarray(offset)) & KeyLengths(jnp.asarray(stops))
        return mask, band(L, S, 9, 0, offset) & lengths(L, S, stops)
    slots = np.minimum(np.array([200, S, 5]), S)  # a ring, in whatever order, of tokens that all of the queries see
    return KeyLengths(jnp.asarray(slots)), lengths(L, S, slots)


KINDS = ("lengths", "left padding", "window", "ring")
ALL = list(itertools.product(KINDS, (1, 2, 7, 16), (1, 4), (None, 2.0), (False, True)))
SOME = [
    ("lengths", 1, 4, None, False), ("left padding", 1, 4, 2.0, True), ("window", 1, 1, None, True), ("ring", 1, 4, None, False),
    ("lengths", 16, 1, 2.0, False), ("left padding", 7, 1, None, False), ("window", 2, 4, 2.0, True),
]  # fmt: skip


def _hold(backend, kind, L, group, softcap, sinks):
    mask, picture = on_cache(kind, L)
    sink = np.linspace(-2, 2, 2 * group) if sinks else None
    problem = make(L, S, B=B, Hq=2 * group, Hk=2, E=64, Ev=64, keep=picture, softcap=softcap, sinks=sink).rounded(np.float32)
    check(problem, on_jax(problem, backend, mask=mask, face="jax", wrt=()))
    if softcap is None and not sinks:  # torch's face has the layout that is read in place
        check(problem, on_jax(problem, backend, mask=mask, wrt=()))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_some_combinations(case, way):
    _hold(EFFICIENT, *case)


@pytest.mark.parametrize("case", SOME[:4], ids=str)
def test_the_same_by_math(case):
    _hold(MATH, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_combination(case, way):
    _hold(EFFICIENT, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_combination_by_math(case):
    _hold(MATH, *case)


@pytest.mark.parametrize("kind", ["lengths", "left padding"])
@pytest.mark.parametrize("share", ["most keys", "few keys"])
def test_hidden_keys_and_values_may_be_nan_or_infinite(kind, share, way):
    """Whether the step goes in place, which reads what is hidden too, or by blocks: it never reaches the result."""
    stops = np.array([60, 45, 50]) if share == "most keys" else np.array([20, 3, 0])
    starts = np.array([4, 0, 17]) // (1 if share == "most keys" else 5) if kind == "left padding" else None
    problem = make(1, S, B=B, Hq=8, Hk=2, E=64, keep=lengths(1, S, stops, starts)).rounded(np.float32)
    poisoned = {name: getattr(problem, name).copy() for name in ("key", "value")}
    seen = lengths(1, S, stops, starts)[:, 0, 0]
    for b in range(B):
        poisoned["key"][b, :, ~seen[b]], poisoned["value"][b, :, ~seen[b]] = np.nan, (np.inf if b == 1 else np.nan)
    mask = KeyLengths(jnp.asarray(stops), None if starts is None else jnp.asarray(starts))
    check(problem, on_jax(problem.but(**poisoned), EFFICIENT, mask=mask, wrt=()))


def test_keys_that_a_window_leaves_behind_may_be_nan(way):
    mask, picture = on_cache("window", 2)
    problem = make(2, S, B=B, Hq=2, Hk=2, E=64, keep=picture).rounded(np.float32)
    poisoned = {name: getattr(problem, name).copy() for name in ("key", "value")}
    for b, seen in enumerate(picture.any(-2)[:, 0]):
        for x in poisoned.values():
            x[b, :, ~seen] = np.nan
    check(problem, on_jax(problem.but(**poisoned), EFFICIENT, mask=mask, wrt=()))


def test_a_nan_that_is_seen_stays_one(way):
    problem = make(1, S, E=64).rounded(np.float32)
    problem.value[0, 1, 3, 5] = np.nan
    out = on_jax(problem, EFFICIENT, mask=KeyLengths(jnp.array([S, S])), wrt=())["out"]
    np.testing.assert_array_equal(np.argwhere(np.isnan(out)), [[0, 1, 0, 5]])


def test_lengths_starts_offsets_and_segments_are_numbers_of_one_program(backend):
    """One trace and one compiled program of each face serve all values, the gradient's too; and the results do change."""
    rng, traces = np.random.default_rng(0), []
    q, k = (jnp.asarray(rng.standard_normal((2, 4, n, 8)), jnp.float32) for n in (4, 16))

    def mask(values):
        stops, starts, offset, ids = values
        return KeyLengths(stops, starts) & Band(5, 0, offset) & SegmentIds(ids[:, :4], ids)

    @jax.jit
    def torch_face(q, k, values):
        traces.append("torch")
        return scaled_dot_product_attention(q, k, k, mask(values))

    @jax.jit
    def jax_face(q, k, values):
        traces.append("jax")
        x, y = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
        return dot_product_attention(x, y, y, mask=mask(values), key_value_seq_lengths=values[0], query_seq_lengths=values[2])

    @jax.jit
    def gradient(q, k, values):
        traces.append("gradient")
        return jax.grad(lambda q: scaled_dot_product_attention(q, k, k, mask(values)).sum())(q)

    results = []
    with sdpa_kernel(backend):
        for stops, starts, offset in (([16, 9], [0, 1], [4, 5]), ([3, 12], [1, 0], [1, 8]), ([7, 8], [2, 2], [3, 4])):
            values = *(jnp.asarray(x) for x in (stops, starts, offset)), jnp.asarray(rng.integers(0, 2, (2, 16)))
            results.append([np.asarray(f(q, k, values)) for f in (torch_face, jax_face, gradient)])
    assert sorted(traces) == ["gradient", "jax", "torch"]
    assert [f._cache_size() for f in (torch_face, jax_face, gradient)] == [1, 1, 1]
    for a, b in ((0, 1), (1, 2)):
        assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(results[a], results[b], strict=True))
