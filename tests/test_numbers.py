"""Contract 3, the values where libraries differ: zero rows, NaN and infinity, finite fills, scale, dtypes, empty dims, precision."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make, on_jax
from oracle import on_torch

from jax_sdpa import dot_product_attention, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, QueryLengths, SegmentIds, causal, causal_lower_right, sliding_window

NAN, INF = np.nan, np.inf


def run(backend, call, *arrays):
    with sdpa_kernel(backend):
        return jax.tree.map(np.asarray, jax.jit(call)(*arrays))


def with_gradients(problem, backend, mask=None, **options):
    return on_jax(problem.rounded(np.float32), backend, mask=mask, **options)


# --- rows that attend to nothing

EMPTY = {
    "bool": lambda L, S: ({"keep": np.arange(L)[:, None] % 3 + np.zeros(S) > 0}, None),
    "float": lambda L, S: ({"bias": np.where(np.arange(L)[:, None] % 3 + np.zeros(S) > 0, 0.5, -INF)}, None),
    "lower right": lambda L, S: ({}, causal(S - L - 2)),
    "query lengths": lambda L, S: ({}, QueryLengths(jnp.array([3, 0]))),
    "segments": lambda L, S: ({}, SegmentIds(jnp.arange(L) % 3, 1 + jnp.arange(S) % 2)),
}


@pytest.mark.parametrize("sizes", [(9, 5), (140, 130)])
@pytest.mark.parametrize("kind", EMPTY)
def test_a_row_that_attends_to_nothing_is_exactly_zero_with_zero_gradient(kind, sizes, backend):
    L, S = sizes
    fields, mask = EMPTY[kind](L, S)
    problem = make(L, S, dlse=True, **fields)
    problem = problem.but(key=problem.key + 1, value=problem.value + 1)  # a mean of the values would show
    got = with_gradients(problem, backend, mask, face="jax")
    empty = np.isneginf(got["lse"])
    assert empty.any()
    assert not got["out"][empty].any()
    assert not got["query"][empty].any()
    assert (np.abs(got["out"]).sum(-1) > 0)[~empty].all()
    assert all(np.isfinite(x).all() for name, x in got.items() if name != "lse")
    if "bias" in got:
        assert not got["bias"][empty[0, 0]].any()
    without = problem.but(query=np.where(empty[..., None], 0, problem.query), dout=np.where(empty[..., None], 0, problem.dout))
    again = with_gradients(without, backend, mask, face="jax")
    for name in ("key", "value"):  # as if the row were not there
        np.testing.assert_allclose(got[name], again[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nothing_at_all_to_attend_to(dtype, backend):
    problem = make(4, 300, keep=np.zeros((1, 300), bool)).rounded(dtype)
    assert not any(x.astype(np.float32).any() for x in on_jax(problem, backend).values())


def test_empty_is_decided_on_the_scores(backend):
    """q @ k overflows to -inf in each row's every score: torch gives 0, and so do we, with no mask in sight."""
    q, k = np.full((1, 1, 3, 4), 1e30, np.float32), np.full((1, 1, 5, 4), -1e30, np.float32)
    q[:, :, 1] = 1e-30
    out = run(backend, scaled_dot_product_attention, q, k, np.ones_like(k))
    np.testing.assert_array_equal(out[0, 0, :, 0], [0, 1, 0])


@pytest.mark.parametrize("S", [5, 300])
def test_a_nan_row_stays_nan_and_alone(S, backend):
    problem = make(6, S).rounded(np.float32)
    problem.query[:, :, 2] = NAN
    out = with_gradients(problem, backend)["out"]
    assert np.isnan(out[:, :, 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=2)).all()
    bias = np.zeros((6, S), np.float32)
    bias[1, S - 1], bias[4, 0] = NAN, INF
    out = with_gradients(make(6, S, bias=bias), backend)["out"]
    assert np.isnan(out[:, :, [1, 4]]).all()
    assert np.isfinite(out[:, :, [0, 2, 3, 5]]).all()


def test_infinite_values_come_through(backend):
    problem = make(6, 300).rounded(np.float32)
    problem.value[:, :, 290, 1], problem.value[:, :, 3, 2] = INF, -INF
    out = run(backend, scaled_dot_product_attention, problem.query, problem.key, problem.value)
    assert (out[..., 1] == INF).all()
    assert (out[..., 2] == -INF).all()
    assert np.isfinite(out[..., [0, 3, 4, 5, 6, 7]]).all()


# --- what hidden keys hold

