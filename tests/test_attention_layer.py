"""`jax_sdpa.nn.Attention` and its cache: against a NumPy definition, in every way to cut a sequence, and inside Flax's transforms."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sdpa import dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths
from jax_sdpa.nn import Attention, KVCache, MeshAxes, Rope, positions_in_segments
from jax_sdpa.nn.cache import Chunk

F, L, B = 32, 13, 3
X = jax.random.normal(jax.random.key(0), (B, L, F))
WITHIN = 3e-6


def make(seed=0, **options):
    options = {"q_heads": 4, "kv_heads": 2, "rope": Rope(), **options}
    layer = Attention(F, rngs=nnx.Rngs(seed, dropout=1), **options)
    for parameter in jax.tree.leaves(nnx.state(layer, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        if parameter.ndim < 3:  # biases, scales and sinks begin as constants, which hide errors
            parameter.set_value(parameter[...] + 0.3 * jax.random.normal(jax.random.key(parameter.size), parameter.shape))
    nnx.update(layer, nnx.state(layer, nnx.Param))
    return layer


def by_definition(layer, x, keep, positions=None, held=None):
    """The layer in NumPy, float64, a query at a time; keep: (B, L, L) bool; held: keys and values (B, L, H, E) instead of its own."""

    def params(module):
        return {
            name: np.asarray(getattr(module, name)[...], np.float64)
            for name in ("kernel", "bias")
            if getattr(module, name, None) is not None
        }

    def project(module):
        p = params(module)
        return np.einsum("blf,fhe->blhe", x, p["kernel"]) + p.get("bias", 0)

    def norm(y, module):
        if module is None:
            return y
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(module.scale[...], np.float64)

    def rotate(y):
        if layer.rope is None:
            return y
        D = round(y.shape[-1] * layer.rope.fraction)
        angle = where[:, :, None] * layer.rope.theta ** (-np.arange(0, D, 2) / D)  # (B, L, D/2)
        turn = np.exp(1j * angle)[:, :, None]
        z = (y[..., : D // 2] + 1j * y[..., D // 2 : D]) * turn
        return np.concatenate([z.real, z.imag, y[..., D:]], -1)

    x = np.asarray(x, np.float64)
    where = np.broadcast_to(np.arange(x.shape[1]) if positions is None else positions, x.shape[:2])
    q, k, v = (
        rotate(norm(project(layer.query), layer.query_norm)),
        rotate(norm(project(layer.key), layer.key_norm)),
        project(layer.value),
    )
    k, v = (k, v) if held is None else (np.asarray(y, np.float64) for y in held)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, i in itertools.product(*map(range, (q.shape[0], q.shape[2], q.shape[1]))):
        group = h * k.shape[2] // q.shape[2]
        seen = keep[b, i]
        s = k[b, seen, group] @ q[b, i, h] * (layer.scale or q.shape[-1] ** -0.5)
        s = s if layer.softcap is None else layer.softcap * np.tanh(s / layer.softcap)
        sink = 0 if layer.sinks is None else np.exp(np.asarray(layer.sinks[...], np.float64)[h])
        if seen.any():
            out[b, i, h] = np.exp(s) @ v[b, seen, group] / (np.exp(s).sum() + sink)
    p = params(layer.out)
    return np.einsum("blhe,hef->blf", out, p["kernel"]) + p.get("bias", 0)


I, J = np.arange(L)[:, None], np.arange(L)[None]
TRIANGLE = np.broadcast_to(J <= I, (B, L, L))
IDS = jnp.array([[0] * 5 + [1] * 8, [0] * 2 + [1] * 3 + [2] * 7 + [-1], [3] * 13])

LAYERS = {
    "plain": {"rope": None, "kv_heads": None},
    "grouped, rope": {},
    "one kv head, biases": {"kv_heads": 1, "qkv_bias": True, "out_bias": True},
    "q/k norm, half of the head rotated": {"qk_norm": True, "rope": Rope(1e6, 0.5)},
    "window": {"window": 4},
    "softcap, sinks, scale": {"softcap": 2.0, "sinks": True, "scale": 0.7},
    "head dims of their own": {"head_dim": 6, "value_head_dim": 10},
    "everything": {"window": 5, "softcap": 3.0, "sinks": True, "qk_norm": True, "qkv_bias": True, "head_dim": 16},
}


def visible(layer):
    return TRIANGLE if layer.window is None else TRIANGLE & (I - J < layer.window)


SLOW = ("one kv head, biases", "head dims of their own")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYERS])
def test_the_definition(name, backend_of_layers):
    layer = make(**LAYERS[name])
    with sdpa_kernel(backend_of_layers):
        got = layer(X)
        one = layer(X[0])
    np.testing.assert_allclose(got, by_definition(layer, X, visible(layer)), atol=WITHIN)
    np.testing.assert_allclose(one, got[0], atol=WITHIN)


def test_an_encoder_sees_both_sides(backend_of_layers):
    layer = make(is_causal=False, window=3, rope=None)
    lengths = jnp.array([L, 4, 0])
    keep = (abs(I - J) < 3) & (J < np.array(lengths)[:, None, None])
    with sdpa_kernel(backend_of_layers):
        got = layer(X, lengths=lengths)
    expected = by_definition(layer, X, np.broadcast_to(keep, (B, L, L)))
    for b, length in enumerate((L, 4, 0)):
        np.testing.assert_allclose(got[b, :length], expected[b, :length], atol=WITHIN)
        assert jnp.all(got[b, length:] == 0)
    with pytest.raises(ValueError, match="a cache is for causal attention"):
        layer.make_cache(1, 4)


def test_packed_rows(backend_of_layers):
    """Each segment as if it were alone, its positions from 0; padding gives 0."""
    layer = make(**LAYERS["everything"])
    ids = np.asarray(IDS)
    keep = visible(layer) & (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
    assert positions_in_segments(IDS)[1].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0]
    with sdpa_kernel(backend_of_layers):
        got = layer(X, segment_ids=IDS)
        alone = layer(X[:1, 5:])
    np.testing.assert_allclose(got, by_definition(layer, X, keep, np.asarray(positions_in_segments(IDS))), atol=WITHIN)
    np.testing.assert_allclose(got[:1, 5:], alone, atol=WITHIN)


def test_a_mask_of_ones_own(backend_of_layers):
    layer = make()
    keep = jax.random.bernoulli(jax.random.key(3), 0.5, (B, 1, L, L))
    with sdpa_kernel(backend_of_layers):
        got = layer(X, mask=keep)
        structured = layer(X, mask=KeyLengths(jnp.array([4, 13, 1])))
    np.testing.assert_allclose(got, by_definition(layer, X, TRIANGLE & np.asarray(keep)[:, 0]), atol=WITHIN)
    keep = TRIANGLE & (J < np.array([4, 13, 1])[:, None, None])
    np.testing.assert_allclose(structured, by_definition(layer, X, keep), atol=WITHIN)


@functools.cache
def jitted(name):
    """(layer, the traced function, its traces): one program for each chunk length."""
    layer, traces = make(**LAYERS[name]), []

    @nnx.jit(static_argnames="padding")
    def step(layer, x, cache, lengths, padding):
        traces.append(x.shape[1])
        return layer(x, cache=cache, lengths=lengths, padding=padding)

    return layer, step, traces


CUTS = {"all": (13,), "chunks": (5, 5, 3), "longer than the ring": (1, 9, 3), "one by one": (1,) * 13, "mixed": (5, 1, 1, 3, 3)}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", ["grouped, rope", "everything", pytest.param("window", marks=pytest.mark.slow)])
def test_prefill_chunks_and_decode(name, cuts, backend_of_layers):
    """However a sequence is cut, it is the same function, from one program for each length of chunk."""
    layer, step, _ = jitted(name)
    traces, out, start = [], [], 0
    with sdpa_kernel(backend_of_layers):
        cache, full = layer.make_cache(B, 16), layer(X)
        for size in CUTS[cuts]:
            before = len(jitted(name)[2])
            y, cache = step(layer, X[:, start : start + size], cache, jnp.full(B, size), "right")
            traces += jitted(name)[2][before:]
            out, start = [*out, y], start + size
    np.testing.assert_allclose(jnp.concatenate(out, 1), full, atol=WITHIN)
    assert len(traces) <= len(set(CUTS[cuts]))
    assert cache.lengths.tolist() == [L] * B
    assert cache.slots == (layer.window or 16)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", [pytest.param("grouped, rope", marks=pytest.mark.slow), "window"])
def test_padded_batches(name, padding, backend_of_layers):
    """Sequences of 8, 5 and 1 tokens in one batch, then a chunk of 3, 0 and 2, then decode with one of them finished."""
    layer, step, _ = jitted(name)
    plan = [(9, (8, 5, 1)), (3, (3, 0, 2)), (1, (1, 1, 0)), (1, (1, 1, 1))]
    taken = np.zeros(B, int)
    with sdpa_kernel(backend_of_layers):
        cache, full = layer.make_cache(B, 16), layer(X)
        for size, counts in plan:
            first = [size - n if padding == "left" else 0 for n in counts]
            x = np.full((B, size, F), 1e3, np.float32)  # padding that would be seen if it took part
            for b, n in enumerate(counts):
                x[b, first[b] : first[b] + n] = X[b, taken[b] : taken[b] + n]
            got, cache = step(layer, jnp.asarray(x), cache, jnp.array(counts), padding)
            for b, n in enumerate(counts):
                np.testing.assert_allclose(got[b, first[b] : first[b] + n], full[b, taken[b] : taken[b] + n], atol=WITHIN)
                assert np.all(np.delete(np.asarray(got[b]), np.arange(first[b], first[b] + n), 0) == 0)
            taken += counts
    assert cache.lengths.tolist() == taken.tolist()
    without = layer(jnp.asarray(X), lengths=jnp.array([L, 6, 2]), padding=padding)  # no cache: the same two sides
    for b, n in enumerate((L, 6, 2)):
        alone = layer(X[b : b + 1, L - n :] if padding == "left" else X[b : b + 1, :n])
        np.testing.assert_allclose(without[b, L - n :] if padding == "left" else without[b, :n], alone[0], atol=WITHIN)


@pytest.mark.parametrize("options", [{}, {"window": 4}], ids=["plain cache", "ring"])
def test_what_padding_holds_never_matters(options):
    layer = make(**options)
    x = X.at[1, 5:].set(jnp.nan)
    got, cache = layer(x, cache=layer.make_cache(B, 32), lengths=jnp.array([L, 5, L]))
    assert not jnp.isnan(got).any()
    assert not jnp.isnan(cache.key).any()
    got, cache = layer(x[:, ::-1], cache=cache, lengths=[L, 5, L], padding="left")
    assert not jnp.isnan(got).any()
    assert not jnp.isnan(cache.value).any()


def test_a_full_cache_gives_nan_and_a_ring_goes_on():
    layer = make()
    _, cache = layer(X, cache=layer.make_cache(B, L))
    got, _ = layer(X[:, :1], cache=cache, lengths=jnp.array([1, 0, 1]))
    assert jnp.isnan(got[0]).all()
    assert jnp.all(got[1] == 0)
    with pytest.raises(ValueError, match="a chunk of 13 tokens does not fit a cache of 12"):
        layer(X, cache=layer.make_cache(B, 12))
    ring = make(window=4)
    cache = ring.make_cache(B, 10**6)
    assert cache.key.shape == (B, 4, 2, 8)
    for _ in range(2):
        got, cache = ring(X, cache=cache)
    assert not jnp.isnan(got).any()


def test_errors_say_what_to_do():
    layer = make(window=4)
    cache = layer.make_cache(B, 16)
    with pytest.raises(ValueError, match="a ring for a window of 4, the attention has window=5"):
        make(window=5)(X, cache=cache)
    with pytest.raises(ValueError, match="make the cache for this batch"):
        layer(X[:2], cache=cache)
    with pytest.raises(ValueError, match="segment_ids and mask belong to training"):
        layer(X, cache=cache, segment_ids=IDS)
    with pytest.raises(ValueError, match="give padding a negative segment id"):
        layer(X, lengths=jnp.array([1, 2, 3]), segment_ids=IDS)
    with pytest.raises(ValueError, match="'left' or 'right'"):
        layer(X, lengths=jnp.array([1, 2, 3]), padding="up")
    with pytest.raises(ValueError, match=r"lengths must be integers of shape \(3,\)"):
        layer(X, lengths=jnp.array([1, 2]))
    with pytest.raises(ValueError, match="kv_heads must divide"):
        make(kv_heads=3)
    with pytest.raises(ValueError, match="must be even"):
        Rope()(jnp.ones((1, 1, 3)), jnp.zeros(1, int))
    with pytest.raises(ValueError, match="window must be at least 1"):
        make(window=0)


def test_half_precision_and_a_cache_of_another_dtype(backend_of_layers):
    layer = make(dtype=jnp.bfloat16)
    exact = make()(X)
    with sdpa_kernel(backend_of_layers):
        got, cache = layer(X, cache=layer.make_cache(B, 16))
        mixed, _ = make()(X, cache=make().make_cache(B, 16, jnp.bfloat16))
    assert (got.dtype, cache.key.dtype, mixed.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.05)
    np.testing.assert_allclose(mixed, exact, atol=0.05)


def test_dropout_of_the_layer():
    layer = make(dropout_rate=0.5)
    a, b = (layer(X, deterministic=False) for _ in range(2))
    assert jnp.abs(a - b).max() > 0.01  # the stream moves on
    again = [layer(X, deterministic=False, rngs=nnx.Rngs(dropout=3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    np.testing.assert_array_equal(layer(X), layer(X))


# Inside Flax's transforms


def loss(layer, x):
    return jnp.sum(jnp.sin(layer(x)))


def test_remat_and_grad(backend_of_layers):
    layer = make(**LAYERS["everything"])
    with sdpa_kernel(backend_of_layers):
        plain = nnx.grad(loss)(layer, X)
        remat = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(jnp.sin(nnx.remat(lambda l, y: l(y))(layer, x)))))(layer, X)
    assert len(jax.tree.leaves(plain)) == 10  # four kernels, three biases, two norms, sinks
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, remat)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))


def test_scan_over_layers_with_their_caches():
    """A stack of layers as one: parameters and caches with a leading axis, carried through nnx.scan."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0)
    def stacked(rngs):
        return Attention(F, 4, 2, rope=Rope(), window=6, rngs=rngs)

    stack = stacked(nnx.Rngs(0))
    caches = jax.tree.map(lambda *x: jnp.stack(x), *[make(window=6).make_cache(B, 16)] * 3)

    @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def through(layer, x, cache):
        y, cache = layer(x, cache=cache)
        return x + y, cache

    @nnx.jit
    def step(stack, x, caches):
        return through(stack, x, caches)

    out = []
    for start, stop in ((0, 7), (7, 8), (8, L)):
        y, caches = step(stack, X[:, start:stop], caches)
        out.append(y)
    x, (graph, state) = X, nnx.split(stack)
    for i in range(3):
        x = x + nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(x)
    np.testing.assert_allclose(jnp.concatenate(out, 1), x, atol=1e-5)


