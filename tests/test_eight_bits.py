"""Keys and values of 8 bits with scales: what they stand for, in both faces that take them, under every transform, and every error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make, quantised
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import check, lengths

from jax_sdpa import compat, dot_product_attention, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.varlen import varlen_attn
from jax_sdpa.device import assume_device

needs_mosaic = pytest.mark.skipif(compat.JAX_VERSION < (0, 11, 2), reason="the kernels need jax 0.11.2")
FP8 = jnp.float8_e4m3fn
STOPS = [19, 0, 40]


def swapped(x):
    return jnp.swapaxes(jnp.asarray(x), 1, 2)


def shape(sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("narrow", "scales", "dtype"), [(jnp.int8, "key", np.float32), (FP8, "head", jnp.bfloat16), (FP8, "one", np.float16)]
)  # fmt: skip
def test_values_and_the_querys_gradient_are_the_oracles(narrow, scales, dtype, backend):
    """With anything in what nobody sees, NaN among the scales too."""
    problem = make(3, 40, B=3, Hq=4, Hk=2, E=8, dlse=True, keep=lengths(3, 40, STOPS)).rounded(dtype)
    problem, eight = quantised(problem, narrow, scales, rounded_to=dtype, stretches=[(0, stop) for stop in STOPS])
    key, value = swapped(eight["key"]), swapped(eight["value"])

    @jax.jit
    def run(query, key_scale, value_scale, stops, dout, dlse):
        def call(query):
            return dot_product_attention(
                query, key, value, key_value_seq_lengths=stops, key_scale=key_scale, value_scale=value_scale, return_residual=True
            )

        (out, lse), pullback = jax.vjp(call, query)
        return out, lse, *pullback((dout.astype(out.dtype), dlse.astype(lse.dtype)))

    given = swapped(problem.query), eight["key_scale"], eight["value_scale"], jnp.array(STOPS)
    with sdpa_kernel(backend):
        out, lse, query = run(*given, swapped(problem.dout), swapped(problem.dlse))
    got = {name: np.asarray(swapped(x)) for name, x in (("out", out), ("lse", lse), ("query", query))}
    check(problem, got)


@pytest.mark.parametrize("scales", ["key", "head"])
def test_packed_tokens_and_pages(scales, backend):
    """The same keys behind one another, and on pages in a random order, whose hidden rows have any scale."""
    used, page, most = [9, 0, 16], 4, 4
    problem = make(1, 16, B=3, Hq=4, Hk=2, E=8, keep=lengths(1, 16, used)).rounded(np.float32)
    problem, eight = quantised(problem, FP8, scales, rounded_to=np.float32, stretches=[(0, n) for n in used])
    order = np.random.default_rng(0).permutation(3 * most)
    table = jnp.asarray(np.argsort(order).reshape(3, most))

    def tokens(x):  # (B, H, S, …) -> (B * S, H, …)
        return np.swapaxes(x, 1, 2).reshape(48, 2, *x.shape[3:])

    def scales_of(name, paged):
        x = eight[name]
        if scales == "head":
            return jnp.asarray(x[0])
        return jnp.swapaxes(tokens(x).reshape(-1, page, 2)[order], 1, 2) if paged else jnp.asarray(tokens(x).T)

    @jax.jit
    def run(query, key, value, table, key_scale, value_scale):
        cu, paged = jnp.arange(4), table is not None
        return varlen_attn(
            query, key, value, cu, None if paged else 16 * cu, 1, 16, enable_gqa=True, seqused_k=jnp.array(used), block_table=table,
            key_scale=key_scale, value_scale=value_scale,
        )  # fmt: skip

    for paged in (False, True):
        key, value = (tokens(eight[name]) for name in ("key", "value"))
        if paged:
            key, value = (x.reshape(-1, page, 2, 8)[order] for x in (key, value))
        of_keys = (scales_of(name, paged) for name in ("key_scale", "value_scale"))
        with sdpa_kernel(backend):
            out = run(problem.query[:, :, 0], key, value, table if paged else None, *of_keys)
        check(problem, {"out": np.asarray(out)[:, :, None]})


@pytest.mark.parametrize("mapped", [(0, None, None), (0, 0, 0)])
def test_under_vmap(mapped):
    """Queries, keys or scales of each entry, or shared ones; with pages too, whose scales are a pool's."""
    rng = np.random.default_rng(0)
    query, scale = (jnp.asarray(rng.uniform(0.1, 1, sizes), jnp.float32) for sizes in ((2, 3, 1, 4, 8), (2, 5, 2, 8)))
    key = jnp.asarray(rng.integers(-9, 9, (2, 5, 8, 2, 8)), jnp.int8)
    query, key, scale = (x if dim == 0 else x[0] for x, dim in zip((query, key, scale), mapped, strict=True))

    def contiguous(query, key, scale):
        return dot_product_attention(query, key[:3], key[:3], key_scale=scale[:3], value_scale=scale[:3, :, :1])

    def paged(query, key, scale):
        table, used = jnp.array([[4, 0], [2, 2], [1, 3]]), jnp.array([9, 16, 3])
        return varlen_attn(
            query[:, 0], key, key, jnp.arange(4), None, 1, 16, enable_gqa=True, seqused_k=used, block_table=table, key_scale=scale,
            value_scale=scale[:, :1],
        )  # fmt: skip

    for call in map(jax.jit, (contiguous, paged)):
        got = jax.jit(jax.vmap(call, mapped))(query, key, scale)
        for i in range(2):
            alone = call(*(x[i] if dim == 0 else x for x, dim in zip((query, key, scale), mapped, strict=True)))
            np.testing.assert_allclose(got[i], alone, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 4])