HIDING = {
    "key lengths": (KeyLengths(jnp.array([200, 0])), np.arange(300)[None, :] >= np.array([[200], [0]])),
    "left padding": (
        KeyLengths(jnp.array([300, 270]), jnp.array([140, 0])),
        np.stack([np.arange(300) < 140, np.arange(300) >= 270]),
    ),
    "padding segment": (SegmentIds(jnp.arange(150) // 60, jnp.where(jnp.arange(300) < 130, 1, -1)), np.arange(300)[None] >= 130),
    "segment that no query has": (SegmentIds(jnp.zeros(150, int), jnp.arange(300) // 130), np.arange(300)[None] >= 130),
    "causal, L < S": (causal(), np.arange(300)[None] >= 150),
    "window in the past": (sliding_window(10, 0, 100), (np.arange(300)[None] < 90) | (np.arange(300)[None] >= 250)),
    "causal & key lengths": (causal(20) & KeyLengths(jnp.array([60, 300])), np.arange(300)[None] >= np.array([[60], [170]])),
}


DENSE_TOO = ["left padding", "padding segment", "causal & key lengths"]  # with a bias and a bool mask


@pytest.mark.parametrize(("name", "dense"), [*((name, False) for name in HIDING), *((name, True) for name in DENSE_TOO)])
def test_keys_hidden_from_the_whole_sequence_never_reach_anything(name, dense, backend):
    mask, hidden = HIDING[name]
    problem = make(150, 300, dlse=True, bias=np.ones((1, 300)) if dense else None).rounded(np.float32)
    hidden = np.broadcast_to(hidden[:, None, :, None], problem.key.shape)
    whole = mask & jnp.ones((1, 300), bool) if dense else mask
    clean = on_jax(
        problem.but(key=np.where(hidden, 0, problem.key), value=np.where(hidden, 0, problem.value)), backend, mask=whole, face="jax"
    )
    for poison in (NAN, INF):
        dirty = problem.but(key=np.where(hidden, poison, problem.key), value=np.where(hidden, poison, problem.value))
        got = on_jax(dirty, backend, mask=whole, face="jax")
        assert not got["key"][hidden].any()
        assert not got["value"][hidden].any()
        for what, x in got.items():
            np.testing.assert_allclose(x, clean[what], rtol=1e-5, atol=1e-5, err_msg=what)


def test_padded_queries_may_hold_anything(backend):
    """Rows that a structured mask leaves without keys: 0, and their NaN in query or cotangent reaches no gradient."""
    problem = make(150, 300, dlse=True).rounded(np.float32)
    mask = QueryLengths(jnp.array([140, 7])) & KeyLengths(jnp.array([300, 200]))
    padded = np.arange(150)[None, None, :, None] >= np.array([140, 7])[:, None, None, None]

    def fill(x, y):
        return np.where(padded, y, x).astype(np.float32)

    clean = on_jax(problem.but(query=fill(problem.query, 0), dout=fill(problem.dout, 0)), backend, mask=mask, face="jax")
    got = on_jax(problem.but(query=fill(problem.query, NAN), dout=fill(problem.dout, NAN)), backend, mask=mask, face="jax")
    for what, x in got.items():
        np.testing.assert_allclose(x, clean[what], rtol=1e-5, atol=1e-5, err_msg=what)


@pytest.mark.torch
@pytest.mark.parametrize("S", [5, 300])
def test_dense_masks_follow_torch_in_spreading_nan(S, backend):
    """A masked-out NaN key poisons every row (NaN - inf), a masked-out NaN value its channel (0 * NaN)."""
    keep = np.arange(S)[None, :] < S - 2
    for operand in ("key", "value"):
        problem = make(4, S, keep=keep).rounded(np.float32)
        getattr(problem, operand)[:, :, S - 1, 3] = NAN
        ours, theirs = with_gradients(problem, backend)["out"], on_torch(problem, "float32")["out"]
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=operand)
        assert np.isnan(ours).any()


# --- finite numbers are numbers


@pytest.mark.parametrize("fill", [-1e9, float(np.finfo(np.float32).min)])
def test_a_finite_fill_is_a_number(fill, backend):
    """A row of it attends to all keys alike, where a mask of -inf would give 0; beside kept keys its weight is 0."""
    bias = np.zeros((4, 300), np.float32)
    bias[1], bias[2, :299] = fill, fill
    problem = make(4, 300, bias=bias).rounded(np.float32)
    out = run(backend, lambda q, k, v, b: scaled_dot_product_attention(q, k, v, b), problem.query, problem.key, problem.value, bias)
    np.testing.assert_allclose(out[:, :, 1], problem.value.mean(2), atol=2e-6)
    np.testing.assert_allclose(out[:, :, 2], problem.value[:, :, 299], rtol=1e-6)


def test_a_float16_fill_shifts_the_scores(backend):
    problem = make(4, 300).rounded(np.float16)
    shifted = problem.but(bias=np.full((4, 300), -65504, np.float16))
    plain, got = on_jax(problem, backend)["out"], on_jax(shifted, backend)["out"]
    np.testing.assert_allclose(got.astype(np.float32), plain.astype(np.float32), atol=5e-3)


@pytest.mark.parametrize(("dtype", "fill"), [("float16", 256.0), ("bfloat16", 133120.0), ("float32", 1e17)])
def test_large_equal_inputs_average(dtype, fill, backend):
    """torch #160841, test_flash_atteention_large_bf16_nan_values: the products leave half precision's range, the answer does not."""
    x = jnp.full((1, 2, 130, 64), fill, dtype)
    v = jnp.ones((1, 2, 130, 64), dtype)
    np.testing.assert_allclose(run(backend, scaled_dot_product_attention, x, x, v).astype(np.float32), 1, rtol=1e-5)


# --- scale


def test_the_scale_is_split_between_query_and_key(backend):
    """q = k = 1e20, scale = 1e-40: the products alone would be infinite. torch's MATH is finite."""
    q = np.full((1, 1, 4, 2), 1e20, np.float32)
    v = np.arange(8, dtype=np.float32).reshape(1, 1, 4, 2)
    out = run(backend, lambda q, v: scaled_dot_product_attention(q, q, v, scale=1e-40), q, v)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape), rtol=1e-6)
    out = run(backend, lambda q, v, s: scaled_dot_product_attention(q, q, v, scale=s), q, v, np.float32(1e-37))
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape), rtol=1e-6)