@pytest.mark.parametrize(("L", "window"), [(1, None), (1, 1024), (64, None)], ids=str)
def test_a_step_writes_a_donated_cache_in_place_and_copies_none_of_it(L, window):
    """Plain cache and ring; a chunk on a ring is the exception: it unrolls the ring."""

    def step(cache, q, k, v):
        cache, view = cache.extend(k, v, Chunk.of(8, L), window)
        return cache, dot_product_attention(q, view.key, view.value, mask=view.mask)

    cache = jax.eval_shape(lambda: KVCache.empty(8, 4096, 4, 128, window=window))
    q, k = (jax.ShapeDtypeStruct((8, L, heads, 128), jnp.float32) for heads in (16, 4))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        memory = jax.jit(step, donate_argnums=0).lower(cache, q, k, k).compile().memory_analysis()
    size = 2 * 8 * cache.slots * 4 * 128 * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4


def test_decode_inside_one_loop():
    """The cache is a carry like any other: the whole decode as one `lax.scan`."""
    layer = make(window=4)
    graph, state = nnx.split(layer)

    def step(cache, x):
        y, cache = nnx.merge(graph, state)(x[:, None], cache=cache)
        return cache, y[:, 0]

    _, y = jax.lax.scan(step, layer.make_cache(B, 16), jnp.swapaxes(X, 0, 1))
    np.testing.assert_allclose(jnp.swapaxes(y, 0, 1), layer(X), atol=WITHIN)


