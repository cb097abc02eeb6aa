"""Ordinary inputs that other JAX attention libraries refuse or answer wrongly: jax_sdpa answers each, on every backend.

The cases are those of a survey of jax.nn, Flax, tokamax, ejkernel, flash_attn_jax and TransformerEngine, run against a float64
oracle, of which torch passed all. One test for each of its ten findings, with the finding as docstring.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make, on_jax
from oracle import assert_as_good, band, check, solve

from jax_sdpa import dot_product_attention, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, causal

rng = np.random.default_rng(0)
EMPTY = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], bool)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def run(problem, backend, **options):
    """Under jit, checked against the oracle: outputs and every gradient."""
    got = on_jax(problem, backend, **options)
    check(problem, got)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_1_fully_masked_rows(dtype, backend):
    """jax.nn, nnx, linen, tokamax, ejkernel: the mean of the values and a leak into dV; NaN for a -inf row of a bias, and all of
    dK and dV with it; key_value_seq_lengths = 0 gives the mean."""
    with jax.enable_x64(dtype == "float64"):
        by_bool = run(make(4, 6, keep=EMPTY).rounded(dtype), backend)
        by_bias = run(make(4, 6, bias=np.where(EMPTY, 0.5, -np.inf).astype(dtype)).rounded(dtype), backend)
        for got in (by_bool, by_bias):
            assert not got["out"][:, :, 1].any()
            assert not got["query"][:, :, 1].any()
        problem = make(4, 6, keep=np.arange(6) < np.array([0, 4])[:, None, None, None]).rounded(dtype)

        def swap(x):
            return jnp.asarray(np.swapaxes(x, 1, 2))

        with sdpa_kernel(backend):
            call = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, key_value_seq_lengths=jnp.array([0, 4])))
            out, pullback = jax.vjp(call, *map(swap, (problem.query, problem.key, problem.value)))
            gradients = pullback(swap(problem.dout))
    assert not out[0].any()
    assert not any(x[0].any() for x in gradients)
    assert out[1].any()


def test_2_float64(backend):
    """jax.nn, nnx: float64 in name, 1e-7 in error (a float32 softmax); ejkernel 2e-7."""
    with jax.enable_x64(True):
        got = run(make(33, 70, keep=band(33, 70, -1, 0), dlse=True), backend, face="jax")
    exact = solve(make(33, 70, keep=band(33, 70, -1, 0), dlse=True))
    assert got["out"].dtype == np.float64
    assert np.abs(got["out"] - exact["out"]).max() < 1e-14


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_3_half_precision_on_the_cpu_under_jit(dtype, backend):
    """jax.nn, nnx, tokamax: 'F16_F16_F32 is not supported by dot_general on CPU'; bfloat16 with 10 times torch's error (jax.nn's PV
    has no float32 accumulator), causal dV 9e-2."""
    problem = make(64, 64, B=1, E=64, keep=band(64, 64, -1, 0)).rounded(dtype)
    got = run(problem, backend)
    exact = solve(problem)
    ulp = float(jnp.finfo(dtype).eps)
    for name in ("out", "value"):
        assert np.abs(got[name].astype(np.float64) - exact[name]).max() <= ulp * np.abs(exact[name]).max()


def test_4_one_formula_with_and_without_dropout(backend):
    """nnx: with dropout or sown weights another formula runs, whose is_causal raises with a (B, 1, 1, S) mask and whose softmax is
    in bfloat16; a 5-D batch with a (b, 1, 1, T, S) mask fails."""
    q, k = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 2, 9, 8), (2, 2, 9, 8)))
    padding = jnp.asarray(np.arange(9) < np.array([9, 4])[:, None])[:, None, None]
    with sdpa_kernel(backend):

        def call(p):
            return scaled_dot_product_attention(q, k, k, causal() & padding, dropout_p=p, dropout_rng=jax.random.key(0))

        plain, dropped = call(0.0), call(2.0**-30)  # drops nothing here
        np.testing.assert_array_equal(plain, dropped)
        assert call(0.5).shape == plain.shape
        q5, mask5 = jnp.ones((2, 3, 4, 5, 8)), jnp.ones((2, 1, 1, 5, 5), bool)
        assert scaled_dot_product_attention(q5, q5, q5, mask5).shape == q5.shape
        swapped = jnp.ones((2, 3, 5, 4, 8))
        assert dot_product_attention(swapped, swapped, swapped, mask=mask5, is_causal=True).shape == swapped.shape


def test_5_additive_masks_are_never_inverted(backend):
    """nnx, linen, tokamax take a 0/-inf float for a bool, so that it means the opposite; jax.nn raises. Here it adds where masks
    may be floats, and is refused where they may not."""
    problem = make(4, 6, bias=np.where(band(4, 6, -1, 0), 0, -np.inf).astype(np.float32)).rounded(np.float32)
    run(problem, backend)

    def swap(x):
        return jnp.asarray(np.swapaxes(x, 1, 2))

    with pytest.raises(TypeError, match="an additive one goes to bias"):
        dot_product_attention(*map(swap, (problem.query, problem.key, problem.value)), mask=jnp.asarray(problem.bias))
    with pytest.raises(TypeError, match=r"attn_mask\.astype\(bool\)"):
        scaled_dot_product_attention(problem.query, problem.key, problem.value, np.ones((4, 6), np.int32))


def test_6_shapes_and_scales(backend):
    """Ev != E: jax.nn, nnx refuse; 5-D: jax.nn; a 2-D bias: tokamax; a traced scale: tokamax, ejkernel; mixed dtypes: tokamax
    returns bfloat16 silently."""
    run(make(4, 6, Ev=3).rounded(np.float32), backend)
    run(make(4, 6, B=(2, 3), Ev=16).rounded(np.float32), backend, face="jax")
    run(make(4, 6, bias=rng.standard_normal((4, 6))).rounded(np.float32), backend)
    run(make(4, 6, scale=np.array(0.4)).rounded(np.float32), backend)
    half, single = jnp.ones((1, 1, 4, 8), jnp.bfloat16), jnp.ones((1, 1, 4, 8))
    with pytest.raises(TypeError, match="the same dtype"):
        scaled_dot_product_attention(half, single, single)


@pytest.mark.parametrize("sizes", [(4, 0), (0, 6), (0, 0)], ids=str)
def test_7_empty_inputs(sizes, backend):
    """S = 0: tokamax raises or gives NaN, ejkernel raises; L = 0: an assertion in tokamax. torch: zeros."""
    L, S = sizes
    q, k = jnp.ones((2, 3, L, 8)), jnp.ones((2, 3, S, 8))
    with sdpa_kernel(backend):
        value, gradients = jax.jit(
            jax.value_and_grad(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (0, 1, 2))
        )(q, k, k)
    assert value == 0
    assert not any(x.any() for x in gradients)


def test_8_query_lengths_mean_the_same_whatever_runs():
    """jax.nn zeroes the rows behind a query length, tokamax's XLA path does not."""
    q, k = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 9, 2, 8), (2, 12, 2, 8)))
    results = []
    for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            results.append(
                dot_product_attention(q, k, k, query_seq_lengths=jnp.array([9, 4]), key_value_seq_lengths=jnp.array([12, 5]))
            )
        assert not results[-1][1, 4:].any()
        assert results[-1][1, :4].all()
    np.testing.assert_allclose(*results, atol=2e-6)
    with jax.default_matmul_precision("highest"):
        theirs = jax.nn.dot_product_attention(
            q, k, k, query_seq_lengths=jnp.array([9, 4]), key_value_seq_lengths=jnp.array([12, 5])
        )
    np.testing.assert_allclose(results[0], theirs, atol=2e-6)