@pytest.mark.parametrize("scale", [0, 0.0, np.array(0.0), False], ids=["int", "float", "traced", "bool"])
def test_scale_zero_averages_the_values(scale, backend):
    problem = make(5, 130, scale=scale).rounded(np.float32)
    got = on_jax(problem, backend)
    np.testing.assert_allclose(got["out"], np.broadcast_to(problem.value.mean(2, keepdims=True), got["out"].shape), atol=1e-6)
    assert not got["query"].any()
    assert not got["key"].any()
    assert all(np.isfinite(x).all() for x in got.values())


def test_scale_may_be_any_number(backend):
    q, k, v = (x.astype(np.float32) for x in (make(3, 5).query, make(3, 5).key, make(3, 5).value))
    one = run(backend, lambda *a: scaled_dot_product_attention(*a, scale=1.0), q, k, v)
    for scale in (1, True, np.float64(1), np.ones((), np.int32), jnp.float32(1), jnp.bfloat16(1)):
        np.testing.assert_allclose(
            run(backend, lambda *a, s=scale: scaled_dot_product_attention(*a, scale=s), q, k, v), one, rtol=1e-6
        )
    for scale in (INF, NAN):
        assert np.isnan(run(backend, lambda *a, s=scale: scaled_dot_product_attention(*a, scale=s), q, k, v)).all()


