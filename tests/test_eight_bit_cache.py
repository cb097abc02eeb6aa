"""A cache of int8 or float8_e4m3fn with a scale per token and head: the rounding, the slots, and the layer on what it holds."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention_layer import LAYERS, MESHES, TRIANGLE, WITHIN, B, F, L, X, by_definition, make, visible

from jax_sdpa import dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.nn import Attention, KVCache, MeshAxes, Rope, eight_bits
from jax_sdpa.nn.cache import Chunk

DTYPES = (jnp.int8, jnp.float8_e4m3fn)
eight = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def widened(x8, scale):
    """(…, S, H, E) from 8 bits and scales (…, H, S)."""
    return np.asarray(x8).astype(np.float32) * np.asarray(scale).swapaxes(-1, -2)[..., None]


def held(cache):
    return widened(cache.key, cache.key_scale), widened(cache.value, cache.value_scale)


def rounding(x, dtype):
    """The most that each element of x may be off by."""
    x = np.abs(np.asarray(x, np.float64))
    largest = x.max(-1, keepdims=True)
    return largest / 254 + 0 * x if dtype == jnp.int8 else np.maximum(x / 16, largest / 448 * 2.0**-10)


@eight
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_the_rounding(dtype, given):
    x = draw(0, 64, 48) * 2.0 ** np.arange(-60, 68, 2, dtype=np.float32)[:, None]
    x[:, ::7] *= 1e-4
    x = jnp.asarray(x, given)
    codes, scale = eight_bits.quantised(x, dtype)
    assert (codes.dtype, scale.dtype, scale.shape) == (dtype, jnp.float32, (64,))
    found = np.asarray(codes.astype(jnp.float32), np.float64)
    off = np.abs(found * np.asarray(scale, np.float64)[:, None] - np.asarray(x, np.float64))
    assert (off <= rounding(x, dtype) * (1 + 1e-5)).all()
    assert (np.abs(found).max(-1) == (127 if dtype == jnp.int8 else 448)).all()


@eight
def test_rows_that_no_scale_fits(dtype):
    tiny, huge = 1e-38, float(jnp.finfo(jnp.float32).max)
    x = jnp.array([[0, 0, 0], [tiny, -tiny, 0], [huge, -huge, 1], [1, jnp.nan, 2], [jnp.inf, 1, 0], [0, -jnp.inf, jnp.nan]])
    for quantised in (eight_bits.quantised, jax.jit(eight_bits.quantised, static_argnums=1)):
        codes, scale = quantised(x, dtype)
        assert jnp.isfinite(scale[:3]).all()
        assert jnp.isfinite(codes.astype(jnp.float32)).all()
        assert jnp.all(codes[:2] == 0)
        got = codes.astype(jnp.float32) * scale[:, None]
        np.testing.assert_allclose(got[2], [huge, -huge, 0], rtol=1e-6)
        assert jnp.isnan(got[3:]).all()


SLOTS = [
    (jnp.int8, 4),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(jnp.int8, None), (jnp.float8_e4m3fn, 4), (jnp.float8_e4m3fn, None)]
    ),
]


@pytest.mark.parametrize(("dtype", "window"), SLOTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_slots_and_the_view_are_those_of_a_float_cache_of_rounded_tokens(dtype, window):
    """Chunks with padding on either side, a chunk longer than the ring, single tokens; two caches at once, by vmap."""

    def rounded(x):
        codes, scale = eight_bits.quantised(x, dtype)
        return codes.astype(jnp.float32) * scale[..., None]

    def step(cache, exact, key, value, chunk):
        return cache.extend(key, value, chunk, window), exact.extend(rounded(key), rounded(value), chunk, window)

    step = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, None)))
    cache, exact = (KVCache.empty(2, 24, 3, 8, 5, dtype=held, window=window) for held in (dtype, jnp.float32))
    assert cache.key_scale.shape == (2, 3, cache.slots)
    cache, exact = jax.tree.map(lambda x: np.stack([x, x]), (cache, exact))
    chunks = [([2, 0], [3, 5]), ([0, 0], [1, 0]), ([0, 0], [2, 5]), ([0, 0], [1, 1])]
    for i, (size, (first, count)) in enumerate(zip((5, 1, 5, 1), chunks, strict=True)):
        chunk = Chunk(np.array(first, np.int32), np.array(count, np.int32))
        key, value = (draw(10 * i + j, 2, 2, size, 3, n) for j, n in enumerate((8, 5)))
        (cache, view), (exact, wanted) = step(cache, exact, key, value, chunk)
        for got, want in ((cache, exact), (view, wanted)):
            np.testing.assert_array_equal(widened(got.key, got.key_scale), want.key)
            np.testing.assert_array_equal(widened(got.value, got.value_scale), want.value)
        jax.tree.map(np.testing.assert_array_equal, (view.mask, cache.lengths), (wanted.mask, exact.lengths))
    assert np.ptp(wanted.key, 0).max() > 1


def test_the_pytree():
    """A float cache has the three leaves that it had before there were scales."""

    def names(cache):
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]

    plain, cache = KVCache.empty(1, 4, 1, 8, window=2), KVCache.empty(1, 4, 1, 8, dtype=jnp.int8, window=2)
    assert names(plain) == [".key", ".value", ".lengths"]
    assert names(cache) == [".key", ".value", ".lengths", ".key_scale", ".value_scale"]
    again = jax.tree.map(lambda x: x, cache)
    assert (again.window, again.key_scale.shape, plain.key_scale) == (2, (1, 1, 2), None)
    assert jax.tree.structure(jax.tree.map(lambda _: None, cache), is_leaf=lambda x: x is None) == jax.tree.structure(cache)
    with pytest.raises(TypeError, match=r"a cache is of float16, .*, int8, float8_e4m3fn, got uint8"):
        KVCache.empty(1, 4, 1, 8, dtype=jnp.uint8)
    with pytest.raises(ValueError, match="make the cache for this batch and dtype"):
        cache.extend(jnp.ones((1, 1, 1, 8), int), jnp.ones((1, 1, 1, 8), int), Chunk.of(1, 1), 2)


def test_a_derivative_through_it_is_an_error():
    layer = make()
    with pytest.raises(ValueError, match="has no derivative where keys and values are of 8 bits"):
        jax.eval_shape(jax.grad(lambda x: layer(x, cache=layer.make_cache(B, 16, jnp.int8))[0].sum()), X)


@pytest.mark.parametrize("size", [1, 64])
def test_a_donated_cache_is_written_in_place(size):
    cache = jax.eval_shape(lambda: KVCache.empty(8, 4096, 4, 128, dtype=jnp.int8))
    new = jax.ShapeDtypeStruct((8, size, 4, 128), jnp.bfloat16)
    write = jax.jit(lambda cache, k, v: cache.extend(k, v, Chunk.of(8, size))[0], donate_argnums=0)
    memory = write.lower(cache, new, new).compile().memory_analysis()
    held = 2 * 8 * 4096 * 4 * (128 + 4)
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 16


@eight
def test_how_far_a_decode_step_is_off(dtype, backend_of_layers):
    """By no more than follows from the rounding of each key and value; and it is attention over what the cache holds."""
    q, k, v = (draw(i, 2, n, 2, 16) for i, n in enumerate((1, 40, 40)))

    @jax.jit
    def step(q, k, v):
        cache, _ = KVCache.empty(2, 48, 2, 16, dtype=dtype).extend(k[:, :-1], v[:, :-1], Chunk.of(2, 39))
        cache, view = cache.extend(k[:, -1:], v[:, -1:], Chunk.of(2, 1))
        scales = {"key_scale": view.key_scale, "value_scale": view.value_scale}
        return cache, dot_product_attention(q, view.key, view.value, mask=view.mask, **scales)

    def exact(k, v):
        weights = np.exp(np.einsum("blhe,bshe->blhs", q, k) / 4)
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("blhs,bshe->blhe", weights, v), weights

    with sdpa_kernel(backend_of_layers):
        cache, got = step(q, k, v)
    np.testing.assert_allclose(got, exact(*(y[:, :40].astype(np.float64) for y in held(cache)))[0], atol=1e-6)
    wanted, weights = exact(k.astype(np.float64), v.astype(np.float64))
    score = np.einsum("blhe,bshe->blhs", np.abs(q), rounding(k, dtype)).max(-1) / 4  # the most that a score is off by: (B, L, H)
    factor = np.exp(2 * score)[..., None]  # and a weight
    most = np.einsum("blhs,bshe->blhe", weights, np.abs(v)) * (factor - 1)
    most += np.einsum("blhs,bshe->blhe", weights, rounding(v, dtype)) * factor
    off = np.abs(got - wanted)
    assert (off <= most + 1e-6).all()
    assert off.max() > 1e-4  # it was rounded
    assert off.max() < (0.01 if dtype == jnp.int8 else 0.06)  # of outputs with a deviation of 0.3


def stepping(layer):
    graph, state = nnx.split(layer)
    return jax.jit(lambda x, cache, lengths=None: nnx.merge(graph, state)(x, cache=cache, lengths=lengths))


@pytest.mark.parametrize("name", ["grouped, rope", pytest.param("everything", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [jnp.int8, pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.slow)], ids=["int8", "float8"])
def test_the_layer(name, dtype, backend_of_layers):
    """Prefill, chunk and decode are the definition over the keys and values that the cache holds; a ring gives the same."""
    layer = make(**LAYERS[name])
    step = stepping(layer)

    def by_steps(cache):
        out = []
        for start, stop in ((0, 6), (6, 12), (12, L)):
            y, cache = step(X[:, start:stop], cache)
            out.append(y)
        return np.concatenate(out, 1), cache

    with sdpa_kernel(backend_of_layers):
        got, cache = by_steps(KVCache.empty(B, 16, 2, layer.head_dim, dtype=dtype))
        ring, kept = by_steps(layer.make_cache(B, 16, dtype))
    k8, v8 = (y[:, :L] for y in held(cache))
    np.testing.assert_allclose(got, by_definition(layer, X, visible(layer), held=(k8, v8)), atol=WITHIN)
    off = np.abs(got - by_definition(layer, X, visible(layer))).max()
    assert (
        1e-3 < off < (0.02 if dtype == jnp.int8 else 0.12)
    )  # outputs have a deviation of 0.6; float8 keeps 3 bits behind the first
    np.testing.assert_allclose(ring, got, atol=WITHIN)
    assert (kept.key.dtype, kept.slots) == (dtype, layer.window or 16)


@pytest.mark.parametrize("window", [None, 4], ids=["plain cache", "ring"])
def test_nan_in_padding_in_a_token_and_of_a_full_cache(window):
    layer = make(window=window)
    step = stepping(layer)
    x = np.array(X)
    x[1, 5:] = np.nan
    got, cache = step(x, layer.make_cache(B, 14, jnp.int8), np.array([L, 5, L]))
    assert not np.isnan(got).any()
    assert not np.isnan(cache.key_scale).any()
    token = x[:, :1].copy()
    token[2] = np.nan
    got, after = step(token, cache, np.array([1, 0, 1]))
    assert np.isnan(got).all((1, 2)).tolist() == [False, False, True]  # a token that is NaN, and no other sequence
    got, _ = step(x[:, :1], after, np.array([1, 1, 1]))
    assert np.isnan(got).all((1, 2)).tolist() == [window is None, False, True]  # a full cache; what is NaN stays


@pytest.mark.slow
@eight
def test_in_half_precision_under_jit_and_scan_over_layers(dtype):
    """A stack of bfloat16 layers with 8-bit rings through nnx.scan: what each of them gives alone."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0)
    def stacked(rngs):
        return Attention(F, 4, 2, rope=Rope(), window=6, dtype=jnp.bfloat16, rngs=rngs)

    stack = stacked(nnx.Rngs(0))
    graph, state = nnx.split(stack)
    layers = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(2)]
    alone = [layer.make_cache(B, 16, dtype) for layer in layers]
    caches = jax.tree.map(lambda *x: jnp.stack(x), *alone)

    @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def through(layer, x, cache):
        y, cache = layer(x, cache=cache)
        return x + y, cache

    step = nnx.jit(lambda stack, x, caches: through(stack, x, caches))
    x = X.astype(jnp.bfloat16)
    for start, stop in ((0, 7), (7, 8), (8, L)):
        got, caches = step(stack, x[:, start:stop], caches)
        want = x[:, start:stop]
        for i, layer in enumerate(layers):
            y, alone[i] = layer(want, cache=alone[i])
            want = want + y
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.03)
    assert (caches.key.dtype, caches.key_scale.dtype) == (dtype, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_sharded(name):
    """Scales are divided with their keys, nothing is gathered, and the numbers are those of the keys that are held."""
    shape, kind = MESHES[name]
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)
    x = jnp.concatenate([X, X[:1]])[:, :5]
    plain = Attention(F, 4, 2, rope=Rope(), rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        layer = Attention(F, 4, 2, rope=Rope(), mesh_axes=MeshAxes(), rngs=nnx.Rngs(0))
        cache = jax.jit(lambda: layer.make_cache(4, 16, jnp.int8))()
        graph, state = nnx.split(layer)
        step = jax.jit(lambda state, x, cache: nnx.merge(graph, state)(x, cache=cache))
        first, token = (jax.device_put(y, NamedSharding(mesh, P("data"))) for y in (x[:, :4], x[:, 4:]))
        got, cache = step(state, first, cache)
        program = step.lower(state, token, cache).compile()
        more, after = program(state, token, cache)
    keys = [jnp.asarray(y[:, :5]) for y in held(jax.device_get(after))]
    wanted = by_definition(plain, x, np.broadcast_to(TRIANGLE[0, :5, :5], (4, 5, 5)), held=keys)
    np.testing.assert_allclose(jnp.concatenate(jax.device_get([got, more]), 1), wanted, atol=WITHIN)
    assert not any(word in program.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
    kv = "tensor" if shape[1] == 2 else None
    for scale in (after.key_scale, after.value_scale):
        assert scale.sharding.is_equivalent_to(NamedSharding(mesh, P("data", kv, None)), 3)


@pytest.mark.gpu
@eight
def test_decode_by_the_kernels(dtype):
    """A layer's decode step on FLASH, which reads the cache as it is, beside the definition on the same cache."""
    layer = Attention(256, 8, 2, 64, rope=Rope(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(draw(0, 2, 300, 256), jnp.bfloat16)
    _, cache = layer(x[:, :-1], cache=layer.make_cache(2, 512, dtype), lengths=jnp.array([299, 140]))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got, after = stepping(layer)(x[:, -1:], cache)
    with sdpa_kernel(SDPBackend.MATH):
        wanted, _ = stepping(layer)(x[:, -1:], cache)
    got, wanted = (np.asarray(y, np.float32) for y in (got, wanted))
    np.testing.assert_allclose(got, wanted, atol=2.0**-6 * np.abs(wanted).max())  # two bits of the largest
    assert (after.key.dtype, after.lengths.tolist()) == (dtype, [300, 141])


@pytest.mark.slow
@eight
def test_orbax(dtype, tmp_path):
    import orbax.checkpoint as checkpoint

    layer = make(window=4)
    _, cache = layer(X, cache=layer.make_cache(B, 16, dtype))
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", {"cache": cache})
    like = jax.eval_shape(lambda: layer.make_cache(B, 16, dtype))
    with checkpoint.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "step", {"cache": like})["cache"]
    assert restored.window == 4
    jax.tree.map(np.testing.assert_array_equal, restored, cache)


@pytest.mark.parametrize("name", ["eight_bits", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cache", "layer"))])
def test_docstring_examples_hold(name):
    assert doctest.testmod(importlib.import_module(f"jax_sdpa.nn.{name}")).failed == 0
