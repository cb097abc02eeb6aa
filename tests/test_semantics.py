"""Every backend gives the oracle's numbers: outputs, lse and all gradients, for every mask kind and around every block size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, in_half
from harness import dropped, make, on_jax
from oracle import band, check, lengths, on_torch, same_segment, solve

from jax_sdpa.attention.bias import KeyLengths, SegmentIds, causal_lower_right, sliding_window


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, backend):
    problem, mask, options = CASES[name]()
    problem = problem.rounded(np.float32)
    check(problem, on_jax(problem, backend, mask=mask, **options))


SOME = [
    "causal 9x7", "window 17,4 with offsets", "segments packed & causal", "everything, torch's face", "everything, JAX's face",
    "bias (L, S), -inf rows", "sinks with empty rows",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [*SOME[3:5], SOME[6], *(pytest.param(name, marks=pytest.mark.slow) for name in (*SOME[:3], SOME[5]))]
)
def test_float64_is_float64_throughout(name, backend):
    problem, mask, options = CASES[name]()
    with jax.enable_x64(True):
        got = on_jax(problem, backend, mask=mask, **options)
    assert all(x.dtype == np.float64 for what, x in got.items() if what != "bias")  # one case has a float32 bias
    check(problem, got)


HALF = [(SOME[0], "bfloat16"), (SOME[4], "bfloat16"), (SOME[6], "bfloat16"), (SOME[0], "float16")]
MORE_HALF = [*((SOME[i], "bfloat16") for i in (1, 2, 3, 5)), (SOME[4], "float16")]


@pytest.mark.parametrize(("name", "dtype"), [*HALF, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_HALF)])
def test_half_precision_accumulates_in_float32(name, dtype, backend):
    problem, mask, options = in_half(name, dtype)
    got = on_jax(problem, backend, mask=mask, **options)
    assert all(got[what].dtype == dtype for what in ("out", "query", "key", "value"))
    assert all(got[what].dtype == np.float32 for what in ("lse", "bias", "sinks", "scale") if what in got)
    check(problem, got)


MASKS_FOR_DROPOUT = {
    "plain": (None, None),
    "causal": (band(140, 270, -1, 0, 130), causal_lower_right(140, 270)),
    "window and lengths": (
        band(140, 270, 50, 0, 100) & lengths(140, 270, [200, 0]), sliding_window(50, 0, 100) & KeyLengths(jnp.array([200, 0]))
    ),
    "segments": (
        same_segment(np.arange(140) // 50, np.arange(270) // 60), SegmentIds(jnp.arange(140) // 50, jnp.arange(270) // 60)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "p"), [*((name, 0.3) for name in MASKS_FOR_DROPOUT), ("window and lengths", 1.0)])
def test_dropout_acts_on_the_normalised_probabilities(name, p, backend):
    """Against the oracle with the same mask injected; lse and the softmax know nothing of it, nothing is renormalised."""
    keep, mask = MASKS_FOR_DROPOUT[name]
    key = jax.random.key(3)
    problem = make(140, 270, Hq=4, Hk=2, keep=keep, survivors=dropped(key, 2, 4, 140, 270, p)).rounded(np.float32)
    got = on_jax(problem, backend, mask=mask, dropout_p=p, dropout_rng=key)
    check(problem, got)
    if p == 1.0:
        assert not any(x.any() for x in got.values())


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_worse_than_torch_at_the_same_dtype(dtype, backend):
    """The honest implementation here is torch MATH itself; every result of both is measured against the exact answer."""
    keep = np.random.default_rng(0).random((2, 1, 33, 70)) < 0.6
    keep[:, :, 4] = False
    problem = make(33, 70, B=2, Hq=4, keep=keep).rounded(dtype)
    theirs, ours, exact = on_torch(problem, dtype), on_jax(problem, backend), solve(problem)
    for what in theirs:
        size = np.abs(exact[what]).max()
        error, torchs = (np.abs(x[what].astype(np.float64) - exact[what]).max() for x in (ours, theirs))
        assert error <= 3 * torchs + 4 * np.finfo(np.float32).eps * size, what


@pytest.mark.torch
def test_half_gradients_of_math_are_those_of_float32_rounded_once():
    """torch's MATH is 'all float32, then one rounding' bit for bit; ours may differ by the order of a sum."""
    from jax_sdpa.attention import SDPBackend

    problem = make(33, 70).rounded("bfloat16")
    got = on_jax(problem, SDPBackend.MATH)
    whole = on_jax(problem.rounded(np.float32), SDPBackend.MATH)
    theirs = on_torch(problem, "bfloat16")
    for what, x in got.items():
        one_ulp = np.abs(whole[what]) * 2.0**-7 + 1e-6
        assert (np.abs(x.astype(np.float32) - whole[what]) <= one_ulp).all(), what
        assert (np.abs(x.astype(np.float32) - theirs[what]) <= one_ulp).all(), what
        assert (x.astype(np.float64) == theirs[what]).mean() > 0.95, what
