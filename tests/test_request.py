"""From arguments to a request: the shape rules of torch's MATH, and every error that a caller can make, raised while tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make
from oracle import solve

from jax_sdpa import check, dot_product_attention, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, causal, causal_lower_right
from jax_sdpa.context import Allowed

rng = np.random.default_rng(0)


def arrays(*shapes):
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


# --- shapes: each row is (query, key, value, options), answered by torch with the shape and numbers that we must give

SHAPES = [
    ((4, 8), (6, 8), (6, 5), {}),
    ((3, 4, 8), (3, 6, 8), (3, 6, 5), {}),
    ((2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 5), {}),
    ((2, 1, 3, 4, 8), (2, 7, 3, 6, 8), (2, 7, 3, 6, 5), {}),
    ((2, 1, 2, 1, 3, 4, 8), (2, 2, 3, 6, 8), (2, 1, 1, 3, 6, 5), {}),
    ((2, 3, 4, 8), (3, 6, 8), (6, 5), {}),
    ((4, 8), (3, 6, 8), (2, 3, 6, 5), {}),
    ((4, 8), (3, 6, 8), (1, 6, 5), {}),
    ((1, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 5), {}),
    ((1, 3, 4, 8), (2, 1, 6, 8), (1, 3, 6, 5), {}),
    ((2, 4, 4, 8), (2, 1, 6, 8), (2, 1, 6, 5), {}),
    ((2, 1, 4, 8), (2, 4, 6, 8), (2, 4, 6, 5), {}),
    ((2, 4, 4, 8), (2, 4, 6, 8), (2, 1, 6, 5), {}),
    ((6, 4, 8), (2, 6, 8), (2, 6, 5), {"enable_gqa": True}),
    ((2, 6, 4, 8), (2, 2, 6, 8), (2, 3, 6, 5), {"enable_gqa": True}),
    ((2, 4, 4, 8), (2, 2, 6, 8), (2, 1, 6, 5), {"enable_gqa": True}),
    ((2, 2, 6, 4, 8), (1, 2, 3, 6, 8), (2, 1, 3, 6, 5), {"enable_gqa": True}),
    ((2, 4, 4, 8), (1, 4, 6, 8), (1, 4, 6, 5), {"enable_gqa": True}),
]


@pytest.mark.torch
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes_broadcast_as_in_torch_math(case):
    """Values and gradients; default backend."""
    import torch
    from torch.nn.attention import SDPBackend as Theirs
    from torch.nn.attention import sdpa_kernel as their_kernel

    *shapes, options = case
    operands = arrays(*shapes)
    tensors = [torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in operands]
    with their_kernel(Theirs.MATH):
        wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, **options)
    dout = rng.standard_normal(wanted.shape)
    wanted.backward(torch.tensor(dout))

    @jax.jit
    def run(operands, dout):
        out, pullback = jax.vjp(lambda *a: scaled_dot_product_attention(*a, **options), *operands)
        return out, *pullback(dout)

    got = run(operands, jnp.asarray(dout, jnp.float32))
    for x, y in zip(got, (wanted, *(t.grad for t in tensors)), strict=True):
        assert x.shape == tuple(y.shape)
        np.testing.assert_allclose(x, y.detach().numpy(), atol=2e-5)


MASK_SHAPES = [
    (),
    (6,),
    (1,),
    (4, 1),
    (1, 6),
    (4, 6),
    (3, 1, 1),
    (1, 4, 6),
    (3, 4, 1),
    (3, 4, 6),
    (2, 1, 1, 6),
    (1, 3, 4, 6),
    (2, 1, 4, 6),
    (2, 3, 4, 6),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_of_every_broadcast_shape(shape):
    """Also scalars and 1-D, which torch's MATH takes; the gradient of a float mask has the mask's shape."""
    problem = make(4, 6, Hq=3)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (problem.query, problem.key, problem.value))
    dout = jnp.asarray(problem.dout, jnp.float32)
    keep, bias = rng.random(shape) < 0.6, rng.standard_normal(shape)
    exact = solve(problem.but(keep=keep))["out"]
    np.testing.assert_allclose(scaled_dot_product_attention(q, k, v, jnp.asarray(keep)), exact.astype(float), atol=2e-6)
    out, pullback = jax.vjp(lambda b: scaled_dot_product_attention(q, k, v, b), jnp.asarray(bias, jnp.float32))
    exact = solve(problem.but(bias=bias))
    np.testing.assert_allclose(out, exact["out"].astype(float), atol=2e-6)
    (gradient,) = pullback(dout)
    assert gradient.shape == shape
    np.testing.assert_allclose(gradient, exact["bias"].astype(float), atol=1e-5)


def test_masks_of_lower_rank_calls():
    for q, masks in {
        (4, 8): [(4, 6), (6,), ()],
        (3, 4, 8): [(3, 4, 6), (1, 4, 6), (4, 1)],
        (5, 1, 2, 3, 4, 8): [(5, 1, 2, 1, 4, 6), (2, 3, 1, 1)],
    }.items():
        k = (*q[:-2], 6, 8)
        for mask in masks:
            out = scaled_dot_product_attention(*arrays(q, k, k), jnp.ones(mask, bool))
            assert out.shape == q


def test_the_output_shape_uses_the_value_head_dim_and_the_query_length():
    q, k, v = arrays((2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 17))
    assert scaled_dot_product_attention(q, k, v).shape == (2, 3, 4, 17)
    q, k, v = arrays((5, 2, 4, 6, 8), (1, 2, 7, 3, 8), (5, 1, 7, 3, 17))
    out, lse = dot_product_attention(q, k, v, return_residual=True)
    assert out.shape == (5, 2, 4, 6, 17)
    assert lse.shape == (5, 2, 4, 6)
    q, k, v = arrays((4, 6, 8), (7, 3, 8), (7, 3, 17))
    assert dot_product_attention(q, k, v).shape == (4, 6, 17)


def test_numpy_arrays_are_welcome_and_jit_sees_one_signature():
    q = rng.standard_normal((1, 2, 4, 8)).astype(np.float32)
    np.testing.assert_array_equal(scaled_dot_product_attention(q, q, q), scaled_dot_product_attention(*map(jnp.asarray, (q, q, q))))
    mask = np.ones((4, 4), bool)
    np.testing.assert_array_equal(scaled_dot_product_attention(q, q, q, mask), scaled_dot_product_attention(q, q, q))


def test_the_request_is_canonical():
    q, k, v = arrays((2, 5, 6, 4, 8), (1, 5, 2, 7, 8), (2, 1, 3, 7, 9))
    request, shape = check.torch_request(
        q, k, v, causal() & jnp.ones((2, 1, 1, 1, 7), bool) & KeyLengths(jnp.ones((5,), int)), enable_gqa=True
    )
    assert request.query.shape == (10, 6, 4, 8)
    assert request.key.shape == (10, 6, 7, 8)
    assert request.value.shape == (10, 6, 7, 9)
    assert request.keep_mask.shape == (10, 1, 1, 7)
    assert shape == (2, 5, 6, 4, 9)
    assert [part.lengths.shape for part in request.masks if isinstance(part, KeyLengths)] == [(10,)]
    assert hash(request.spec) == hash(check.torch_request(q, k, v, enable_gqa=True)[0].spec)
    assert request.spec.allowed == Allowed(
        tuple(b for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH))
    )
    request, _ = check.torch_request(*arrays((2, 6, 4, 8), (2, 2, 7, 8), (2, 2, 7, 8)), enable_gqa=True)
    assert request.key.shape == (2, 2, 7, 8), "grouped heads are not repeated"


# --- errors

Q = np.zeros((2, 4, 5, 8), np.float32)
K = np.zeros((2, 4, 6, 8), np.float32)
G = np.zeros((2, 2, 6, 8), np.float32)
KEY = jax.random.key(0)
sdpa = scaled_dot_product_attention
TORCH_FACE = {
    "list": (lambda: sdpa([[1.0]], K, K), TypeError, "query must be a JAX or NumPy array, got list"),
    "scalar": (lambda: sdpa(Q, 1.0, K), TypeError, "key must be a JAX or NumPy array, got float"),
    "None": (lambda: sdpa(Q, K, None), TypeError, "value must be a JAX or NumPy array, got NoneType"),
    "mixed dtypes": (lambda: sdpa(Q, K.astype(np.float16), K), TypeError, "same dtype, but got query.dtype: float32, key.dtype: float16 and value.dtype: float32"),
    "wrong dtype of value alone": (lambda: sdpa(Q, K, K.astype(np.float16)), TypeError, "value.dtype: float16"),
    "integers": (lambda: sdpa(*(x.astype(np.int32) for x in (Q, K, K))), TypeError, "of dtype float16, bfloat16, float32, float64, but got int32"),
    "bool": (lambda: sdpa(*(x.astype(bool) for x in (Q, K, K))), TypeError, "but got bool"),
    "complex": (lambda: sdpa(*(x.astype(np.complex64) for x in (Q, K, K))), TypeError, "but got complex64"),
    "fp8": (lambda: sdpa(*(jnp.asarray(x, jnp.float8_e4m3fn) for x in (Q, K, K))), TypeError, "but got float8_e4m3fn"),
    "one dim": (lambda: sdpa(Q[0, 0, 0], K, K), ValueError, "at least 2 dimensional, but got query.ndim: 1"),
    "one dim of value": (lambda: sdpa(Q, K, K[0, 0, 0]), ValueError, "value.ndim: 1"),
    "batch": (lambda: sdpa(Q, K[[0, 0, 0]], K), ValueError, r"batch dims that broadcast, got \(2,\), \(3,\) and \(2,\)"),
    "batch of value": (lambda: sdpa(Q, K, K[[0, 0, 0]]), ValueError, r"got \(2,\), \(2,\) and \(3,\)"),
    "head dim": (lambda: sdpa(Q, K[..., :7], K), ValueError, "same head dim E, got 8 and 7"),
    "value shorter": (lambda: sdpa(Q, K, K[:, :, :5]), ValueError, "same length S, got 6 and 5"),
    "value longer": (lambda: sdpa(Q, K[:, :, :5], K), ValueError, "same length S, got 5 and 6"),
    "value of one key": (lambda: sdpa(Q, K, K[:, :, :1]), ValueError, "same length S, got 6 and 1"),
    "heads": (lambda: sdpa(Q, K[:, :3], K[:, :3]), ValueError, r"same number of heads, but got Hq=4, Hk=3, Hv=3. They must be equal or 1"),
    "heads, grouped": (lambda: sdpa(Q, G, G), ValueError, "Hq=4, Hk=2, Hv=2. Try setting enable_gqa=True for GQA"),
    "heads do not divide": (lambda: sdpa(Q, K[:, :3], K[:, :3], enable_gqa=True), ValueError, "must divide the number of heads in query, got Hq=4, Hk=3, Hv=3"),
    "value heads do not divide": (lambda: sdpa(Q, G, K[:, :3], enable_gqa=True), ValueError, "got Hq=4, Hk=2, Hv=3"),
    "more key than query heads": (lambda: sdpa(Q[:, :2], K, K, enable_gqa=True), ValueError, "got Hq=2, Hk=4, Hv=4"),
    "no key heads": (lambda: sdpa(Q, K[:, :0], K[:, :0], enable_gqa=True), ValueError, "Hk=0, Hv=0"),
    "gqa of two dims": (lambda: sdpa(Q[0, 0], K[0, 0], K[0, 0], enable_gqa=True), ValueError, "enable_gqa needs a heads dim: arrays of rank 3 and more, got 2, 2 and 2"),
    "gqa no bool": (lambda: sdpa(Q, G, G, enable_gqa=1), TypeError, r"'enable_gqa' must be a \(static\) bool, not int"),
    "is_causal no bool": (lambda: sdpa(Q, K, K, is_causal=1), TypeError, r"'is_causal' must be a \(static\) bool, not int"),
    "is_causal traced": (lambda: jax.jit(lambda c: sdpa(Q, K, K, is_causal=c))(True), TypeError, "'is_causal' must be a"),
    "mask and is_causal": (lambda: sdpa(Q, K, K, np.ones((5, 6), bool), is_causal=True), ValueError, r"attn_mask should not be set when is_causal=True.*causal_upper_left\(L, S\) & mask.*causal_lower_right"),
    "structured mask and is_causal": (lambda: sdpa(Q, K, K, causal_lower_right(5, 6), is_causal=True), ValueError, "attn_mask should not be set"),
    "integer mask": (lambda: sdpa(Q, K, K, np.ones((5, 6), np.int32)), TypeError, r"attn_mask dtype to be bool or float32 or to match query dtype, but got attn_mask.dtype: int32.*attn_mask.astype\(bool\)"),
    "uint8 mask": (lambda: sdpa(Q, K, K, np.ones((5, 6), np.uint8)), TypeError, "attn_mask.dtype: uint8"),
    "half mask on float32": (lambda: sdpa(Q, K, K, np.ones((5, 6), np.float16)), TypeError, "attn_mask.dtype: float16 and query.dtype: float32"),
    "mask is a list": (lambda: sdpa(Q, K, K, [[True]]), TypeError, "attn_mask must be a JAX or NumPy array, got list"),
    "mask of higher rank": (lambda: sdpa(Q, K, K, np.ones((1, 2, 4, 5, 6), bool)), ValueError, r"broadcast into the scores' shape \(2, 4, 5, 6\) .* without enlarging it, got \(1, 2, 4, 5, 6\)"),
    "mask that enlarges the batch": (lambda: sdpa(Q[:1], K[:1], K[:1], np.ones((2, 1, 5, 6), bool)), ValueError, "without enlarging it"),
    "mask that enlarges the heads": (lambda: sdpa(Q[:, :1], K[:, :1], K[:, :1], np.ones((4, 5, 6), bool)), ValueError, "without enlarging it"),
    "mask that enlarges L": (lambda: sdpa(Q[:, :, :1], K, K, np.ones((5, 6), bool)), ValueError, "without enlarging it"),
    "mask of wrong S": (lambda: sdpa(Q, K, K, np.ones((5, 5), bool)), ValueError, r"got \(5, 5\)"),
    "mask (B, L, S)": (lambda: sdpa(Q, K, K, np.ones((2, 5, 6), bool)), ValueError, r"got \(2, 5, 6\)\. Its first dim stands for heads; for a mask per batch element pass attn_mask\[:, None\]"),
    "mask of three dims for two": (lambda: sdpa(Q[0, 0], K[0, 0], K[0, 0], np.ones((1, 5, 6), bool)), ValueError, r"scores' shape \(5, 6\)"),
    "mask of key heads": (lambda: sdpa(Q, G, G, np.ones((2, 2, 5, 6), bool), enable_gqa=True), ValueError, r"\(2, 4, 5, 6\)"),
    "scale": (lambda: sdpa(Q, K, K, scale="a"), TypeError, "'scale' must be a number or a real scalar array, not str"),
    "scale of one entry": (lambda: sdpa(Q, K, K, scale=np.ones(1)), TypeError, r"not shape \(1,\)"),
    "complex scale": (lambda: sdpa(Q, K, K, scale=1j), TypeError, "not complex"),
    "dropout_p above 1": (lambda: sdpa(Q, K, K, dropout_p=1.1, dropout_rng=KEY), ValueError, "dropout probability has to be between 0 and 1, but got 1.1"),
    "dropout_p negative": (lambda: sdpa(Q, K, K, dropout_p=-0.1, dropout_rng=KEY), ValueError, "but got -0.1"),
    "dropout_p nan": (lambda: sdpa(Q, K, K, dropout_p=float("nan"), dropout_rng=KEY), ValueError, "but got nan"),
    "dropout_p None": (lambda: sdpa(Q, K, K, dropout_p=None), TypeError, "'dropout_p' must be a"),
    "dropout_p traced": (lambda: jax.jit(lambda p: sdpa(Q, K, K, dropout_p=p, dropout_rng=KEY))(0.1), TypeError, "'dropout_p' must be a"),
    "dropout without a key": (lambda: sdpa(Q, K, K, dropout_p=0.1), ValueError, r"dropout_p=0.1 needs a key: pass dropout_rng=jax.random.key"),
    "too many positional": (lambda: sdpa(Q, K, K, None, 0.0, False, 1.0), TypeError, "positional arguments"),
    "softcap is not torch's": (lambda: sdpa(Q, K, K, softcap=1.0), TypeError, "unexpected keyword argument 'softcap'"),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH_FACE)
def test_errors_of_torchs_face(name):
    call, error, message = TORCH_FACE[name]
    with pytest.raises(error, match=message):
        call()


def test_errors_come_while_tracing_and_the_same_from_explain():
    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, np.float32)

    for call in (lambda *a: jax.eval_shape(sdpa, *a), lambda *a: jax.jit(sdpa).trace(*a), explain):
        with pytest.raises(ValueError, match="same length S, got 6 and 5"):
            call(shape(2, 4, 5, 8), shape(2, 4, 6, 8), shape(2, 4, 5, 8))


def test_float64_needs_x64_and_says_so():
    for position, name in enumerate(("query", "key", "value")):
        with (
            jax.enable_x64(False),
            pytest.raises(TypeError, match=rf"{name} is float64.*jax_enable_x64.*{name}.astype\(np.float32\)"),
        ):
            sdpa(*(x.astype(np.float64) if i == position else x for i, x in enumerate((Q, K, K))))
    with jax.enable_x64(False), pytest.raises(TypeError, match="attn_mask is float64"):
        sdpa(Q, K, K, np.zeros((5, 6)))
    with jax.enable_x64(True):
        assert sdpa(*(x.astype(np.float64) for x in (Q, K, K))).dtype == np.float64
        with pytest.raises(TypeError, match=r"attn_mask.dtype: float64 and query.dtype: float32"):
            sdpa(Q, K, K, np.zeros((5, 6)))


@pytest.mark.torch
def test_torch_tensors_get_a_hint():
    import torch

    with pytest.raises(
        TypeError, match=r"query must be a JAX or NumPy array, got Tensor. Convert it first: jnp.asarray\(tensor.numpy\(\)\)"
    ):
        sdpa(torch.zeros(2, 4, 5, 8), K, K)


def test_nothing_that_was_asked_for_is_dropped_silently_when_empty():
    """torch validates nothing once a dim is 0; we do (torch_sdpa.md, Zero sizes)."""
    empty = np.zeros((2, 4, 0, 8), np.float32)
    for call, message in [
        (lambda: sdpa(empty, K, K, np.ones((5, 6), bool)), "without enlarging"),
        (lambda: sdpa(Q, empty, empty, dropout_p=3.0), "dropout probability"),
        (lambda: sdpa(Q, empty, empty, np.ones((5, 0), bool), is_causal=True), "attn_mask should not be set"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with sdpa_kernel([]), pytest.raises(RuntimeError, match="No viable backend"):
        sdpa(Q, K, K)