# --- dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_mask_goes_with_half_queries(dtype, backend):
    """Added in float32, its gradient float32; a mask in the query's dtype has its gradient in that."""
    bias = (np.random.default_rng(0).standard_normal((2, 1, 1, 130)) * 3).astype(np.float32)
    problem = make(5, 130, bias=bias).rounded(dtype)
    got = on_jax(problem, backend)
    assert got["bias"].dtype == np.float32
    assert got["out"].dtype == dtype
    rounded = on_jax(problem.but(bias=bias.astype(dtype)), backend)
    assert rounded["bias"].dtype == dtype
    exact_bias = on_jax(problem.but(bias=bias.astype(dtype).astype(np.float32)), backend)
    np.testing.assert_array_equal(rounded["out"], exact_bias["out"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_results(dtype, backend, x64):
    if dtype == "float64" and not x64:
        return
    q = jnp.ones((1, 4, 2, 8), dtype)

    def call(q, s):
        return dot_product_attention(q, q, q, sinks=s, return_residual=True)

    (out, lse), pullback = jax.eval_shape(lambda q, s: jax.vjp(call, q, s), q, jnp.ones(2, dtype))
    assert (out.dtype, lse.dtype) == (dtype, "float64" if dtype == "float64" else "float32")
    with sdpa_kernel(backend):
        gradients = jax.grad(lambda q, s: call(q, s)[0].sum().astype(jnp.float32), (0, 1))(q, jnp.ones(2, dtype))
    assert [g.dtype for g in gradients] == [dtype, dtype]
    del pullback


def test_half_results_do_not_hang_on_x64(backend):
    problem = make(5, 130, keep=np.arange(130)[None] < 100).rounded("bfloat16")
    results = []
    for on in (False, True):
        with jax.enable_x64(on):
            results.append(on_jax(problem.but(bias=np.ones((1, 130), np.float32), scale=0.3), backend))
    for name in results[0]:
        assert results[0][name].dtype == results[1][name].dtype
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)


# --- empty dims

EMPTY_DIMS = {
    "L": ((2, 3, 0, 4), (2, 3, 5, 4), (2, 3, 5, 6)), "S": ((2, 3, 7, 4), (2, 3, 0, 4), (2, 3, 0, 6)),
    "batch": ((0, 3, 7, 4), (0, 3, 5, 4), (0, 3, 5, 6)), "Ev": ((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 0)),
    "no batch dim, S": ((3, 7, 4), (3, 0, 4), (3, 0, 6)),
}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", EMPTY_DIMS)
def test_empty_dims_give_zeros_with_zero_gradients(dim, masked, backend):
    q, k, v = (jnp.ones(shape) for shape in EMPTY_DIMS[dim])
    mask = causal_lower_right(q.shape[-2], k.shape[-2]) if masked else None
    with sdpa_kernel(backend):
        out, pullback = jax.vjp(lambda *a: scaled_dot_product_attention(*a, mask), q, k, v)
        assert out.shape == (*q.shape[:-1], v.shape[-1])
        assert not out.any()
        for operand, gradient in zip((q, k, v), pullback(out), strict=True):
            assert gradient.shape == operand.shape
            assert not gradient.any()
        assert jax.jit(scaled_dot_product_attention)(q, k, v).shape == out.shape


def test_no_keys_but_sinks_and_no_head_dim(backend):
    sinks = jnp.array([0.5, -1.0])
    out, lse = run(
        backend,
        lambda q, k, s: dot_product_attention(q, k, k, sinks=s, return_residual=True),
        jnp.ones((1, 3, 2, 4)),
        jnp.ones((1, 0, 2, 4)),
        sinks,
    )
    assert not out.any()
    np.testing.assert_allclose(lse, np.broadcast_to(sinks, (1, 3, 2)))
    v = np.arange(20, dtype=np.float32).reshape(1, 1, 5, 4)
    out = run(backend, scaled_dot_product_attention, jnp.ones((1, 1, 3, 0)), jnp.ones((1, 1, 5, 0)), v)  # E = 0: every score is 0
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), (1, 1, 3, 4)), rtol=1e-6)


# --- precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_float32_products_run_at_highest_precision_unless_less_is_asked_for(dtype, asked, backend):
    if dtype == "bfloat16" and backend is not SDPBackend.MATH:
        return  # its products are of halves, accumulated in float32: no precision to lose
    q = jax.ShapeDtypeStruct((1, 2, 300, 64), dtype)

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True).astype(jnp.float32).sum()

    with sdpa_kernel(backend), jax.default_matmul_precision(asked) if asked else contextlib.nullcontext():
        text = jax.jit(jax.grad(call, (0, 1, 2))).lower(q, q, q).as_text()
    products = re.findall(r"stablehlo\.dot_general.*", text)
    assert len(products) >= 5  # two forward or recomputed, three backward
    assert all(("HIGHEST" in product) == (asked is None) for product in products), products


@pytest.mark.parametrize(
    "mask", [QueryLengths(jnp.array([3, 5])), QueryLengths(4, 1) & causal(), SegmentIds(jnp.array([0, 0, 1, -1, -1]))]
)
def test_queries_that_a_mask_removes_may_be_nan_with_sinks_too(mask, backend):
    """Their lse is the sink's, so it is the mask that tells."""
    L = 5
    removed = ~np.broadcast_to(np.asarray(mask.materialise(L, L)), (2, 1, L, L)).any(-1)[:, 0]  # (B, L)
    rng = np.random.default_rng(3)
    q, k, v, dout = (rng.standard_normal((2, L, 2, 8)).astype(np.float32) for _ in range(4))
    sinks = np.array([0.5, 1.0], np.float32)

    def step(q, dout):
        def attend(q, k, v, sinks):
            return dot_product_attention(q, k, v, mask=mask, sinks=sinks, return_residual=True)

        with sdpa_kernel(backend):
            (out, lse), pullback = jax.vjp(attend, q, k, v, sinks)
            return out, lse, pullback((dout, jnp.ones_like(lse)))

    wanted = step(jnp.asarray(q), jnp.asarray(dout))
    q[removed], dout[removed] = np.nan, np.nan
    got = step(jnp.asarray(q), jnp.asarray(dout))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, wanted)
    assert not np.isnan(got[2][1]).any()