def test_orbax_saves_and_restores_layer_and_cache(tmp_path):
    import orbax.checkpoint as checkpoint

    layer = make(**LAYERS["everything"])
    _, cache = layer(X, cache=layer.make_cache(B, 16))
    tree = {"layer": nnx.to_pure_dict(nnx.state(layer, nnx.Param)), "cache": cache}
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", tree)
    other = make(seed=5, **LAYERS["everything"])
    like = {"layer": nnx.to_pure_dict(nnx.state(other, nnx.Param)), "cache": other.make_cache(B, 16)}
    with checkpoint.StandardCheckpointer() as saver:
        restored = saver.restore(
            tmp_path / "step",
            jax.tree.map(
                jax.ShapeDtypeStruct,
                *[jax.tree.map(f, like) for f in (jnp.shape, lambda x: x.dtype)],
                is_leaf=lambda x: isinstance(x, tuple),
            ),
        )
    state = nnx.state(other, nnx.Param)
    nnx.replace_by_pure_dict(state, restored["layer"])
    nnx.update(other, state)
    assert isinstance(restored["cache"], KVCache)
    (a, _), (b, _) = layer(X[:, :1], cache=cache), other(X[:, :1], cache=restored["cache"])
    np.testing.assert_array_equal(a, b)


MESHES = {
    "tensor divides the kv heads": ((4, 2), AxisType.Auto),
    "more devices than kv heads": ((2, 4), AxisType.Auto),
    "explicit axes": ((4, 2), AxisType.Explicit),
    "explicit, more devices than kv heads": ((2, 4), AxisType.Explicit),
}