def test_scales_are_divided_as_keys_and_heads_are(heads, backend):
    """Over batch and heads; two heads, of which several devices share each, are taken apart on the device."""
    mesh = jax.make_mesh((2, 4), ("b", "h"), devices=jax.devices("cpu")[:8])
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((2, 1, 8, 8)), jnp.float32)
    key = jnp.asarray(rng.integers(-9, 9, (2, 24, heads, 8)), jnp.int8)
    key_scale, value_scale = (jnp.asarray(rng.uniform(0.1, 1, sizes), jnp.float32) for sizes in ((2, heads, 24), (1, heads, 1)))
    own = "h" if heads == 4 else None
    specs = P("b", None, "h"), P("b", None, own), P("b", own), P(None, own)

    @jax.jit
    def call(query, key, key_scale, value_scale):
        return dot_product_attention(query, key, key, key_scale=key_scale, value_scale=value_scale)

    given = query, key, key_scale, value_scale
    with sdpa_kernel(backend):
        wanted = call(*given)
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, specs, strict=True)]
        text = call.lower(*placed).compile().as_text()
        got = call(*placed)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, specs[0]), 4)
    assert not re.search("all-gather|all-to-all", text)


@pytest.mark.parametrize("narrow", [FP8, pytest.param(jnp.int8, marks=pytest.mark.slow)])
def test_a_cpu_widens_a_block_at_a_time(narrow):
    """Blocks that do not divide the keys, lengths that are traced: the numbers of the widened copy, and no copy of anything."""
    key = jax.random.randint(jax.random.key(0), (8, 1100, 2, 64), -9, 9, jnp.int8).astype(narrow)
    key_scale, value_scale = (jax.random.uniform(jax.random.key(1), sizes) for sizes in ((8, 2, 1100), (1, 2, 1)))
    query, stops = jax.random.normal(jax.random.key(2), (8, 1, 4, 64)), jnp.array([1100, 513, 0, 1, 550, 1099, 7, 600])

    def call(query, key, key_scale, value_scale, stops):
        return dot_product_attention(query, key, key, key_value_seq_lengths=stops, key_scale=key_scale, value_scale=value_scale)

    given = query, key, key_scale, value_scale, stops
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        program = jax.jit(call).lower(*given).compile()
        b, s = jax.export.symbolic_shape("b, s")
        symbolic = [
            shape(own, x.dtype) for own, x in zip(((b, 1, 4, 64), (b, s, 2, 64), (b, 2, s), (1, 2, 1), (b,)), given, strict=True)
        ]
        exported = jax.export.export(jax.jit(call))(*symbolic)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = call(*given)
    np.testing.assert_allclose(program(*given), wanted, atol=1e-5)
    np.testing.assert_allclose(exported.call(*given), wanted, atol=1e-5)
    assert program.memory_analysis().temp_size_in_bytes < key.size


def test_export_and_the_derivative_of_a_derivative():
    key, scale = jnp.full((1, 4, 1, 8), 3, jnp.int8), jnp.full((1, 1, 4), 0.1)

    def call(query):
        return dot_product_attention(query, key, key, key_scale=scale, value_scale=scale)

    query = jnp.linspace(-1, 1, 16).reshape(1, 1, 2, 8)
    exported = jax.export.deserialize(jax.export.export(jax.jit(call))(query).serialize())
    np.testing.assert_allclose(exported.call(query), 0.3 * jnp.ones((1, 1, 2, 8)), rtol=1e-6)
    hessian = jax.jit(lambda query: jax.jvp(jax.grad(lambda query: (call(query) ** 2).sum()), (query,), (query,))[1])(query)
    np.testing.assert_allclose(hessian, 0, atol=1e-6)  # all keys are alike