def test_9_gradients_of_bias_and_sinks_are_not_zero(backend):
    """ejkernel: both 0, where finite differences say -3 to -30. (jax-flash-attn2 drops masks by reading; flash_attn_jax, kvax and TE
    do not import or run without a GPU: nothing of theirs to compare with here.)"""
    problem = make(9, 12, bias=rng.standard_normal((2, 9, 12)), sinks=rng.standard_normal(2), dlse=True).rounded(np.float32)
    got = run(problem, backend, face="jax")
    assert np.abs(got["bias"]).max() > 0.1
    assert np.abs(got["sinks"]).max() > 0.1
    h, at = 1e-6, problem.but(sinks=problem.sinks.astype(np.longdouble))

    def loss(p):
        return sum((solve(p)[name] * cotangent).sum() for name, cotangent in (("out", p.dout), ("lse", p.dlse)))

    for i in range(2):
        step = h * (np.arange(2) == i)
        numeric = (loss(at.but(sinks=at.sinks + step)) - loss(at.but(sinks=at.sinks - step))) / (2 * h)
        assert_as_good(np.float32(got["sinks"][i]), np.asarray(numeric), np.asarray(numeric), "sinks", size=20)


def test_10_the_choice_knows_about_the_backward():
    """tokamax chooses on the forward and raises in the VJP; TE's legacy mask keeps lengths alone; jax.nn with cuDNN ignores the
    cotangent of the residual. Here the choice is made for the gradient asked for, a mask keeps its whole pattern, and lse has its
    gradient or the backend is refused with the reason."""
    q, bias = jax.ShapeDtypeStruct((2, 2, 128, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 128, 128), jnp.bfloat16)
    for device in ("cpu", "cuda:sm75", "cuda:sm80", "cuda:sm90:cudnn91600"):
        for options in ({}, {"attn_mask": bias}, {"attn_mask": KeyLengths(jax.ShapeDtypeStruct((2,), jnp.int32)) & causal()}):
            choice = explain(q, q, q, device=device, grad=True, **options)
            assert choice.backend is not None
            assert choice.backend not in choice.rejected
    swapped = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
    choice = explain(
        swapped, swapped, swapped, call=dot_product_attention, return_residual=True, grad=True, device="cuda:sm90:cudnn91600"
    )
    assert any("lse" in reason for reason in choice.rejected[SDPBackend.CUDNN_ATTENTION]), choice
    holes = np.ones((2, 1, 1, 70), bool)
    holes[0, ..., [3, 5, 40]] = False  # no suffix: lengths could not say it
    for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION):
        run(make(9, 70, keep=holes).rounded(np.float32), backend)