@pytest.mark.parametrize(
    "name", [name if "explicit" not in name else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_sharded_over_data_and_tensor(name):
    """Parameters, activations and cache are divided as said; nothing is gathered; the numbers are those of one device."""
    shape, kind = MESHES[name]
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)
    options = {"rope": Rope(), "qk_norm": True, "sinks": True, "qkv_bias": True, "out_bias": True}
    x = jnp.concatenate([X, X[:1]])[:, :5]
    plain = Attention(F, 4, 2, **options, rngs=nnx.Rngs(0))
    expected, held = plain(x, cache=plain.make_cache(4, 16))
    more, _ = plain(x[:, :1], cache=held)
    with jax.set_mesh(mesh), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        layer = Attention(F, 4, 2, **options, mesh_axes=MeshAxes(), rngs=nnx.Rngs(0))
        assert layer.query.kernel.get_value().sharding.spec == P(None, "tensor", None)
        assert layer.out.kernel.get_value().sharding.spec == P("tensor", None, None)
        cache = jax.jit(lambda: layer.make_cache(4, 16))()
        graph, state = nnx.split(layer)
        step = jax.jit(lambda state, x, cache: nnx.merge(graph, state)(x, cache=cache))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        got, cache = step(state, x, cache)
        token = jax.device_put(x[:, :1], NamedSharding(mesh, P("data")))
        program = step.lower(state, token, cache).compile()
        got_more, after = program(state, token, cache)
    np.testing.assert_allclose(got, expected, atol=WITHIN)
    np.testing.assert_allclose(got_more, more, atol=WITHIN)
    assert not re.search("all-gather|all-to-all|collective-permute", program.as_text())
    kv = "tensor" if shape[1] == 2 else None
    for held in (cache.key, after.key, after.value):
        assert held.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, kv, None)), 4)