Q, K, KEY_SCALE = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8), jnp.int8), jnp.ones((2, 2, 5))
ERRORS = {
    "no scales": ({"key_scale": None, "value_scale": None}, TypeError, "8 bits need key_scale and value_scale"),
    "one scale": ({"value_scale": None}, ValueError, "go together, got key_scale without value_scale"),
    "the other": ({"key_scale": None}, ValueError, "go together, got value_scale without key_scale"),
    "float keys": ({"key": Q[:, :, :2], "value": Q[:, :, :2]}, TypeError, "Without scales they have the query's dtype"),
    "two dtypes": ({"value": K.astype(FP8)}, TypeError, "of one dtype, int8 or float8_e4m3fn, .* value.dtype: float8_e4m3fn"),
    "unsigned": ({"key": K.astype(jnp.uint8), "value": K.astype(jnp.uint8)}, TypeError, "key.dtype: uint8"),
    "a query of 8 bits": ({"query": K}, TypeError, "Expected query, key and value of dtype .* but got int8"),
    "integer scales": ({"key_scale": KEY_SCALE.astype(int)}, TypeError, "key_scale must be a float array, got int32"),
    "lengths before heads": ({"value_scale": jnp.ones((2, 5, 2))}, ValueError, r"value_scale must broadcast into \(2, 2, 5\) .* got \(2, 5, 2\). Heads stand"),
    "too many dims": ({"key_scale": jnp.ones((2, 2, 5, 1))}, ValueError, "key_scale must broadcast into"),
    "a list": ({"key_scale": [1.0]}, TypeError, "key_scale must be a JAX or NumPy array"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, error, message = ERRORS[name]
    given = {"query": Q, "key": K, "value": K, "key_scale": KEY_SCALE, "value_scale": KEY_SCALE, **changes}
    with pytest.raises(error, match=message):
        dot_product_attention(**given)


def test_errors_of_the_other_faces_and_of_derivatives():
    with pytest.raises(TypeError, match=r"the same dtype.* of a call that takes them"):
        scaled_dot_product_attention(Q, K, K)
    pool = jnp.ones((5, 8, 4, 8), jnp.int8)
    with pytest.raises(ValueError, match=r"key_scale must broadcast into \(5, 4, 8\) .* got \(5, 8, 4\)"):
        varlen_attn(
            Q[0], pool, pool, jnp.array([0, 3]), None, 3, 8, seqused_k=jnp.array([4]), block_table=jnp.zeros((1, 1), int),
            key_scale=jnp.ones((5, 8, 4)), value_scale=jnp.ones(1),
        )  # fmt: skip
    given = Q, K.astype(FP8), K.astype(FP8), KEY_SCALE, KEY_SCALE
    for i, name in ((1, "key"), (2, "value"), (3, "key_scale"), (4, "value_scale")):

        def loss(q, k, v, key_scale, value_scale):
            return dot_product_attention(q, k, v, key_scale=key_scale, value_scale=value_scale).sum()

        with pytest.raises(ValueError, match=f"^{name} has no derivative where keys and values are of 8 bits"):
            jax.grad(lambda q, x, i=i: loss(*(x if j == i else y for j, y in enumerate(given))), 1)(Q, given[i])


def explained(query, cache, scale, device="cuda:sm90", **options):
    query, cache = shape((2, 1, 28, 128), query), shape((2, 4096, 4, 128), cache)
    scale = shape(scale, jnp.float32)
    return explain(query, cache, cache, key_scale=scale, value_scale=scale, call=dot_product_attention, device=device, **options)


def test_explain_says_who_widens_them():
    assert (
        "Keys and values of int8 are widened on their way: no copy is made." in explained(jnp.float32, jnp.int8, (1,), "cpu").notes
    )
    with sdpa_kernel(SDPBackend.MATH):
        notes = explained(jnp.float32, jnp.int8, (1,), "cpu").notes
    assert "Keys and values of int8 are widened first: a copy of them in float32." in notes


@needs_mosaic
def test_a_decode_on_a_hopper_that_is_not_here_copies_nothing():
    """bfloat16 queries take the kernel, with scales of any shape; float16 ones, whose range their scales may leave, a copy."""
    for query, cache, scale, copies in (
        (jnp.bfloat16, jnp.int8, (2, 4, 4096), False), (jnp.bfloat16, FP8, (1, 4, 1), False), (jnp.float16, jnp.int8, (), True)
    ):  # fmt: skip
        choice = explained(query, cache, scale)
        assert choice.backend is SDPBackend.FLASH_ATTENTION
        assert any(f"widened {'first' if copies else 'on their way'}" in note for note in choice.notes)
        operands = shape((2, 1, 28, 128), query), shape((2, 4096, 4, 128), cache), shape(scale, jnp.float32)

        def call(q, k, s):
            return dot_product_attention(q, k, k, key_scale=s, value_scale=s)

        with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
        assert bool(re.search(r"4096x4x128x(bf16|f16|f32)>", text)) == copies
    assert any("but for gradients, by a copy" in note for note in explained(jnp.bfloat16, jnp.int8, (1,), grad=True).notes)
