"""`dot_product_attention`: jax.nn's convention where the two agree, the contract where they do not, and what jax.nn lacks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make, on_jax
from oracle import band, solve

from jax_sdpa import dot_product_attention, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, causal, sliding_window

rng = np.random.default_rng(0)
B, L, S, N, K, H = 2, 9, 12, 4, 2, 8


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


QUERY, KEY, VALUE = normal(B, L, N, H), normal(B, S, K, H), normal(B, S, K, H)
BIAS, MASK = normal(1, N, L, S), jnp.asarray(rng.random((B, 1, L, S)) < 0.7).at[..., 0].set(True)

AGREE = {
    "plain": {},
    "bias": {"bias": BIAS},
    "bias per key": {"bias": normal(B, 1, 1, S)},
    "mask": {"mask": MASK},
    "mask and bias": {"mask": MASK, "bias": BIAS},
    "causal": {"is_causal": True},
    "causal and mask": {"is_causal": True, "mask": MASK},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": (3, 5)},
    "window, one int": {"local_window_size": 4},
    "window and causal": {"local_window_size": (3, 5), "is_causal": True},
    "key lengths": {"key_value_seq_lengths": jnp.array([12, 3])},
    "query lengths": {"query_seq_lengths": jnp.array([9, 4])},
    "both lengths": {"query_seq_lengths": jnp.array([5, 9]), "key_value_seq_lengths": jnp.array([2, 12])},
    "all of it": {
        "bias": BIAS, "mask": MASK, "is_causal": True, "scale": 0.5, "local_window_size": (8, 2),
        "query_seq_lengths": jnp.array([9, 4]), "key_value_seq_lengths": jnp.array([9, 12]),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AGREE)
def test_as_jax_nn_where_both_are_defined(name, backend):
    """Values, and gradients of q, k, v and bias, in float32, grouped heads. No row here is empty but by query lengths: 0 in both."""
    options = AGREE[name]

    def both(attend):
        def loss(q, k, v, bias):
            out = attend(q, k, v, bias=bias, **{key: x for key, x in options.items() if key != "bias"})
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        given = (QUERY, KEY, VALUE, options.get("bias"))
        wrt = (0, 1, 2, 3) if "bias" in options else (0, 1, 2)
        return jax.jit(jax.grad(loss, wrt, has_aux=True))(*given)

    with sdpa_kernel(backend):
        ours = both(dot_product_attention)
    with jax.default_matmul_precision("highest"):  # a GPU's own default for float32 is TF32
        theirs = both(jax.nn.dot_product_attention)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), ours, theirs)


def test_our_arguments_are_jax_nns_and_more():
    ours, theirs = (inspect.signature(f).parameters for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert list(ours)[:5] == list(theirs)[:5]
    assert set(theirs) <= set(ours)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


def test_three_dims(backend):
    with sdpa_kernel(backend):
        got = dot_product_attention(QUERY[0], KEY[0], VALUE[0], BIAS[0], MASK[0], is_causal=True)
    with jax.default_matmul_precision("highest"):
        expected = jax.nn.dot_product_attention(QUERY[0], KEY[0], VALUE[0], BIAS[0], MASK[0], is_causal=True)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_both_faces_are_one_engine(backend):
    def head_first(x):
        return jnp.swapaxes(x, 1, 2)

    with sdpa_kernel(backend):
        one = dot_product_attention(QUERY, KEY, VALUE, mask=MASK & sliding_window(6, 6))
        other = scaled_dot_product_attention(*map(head_first, (QUERY, KEY, VALUE)), MASK & sliding_window(6, 6), enable_gqa=True)
    np.testing.assert_allclose(one, head_first(other), atol=1e-6)


def test_empty_rows_give_zero_not_the_mean_of_the_values(backend):
    with sdpa_kernel(backend):
        out, lse = dot_product_attention(QUERY, KEY, VALUE, key_value_seq_lengths=jnp.array([0, 5]), return_residual=True)
    assert not out[0].any()
    assert out[1].any()
    assert jnp.isneginf(lse[0]).all()
    assert jnp.isfinite(lse[1]).all()


# --- lse


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lse_is_float32_natural_logarithm_and_not_rounded(dtype, backend):
    q, k, v = (x.astype(dtype) for x in (QUERY, KEY, VALUE))
    with sdpa_kernel(backend):
        out, lse = dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    assert lse.shape == (B, L, N)
    s = np.einsum("blnh,bsnh->blns", *(np.asarray(x, np.float64) for x in (q, jnp.repeat(k, 2, 2)))) / np.sqrt(H)
    s = np.where(np.arange(S) <= np.arange(L)[:, None, None], s, -np.inf)
    np.testing.assert_allclose(lse, np.log(np.exp(s).sum(-1)), rtol=1e-6, atol=1e-6)


def test_lse_alone_is_differentiable(backend):
    """z-loss: no cotangent for the output at all."""
    problem = make(L, S, keep=band(L, S, -1, 0, 1), dlse=True)
    q, k, v = (jnp.asarray(np.swapaxes(x, 1, 2), jnp.float32) for x in (problem.query, problem.key, problem.value))

    def loss(q, k, v):
        lse = dot_product_attention(q, k, v, mask=causal(1), return_residual=True)[1]
        return (lse * np.swapaxes(problem.dlse, 1, 2)).sum()

    with sdpa_kernel(backend):
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    exact = solve(problem.but(dout=np.zeros_like(problem.dout)))
    for x, name in zip(got, ("query", "key", "value"), strict=True):
        np.testing.assert_allclose(np.swapaxes(x, 1, 2), exact[name].astype(float), atol=2e-6)


def test_splitting_the_keys_and_merging_by_lse_is_differentiable(backend):
    """What ring attention and sinks need: gradients flow through lse as through the output."""

    def whole(q, k, v):
        return dot_product_attention(q, k, v)

    def merged(q, k, v):
        parts = [dot_product_attention(q, k[:, i : i + 6], v[:, i : i + 6], return_residual=True) for i in (0, 6)]
        lse = jnp.stack([part[1] for part in parts])
        weights = jax.nn.softmax(lse, axis=0)[..., None]
        return (weights * jnp.stack([part[0] for part in parts])).sum(0)

    with sdpa_kernel(backend), jax.enable_x64(True):  # what float32 rounds of the sum is the processor's
        operands = [jnp.asarray(x, jnp.float64) for x in (QUERY, KEY, VALUE)]
        wanted, got = (
            jax.jit(jax.value_and_grad(lambda q, k, v, f=f: jnp.sin(f(q, k, v)).sum(), (0, 1, 2)))(*operands)
            for f in (whole, merged)
        )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), got, wanted)


# --- beyond jax.nn


def test_softcap_comes_after_the_scale_and_before_bias_and_masks(backend):
    problem = make(
        L, S, softcap=0.5, scale=2.0, bias=rng.standard_normal((2, 1, 1, S)), keep=band(L, S, -1, 0, 3), dlse=True
    ).rounded(np.float32)
    got, exact = on_jax(problem, backend, mask=causal(3), face="jax"), solve(problem)
    for name, x in got.items():
        np.testing.assert_allclose(x, exact[name].astype(float), atol=1e-5, err_msg=name)


def test_a_sink_is_one_more_logit_without_a_value(backend):
    sinks = normal(N)
    logits = jnp.concatenate(
        [
            jnp.einsum("blnh,bsnh->bnls", QUERY, jnp.repeat(KEY, 2, 2), precision="highest") / np.sqrt(H),
            jnp.broadcast_to(sinks[:, None, None], (B, N, L, 1)),
        ],
        -1,
    )
    expected = jnp.einsum("bnls,bsnh->blnh", jax.nn.softmax(logits)[..., :-1], jnp.repeat(VALUE, 2, 2), precision="highest")
    with sdpa_kernel(backend):
        out, lse = dot_product_attention(QUERY, KEY, VALUE, sinks=sinks, return_residual=True)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(jnp.swapaxes(lse, 1, 2), jax.nn.logsumexp(logits, -1), atol=2e-6)


@pytest.mark.parametrize(
    "shapes", [((L, N, H), (S, K, H), (S, K, 5)), ((3, 2, L, N, H), (3, 1, S, K, H), (1, 2, S, K, 17))], ids=str
)
def test_any_leading_dims_and_value_head_dim(shapes, backend):
    q, k, v = (normal(*shape) for shape in shapes)
    with sdpa_kernel(backend):
        out, lse = dot_product_attention(q, k, v, is_causal=True, return_residual=True)

        def head_first(x):
            return jnp.swapaxes(x, -2, -3)

        expected = scaled_dot_product_attention(*map(head_first, (q, k, v)), is_causal=True, enable_gqa=True)
    assert lse.shape == out.shape[:-1]
    np.testing.assert_allclose(out, head_first(expected), atol=2e-6)


def test_windows_are_inclusive_and_minus_one_is_unlimited(backend):
    with sdpa_kernel(backend):
        for window in ((2, 0), (0, 0), (-1, 1), (3, -1)):
            out = dot_product_attention(QUERY, KEY, VALUE, local_window_size=window)
            np.testing.assert_allclose(
                out, dot_product_attention(QUERY, KEY, VALUE, mask=jnp.asarray(band(L, S, *window))), atol=2e-6
            )


def test_structured_masks_go_to_mask_and_combine(backend):
    stops = jnp.array([7, 12])
    with sdpa_kernel(backend):
        one = dot_product_attention(QUERY, KEY, VALUE, mask=causal(2) & KeyLengths(stops))
        other = dot_product_attention(QUERY, KEY, VALUE, mask=jnp.asarray(band(L, S, -1, 0, 2)), key_value_seq_lengths=stops)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_no_transposes_to_get_there(backend):
    """The layout is BLHE from end to end: no transposed copy of q, k or v before the products (dot_general names its axes)."""
    q, k = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.float32), jax.ShapeDtypeStruct((2, 80, 2, 16), jnp.float32)
    with sdpa_kernel(backend):
        jaxpr = jax.make_jaxpr(lambda *a: dot_product_attention(*a, is_causal=True))(q, k, k)
    assert "transpose" not in str(jaxpr)


# --- implementation=


def test_implementation_names_backends():
    def which(**options):
        return explain(QUERY, KEY, VALUE, call=dot_product_attention, **options)

    assert which(implementation="xla", device="cpu").backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    rejected = which(implementation="xla", device="cuda:sm90").rejected
    assert "disabled" in rejected[SDPBackend.CUDNN_ATTENTION][0]
    assert "disabled" in rejected[SDPBackend.FLASH_ATTENTION][0]
    assert which(implementation="cudnn", device="cpu").backend is None
    assert which(implementation=None, device="cpu").backend is not None
    with sdpa_kernel(SDPBackend.MATH):
        assert which(implementation="xla").backend is SDPBackend.MATH
        with pytest.raises(
            ValueError, match=r"implementation='cudnn' conflicts with the surrounding sdpa_kernel, which allows only \['MATH'\]"
        ):
            dot_product_attention(QUERY, KEY, VALUE, implementation="cudnn")
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]), pytest.raises(ValueError, match="'xla' conflicts"):
        dot_product_attention(QUERY, KEY, VALUE, implementation="xla")


def test_implementation_keeps_the_surrounding_priority():
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        chosen = explain(QUERY, KEY, VALUE, call=dot_product_attention, implementation="xla", device="cpu").backend
        assert chosen is SDPBackend.EFFICIENT_ATTENTION
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        chosen = explain(QUERY, KEY, VALUE, call=dot_product_attention, implementation="xla", device="cpu").backend
        assert chosen is SDPBackend.MATH


# --- errors

dpa = dot_product_attention
ERRORS = {
    "two dims": (lambda: dpa(QUERY[0, 0], KEY, VALUE), ValueError, "at least 3 dimensional, but got query.ndim: 2"),
    "heads": (lambda: dpa(QUERY[:, :, :3], KEY, VALUE), ValueError, "must divide the number of heads in query, got Hq=3, Hk=2, Hv=2"),
    "lengths of key and value": (lambda: dpa(QUERY, KEY, VALUE[:, :5]), ValueError, "same length S, got 12 and 5"),
    "head dim": (lambda: dpa(QUERY, KEY[..., :5], VALUE), ValueError, "same head dim E, got 8 and 5"),
    "float mask": (lambda: dpa(QUERY, KEY, VALUE, mask=BIAS), TypeError, "mask must be a bool array or a structured mask, got float32; an additive one goes to bias"),
    "integer mask": (lambda: dpa(QUERY, KEY, VALUE, mask=MASK.astype(int)), TypeError, "mask must be a bool array or a structured mask, got int32"),
    "float hidden in a structured mask": (lambda: dpa(QUERY, KEY, VALUE, mask=causal() & BIAS), TypeError, "mask must be"),
    "bool bias": (lambda: dpa(QUERY, KEY, VALUE, bias=MASK), TypeError, "bias must be a float array, got bool; a bool array goes to mask"),
    "bias shape": (lambda: dpa(QUERY, KEY, VALUE, bias=BIAS[..., :5]), ValueError, r"broadcast into the scores' shape \(2, 4, 9, 12\)"),
    "float lengths": (lambda: dpa(QUERY, KEY, VALUE, key_value_seq_lengths=jnp.ones(2)), TypeError, "key_value_seq_lengths must be an integer array, got float32"),
    "float query lengths": (lambda: dpa(QUERY, KEY, VALUE, query_seq_lengths=jnp.ones(2)), TypeError, "query_seq_lengths must be an integer array, got float32"),
    "lengths of another batch": (lambda: dpa(QUERY, KEY, VALUE, key_value_seq_lengths=jnp.ones(3, int)), ValueError, "batch dims that broadcast"),
    "window": (lambda: dpa(QUERY, KEY, VALUE, local_window_size=(-2, 0)), ValueError, "left must be an int >= -1"),
    "window of three": (lambda: dpa(QUERY, KEY, VALUE, local_window_size=(1, 2, 3)), (ValueError, TypeError), "local_window_size"),
    "softcap zero": (lambda: dpa(QUERY, KEY, VALUE, softcap=0.0), ValueError, "softcap must be positive"),
    "softcap negative": (lambda: dpa(QUERY, KEY, VALUE, softcap=-1), ValueError, "softcap must be positive"),
    "softcap nan": (lambda: dpa(QUERY, KEY, VALUE, softcap=float("nan")), ValueError, "softcap must be positive"),
    "softcap traced": (lambda: jax.jit(lambda c: dpa(QUERY, KEY, VALUE, softcap=c))(1.0), TypeError, "'softcap' must be a"),
    "sinks shape": (lambda: dpa(QUERY, KEY, VALUE, sinks=jnp.ones(K)), ValueError, r"one logit per query head, shape \(4,\), got \(2,\)"),
    "sinks dtype": (lambda: dpa(QUERY, KEY, VALUE, sinks=jnp.ones(N, int)), TypeError, "sinks must be a float array, got int32"),
    "implementation": (lambda: dpa(QUERY, KEY, VALUE, implementation="flash"), ValueError, "implementation must be 'xla', 'cudnn' or None, got 'flash'"),
    "is_causal": (lambda: dpa(QUERY, KEY, VALUE, is_causal=1), TypeError, "'is_causal' must be a"),
    "return_residual": (lambda: dpa(QUERY, KEY, VALUE, return_residual=1), TypeError, "'return_residual' must be a"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_jaxs_face(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