def test_a_mesh_that_is_not_there_or_does_not_fit():
    with pytest.raises(ValueError, match="there is no mesh"):
        Attention(F, 4, 2, mesh_axes=MeshAxes(), rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="q_heads must be a multiple of 8 for 2 kv_heads on 8 devices, got 4"):
        Attention(F, 4, 2, mesh_axes=MeshAxes(), rngs=nnx.Rngs(0))


# The cache alone


def test_the_ring_in_pictures():
    """Slots of a ring of 4 after 3, 6 and 11 tokens: the position that each holds."""
    cache = KVCache.empty(1, 100, 1, 1, window=4)
    seen = []
    for size in (3, 3, 5):
        start = int(cache.lengths[0])
        tokens = jnp.arange(start, start + size, dtype=jnp.float32).reshape(1, size, 1, 1) + 1
        cache, view = cache.extend(tokens, tokens, Chunk.of(1, size), window=4)
        seen.append((cache.key.ravel().astype(int).tolist(), view.key.ravel().astype(int).tolist()))
    assert seen == [
        ([1, 2, 3, 0], [0, 0, 0, 0, 1, 2, 3]),
        ([5, 6, 3, 4], [0, 1, 2, 3, 4, 5, 6]),
        ([9, 10, 11, 8], [3, 4, 5, 6, 7, 8, 9, 10, 11]),
    ]
    assert jnp.asarray(view.mask.materialise(5, 9))[0, 0].astype(int).tolist() == [
        [0, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 1],
    ]
