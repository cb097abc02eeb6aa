"""`attention_fn` in Flax's two layers against Flax's own function, and the traps of that interface."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jax_sdpa import NoViableBackendError, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, causal_lower_right
from jax_sdpa.nn import AttentionFn, attention_fn

F, HEADS, L = 32, 4, 6
KEY = jax.random.key(7)


def draw(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape, dtype)


def by_nnx(function, x, *, call=None, **options):
    layer = nnx.MultiHeadAttention(HEADS, F, decode=False, attention_fn=function, rngs=nnx.Rngs(0, dropout=1), **options)
    return layer(x, **(call or {}))


def by_linen(function, x, *, call=None, **options):
    call = dict(call or {})
    if isinstance(call.get("rngs"), nnx.Rngs):  # nnx's way to hand over a key
        call["dropout_rng"] = call.pop("rngs").dropout()
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=function, **options)
    without = layer.copy(attention_fn=linen.dot_product_attention, dropout_rate=0.0)
    keys = {"dropout": jax.random.key(1)} if options.get("dropout_rate") else {}
    return layer.apply(without.init(jax.random.key(0), x), x, rngs=keys, **call)


LAYERS = {"nnx": (by_nnx, nnx.dot_product_attention), "linen": (by_linen, linen.dot_product_attention)}
CAUSAL = linen.make_causal_mask(jnp.ones((2, L)))  # float32 0/1, (2, 1, L, L)
PADDING = linen.make_attention_mask(jnp.ones((2, L)), jnp.arange(L)[None] < jnp.array([[4], [6]]))
KEEP = jax.random.bernoulli(KEY, 0.6, (2, HEADS, L, L)).at[..., 0].set(True)
CASES = {
    "plain": ({}, {}, (2,)),
    "0/1 floats": ({}, {"mask": CAUSAL}, (2,)),
    "two masks combined": ({}, {"mask": linen.combine_masks(CAUSAL, PADDING)}, (2,)),
    "bool of every head": ({}, {"mask": KEEP}, (2,)),
    "no batch dims": ({}, {"mask": KEEP[0]}, ()),
    "two batch dims": ({}, {}, (2, 3)),
    "two batch dims, mask (2, 1, 1, L, L)": ({}, {"mask": CAUSAL[:, None]}, (2, 3)),
    "another width of q, k and v": ({"qkv_features": 64}, {"mask": PADDING}, (2,)),
    "normalised q and k": ({"normalize_qk": True}, {}, (2,)),
    "dropout, one mask for all": ({"dropout_rate": 0.4}, {"deterministic": False, "mask": KEEP}, (2,)),
    "dropout, two batch dims": ({"dropout_rate": 0.4}, {"deterministic": False}, (2, 3)),
    "dropout by an explicit key": ({"dropout_rate": 0.4}, {"deterministic": False, "rngs": nnx.Rngs(dropout=5)}, (2,)),
    "deterministic": ({"dropout_rate": 0.4}, {"deterministic": True}, (2,)),
    "a dtype": ({"dtype": jnp.float32, "precision": "highest"}, {}, (2,)),
}


def _with_a_repeated_mask(query, key, value, *, mask, **options):
    return nnx.dot_product_attention(query, key, value, mask=jnp.broadcast_to(mask, (2, 3, *mask.shape[-3:])), **options)


SLOW = ("another width of q, k and v", "normalised q and k", "dropout, two batch dims")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
@pytest.mark.parametrize("kind", LAYERS)
def test_as_flax(kind, name, backend_of_layers):
    options, call, batch = CASES[name]
    layer, theirs = LAYERS[kind]
    if name.startswith("two batch dims, mask") and kind == "nnx":
        theirs = _with_a_repeated_mask  # nnx's short cut merges the batch dims and cannot take a mask that broadcasts over them
    if isinstance(rngs := call.get("rngs"), nnx.Rngs):
        call = {**call, "rngs": nnx.clone(rngs)}
    x = draw(*batch, L, F)
    expected = layer(theirs, x, call=call, **options)
    call = {**call, "rngs": nnx.clone(rngs)} if rngs is not None else call
    drops = options.get("dropout_rate") and not call["deterministic"]
    with sdpa_kernel(SDPBackend.MATH if drops else backend_of_layers):
        got = layer(attention_fn, x, call=call, **options)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_as_flax(kind):
    layer, theirs = LAYERS[kind]

    def loss(function, x):
        return jnp.sum(jnp.sin(layer(function, x, call={"mask": linen.combine_masks(CAUSAL, PADDING)})))

    x = draw(2, L, F)
    np.testing.assert_allclose(*(jax.grad(functools.partial(loss, f))(x) for f in (attention_fn, theirs)), atol=5e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision(kind, backend_of_layers):
    """Against float32 on the same rounded values: Flax keeps logits in bfloat16 (error 0.03), we do not."""
    _, theirs = LAYERS[kind]
    q, k, v = (draw(2, L, HEADS, 16, seed=i, dtype=jnp.bfloat16) for i in range(3))
    exact = theirs(*(x.astype(jnp.float32) for x in (q, k, v)), mask=CAUSAL)
    with sdpa_kernel(backend_of_layers):
        got = attention_fn(q, k, v, mask=CAUSAL, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.012)
    layer, _ = LAYERS[kind]
    both = [layer(f, draw(2, L, F), dtype=jnp.bfloat16) for f in (attention_fn, theirs)]
    assert both[0].dtype == both[1].dtype
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in both), atol=0.06)


def test_grouped_heads_and_values_of_another_head_dim(backend_of_layers):
    x = draw(2, L, F)
    with sdpa_kernel(backend_of_layers):
        got = by_nnx(attention_fn, x, num_kv_heads=2, call={"mask": CAUSAL})
    np.testing.assert_allclose(got, by_nnx(nnx.dot_product_attention, x, num_kv_heads=2, call={"mask": CAUSAL}), atol=2e-6)
    q, k, v = draw(2, L, 4, 8), draw(2, L, 4, 8, seed=1), draw(2, L, 4, 5, seed=2)
    with sdpa_kernel(backend_of_layers):
        got = attention_fn(q, k, v, mask=CAUSAL)
    np.testing.assert_allclose(got, linen.dot_product_attention(q, k, v, mask=CAUSAL), atol=2e-6)


@pytest.mark.parametrize("heads", [4, 2])
def test_nnx_decode(heads, backend_of_layers):
    """Step by step as all at once, with the layer's `is_causal` on, where flax 0.12.8 itself keeps only the first key."""
    options = {"num_kv_heads": heads, "attention_fn": attention_fn, "rngs": nnx.Rngs(0)}
    layer = nnx.MultiHeadAttention(HEADS, F, decode=True, **options)
    x = draw(2, L, F)
    with sdpa_kernel(backend_of_layers):
        full = layer(x, decode=False, is_causal=True)
        layer.init_cache((2, L, F))
        step = nnx.jit(lambda layer, x: layer(x, is_causal=True))
        steps = [step(layer, x[:, i : i + 1]) for i in range(L)]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), full, atol=2e-6)
    theirs = nnx.MultiHeadAttention(
        HEADS, F, decode=True, **{**options, "attention_fn": nnx.dot_product_attention, "rngs": nnx.Rngs(0)}
    )
    np.testing.assert_allclose(full, theirs(x, decode=False, is_causal=True), atol=2e-6)
    theirs.init_cache((2, L, F))
    step = nnx.jit(lambda layer, x: layer(x))
    np.testing.assert_allclose(jnp.concatenate([step(theirs, x[:, i : i + 1]) for i in range(L)], 1), full, atol=2e-6)


def test_linen_decode(backend_of_layers):
    x = draw(2, L, F)

    def steps(function):
        layer = linen.MultiHeadDotProductAttention(HEADS, decode=True, attention_fn=function)
        variables, out = layer.init(jax.random.key(0), x), []
        for i in range(L):
            y, cache = layer.apply(variables, x[:, i : i + 1], mutable=["cache"])
            variables = {**variables, **cache}
            out.append(y)
        return jnp.concatenate(out, 1)

    with sdpa_kernel(backend_of_layers):
        np.testing.assert_allclose(steps(AttentionFn(is_causal=True)), steps(linen.dot_product_attention), atol=2e-6)


def test_sown_weights():
    x, options, call = draw(2, L, F), {"dropout_rate": 0.4}, {"deterministic": False, "mask": CAUSAL, "sow_weights": True}
    sown = []
    for function in (attention_fn, nnx.dot_product_attention):
        layer = nnx.MultiHeadAttention(HEADS, F, decode=False, attention_fn=function, rngs=nnx.Rngs(0, dropout=1), **options)
        sown.append(nnx.capture(layer, nnx.Intermediate)(x, **call))
    assert sown[0][1]["attention_weights"].get_value()[0].shape == (2, HEADS, L, L)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *sown)
    (out, ours), (expected, theirs) = (
        by_linen(function, x, call={**call, "mutable": ["intermediates"]}, **options)
        for function in (attention_fn, linen.dot_product_attention)
    )
    np.testing.assert_allclose(out, expected, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, theirs)
    assert ours["intermediates"]["attention_weights"][0].shape == (2, HEADS, L, L)


def test_what_needs_the_weights_is_refused_without_math():
    q = draw(2, L, HEADS, 8)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        refused = functools.partial(pytest.warns, UserWarning, match="kernel not used because")
        with (
            refused(),
            pytest.raises(NoViableBackendError, match=r"FLASH_ATTENTION: One dropout mask .* set broadcast_dropout=False"),
        ):
            attention_fn(q, q, q, dropout_rate=0.1, dropout_rng=KEY)
        with refused(), pytest.raises(NoViableBackendError, match="EFFICIENT_ATTENTION: The weights are asked for"):
            attention_fn(q, q, q, module=linen.Dense(1))
        attention_fn(q, q, q, dropout_rate=0.1, dropout_rng=KEY, broadcast_dropout=False)


def test_dropout_of_each_weight(backend_of_layers):
    """broadcast_dropout=False: our bits, the same on every backend and in torch's face, and none of Flax's memory."""
    q, k, v = (draw(2, L, HEADS, 8, seed=i) for i in range(3))
    with sdpa_kernel(backend_of_layers):
        got = attention_fn(q, k, v, dropout_rate=0.3, dropout_rng=KEY, broadcast_dropout=False)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    expected = scaled_dot_product_attention(q, k, v, dropout_p=0.3, dropout_rng=KEY)
    np.testing.assert_allclose(jnp.swapaxes(got, 1, 2), expected, atol=2e-6)
    assert attention_fn(q, k, v, dropout_rate=1.0, dropout_rng=KEY).sum() == 0
    with pytest.raises(ValueError, match="needs a key"):
        attention_fn(q, k, v, dropout_rate=0.3)
    with pytest.raises(ValueError, match="needs a key"):
        attention_fn(q, k, v, dropout_rate=0.3, broadcast_dropout=False)


@pytest.mark.gpu
def test_through_flash():
    """What a layer asks for in training, dropout of each weight included: FLASH beside MATH, output and gradients."""
    q, k, v = draw(2, 256, 8, 64), draw(2, 256, 2, 64, seed=1), draw(2, 256, 2, 64, seed=2)
    mask = jnp.arange(256)[None, None, None] < jnp.array([256, 200])[:, None, None, None]
    options = {"mask": mask.astype(jnp.float32), "dropout_rate": 0.2, "dropout_rng": KEY, "broadcast_dropout": False}

    def run(q, k, v):
        out = AttentionFn(is_causal=True)(q, k, v, dtype=jnp.bfloat16, **options).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    results = []
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            gradients, out = jax.grad(run, (0, 1, 2), has_aux=True)(q, k, v)
        results.append((out, *gradients))
    for exact, got in zip(*results, strict=True):
        assert jnp.abs(got - exact).max() <= 0.02 * jnp.abs(exact).max()


def test_rows_without_keys_give_zero():
    q = draw(2, L, HEADS, 8)
    mask = CAUSAL.at[:, :, 2].set(0)
    got = attention_fn(q, q, q, mask=mask)
    assert jnp.all(got[:, 2] == 0)
    theirs = linen.dot_product_attention(q, q, q, mask=mask)
    np.testing.assert_allclose(theirs[:, 2], jnp.mean(q, 1), atol=1e-6)  # Flax: the mean of the values
    rows = jnp.arange(L) != 2
    np.testing.assert_allclose(got[:, rows], theirs[:, rows], atol=2e-6)


def test_bias_bound_by_partial():
    x, table = draw(2, L, F), draw(HEADS, L, L, seed=3)
    for kind, (layer, theirs) in LAYERS.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            bound = [functools.partial(f, bias=table.astype(dtype)) for f in (attention_fn, theirs)]
            if kind == "nnx" and dtype == jnp.bfloat16:
                bound[1] = functools.partial(theirs, bias=table.astype(dtype).astype(jnp.float32))
            np.testing.assert_allclose(*(layer(f, x, call={"mask": CAUSAL}) for f in bound), atol=2e-6)


def test_structured_masks_go_through_the_layers():
    x, lengths = draw(2, L, F), KeyLengths(jnp.array([4, 6]))
    for layer, theirs in LAYERS.values():
        got, expected = layer(attention_fn, x, call={"mask": lengths}), layer(theirs, x, call={"mask": PADDING})
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_window_softcap_and_scale_are_fields():
    q = draw(2, L, HEADS, 8)
    i, j = jnp.arange(L)[:, None], jnp.arange(L)[None]
    got = AttentionFn(is_causal=True, window=(2, -1), scale=1.0)(q, q, q)
    expected = linen.dot_product_attention(q * 8**0.5, q, q, mask=(j <= i) & (j >= i - 2))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    capped = AttentionFn(softcap=1.0)(q, q, q)
    weights = jax.nn.softmax(jnp.tanh(jnp.einsum("blhd,bshd->bhls", q, q) * 8**-0.5), -1)
    np.testing.assert_allclose(capped, jnp.einsum("bhls,bshd->blhd", weights, q), atol=2e-6)


# The traps (each a plausible adapter that is wrong without a word)


def test_trap_every_keyword_is_named():
    """linen drops each keyword that the signature does not name: an adapter of **kwargs loses its mask."""
    named = set(inspect.signature(attention_fn).parameters)
    for theirs in (linen.dot_product_attention, nnx.dot_product_attention):
        assert set(inspect.signature(theirs).parameters) <= named
    x = draw(2, L, F)

    def loses_the_mask(query, key, value, **options):
        return attention_fn(query, key, value, **options)

    right, wrong = (by_linen(f, x, call={"mask": CAUSAL}) for f in (attention_fn, loses_the_mask))
    assert jnp.abs(right - wrong).max() > 0.01


def test_trap_a_bound_is_causal_is_overridden_by_nnx():
    x = draw(2, L, F)
    expected = by_nnx(attention_fn, x, call={"mask": CAUSAL})
    for kind, (layer, _) in LAYERS.items():
        bound = layer(functools.partial(attention_fn, is_causal=True), x)
        field = layer(AttentionFn(is_causal=True), x)
        np.testing.assert_allclose(field, layer(attention_fn, x, call={"mask": CAUSAL}), atol=2e-6)
        assert (jnp.abs(bound - field).max() > 0.01) == (kind == "nnx")
    np.testing.assert_allclose(by_nnx(attention_fn, x, call={"is_causal": True}), expected, atol=2e-6)


def test_trap_a_mask_of_floats_is_no_bias():
    q, k, v = (draw(2, L, HEADS, 8, seed=i) for i in range(3))
    expected = linen.dot_product_attention(q, k, v, mask=CAUSAL)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, bool):
        np.testing.assert_allclose(attention_fn(q, k, v, mask=CAUSAL.astype(dtype)), expected, atol=2e-6)
    np.testing.assert_allclose(attention_fn(q, k, v, mask=np.tril(np.ones((L, L)))), expected, atol=2e-6)  # float64 as well
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    added = scaled_dot_product_attention(q, k, v, CAUSAL)
    assert jnp.abs(jnp.swapaxes(added, 1, 2) - expected).max() > 0.1


def test_trap_causal_and_one_query():
    """A decode step's mask says which keys exist; an upper-left triangle would keep the first one alone."""
    q, k = draw(2, 1, HEADS, 8), draw(2, L, HEADS, 8, seed=1)
    mask = jnp.broadcast_to(jnp.arange(L) <= 3, (2, 1, 1, L))
    for function in (AttentionFn(is_causal=True), functools.partial(attention_fn, is_causal=True)):
        np.testing.assert_array_equal(function(q, k, k, mask=mask), attention_fn(q, k, k, mask=mask))
        with pytest.raises(ValueError, match="got L=1 and S=6"):
            function(q, k, k)
        with pytest.raises(ValueError, match="causal_lower_right"):
            function(jnp.repeat(q, 3, 1), k, k, mask=mask)
    assert attention_fn(jnp.repeat(q, 3, 1), k, k, mask=causal_lower_right(3, L)).shape == (2, 3, HEADS, 8)


def test_trap_equal_adapters_are_one_trace():
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    for _ in range(2):
        options = {"decode": False, "attention_fn": AttentionFn(is_causal=True), "rngs": nnx.Rngs(0)}
        run(nnx.MultiHeadAttention(HEADS, F, **options), draw(2, L, F))
    assert len(traces) == 1
    assert hash(AttentionFn(softcap=2.0)) == hash(AttentionFn(softcap=2.0))
    with pytest.raises(AttributeError):
        attention_fn.is_causal = True  # type: ignore[misc]


def test_hooks_are_refused_with_the_reason():
    x = draw(2, L, F)
    for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(ValueError, match=f"{name} cannot be honoured: a fused kernel"):
            attention_fn(x, x, x, **{name: jnp.einsum})
    with pytest.raises(ValueError, match="cannot be honoured"):
        by_linen(attention_fn, x, qk_attn_weights_einsum_cls=lambda: jnp.einsum, attn_weights_value_einsum_cls=lambda: jnp.einsum)
    with pytest.raises(ValueError, match="input_positions belong to rotary embeddings"):
        attention_fn(x, x, x, input_positions=jnp.arange(L))


@pytest.mark.parametrize(
    ("given", "meant"), [(None, "highest"), (jax.lax.Precision.DEFAULT, "default"), ("high", "high"), (("high", "high"), "high")]
)
def test_precision_reaches_the_products(given, meant):
    q = draw(L, HEADS, 8)
    program = jax.make_jaxpr(lambda q: attention_fn(q, q, q, precision=given))(q)
    assert f"precision='{meant}'" in str(program)
    with pytest.raises(ValueError, match=r"one jax\.lax\.Precision"):
        attention_fn(q, q, q, precision=("high", "highest"))


def test_without_flax_the_error_says_what_to_install():
    import subprocess
    import sys

    code = "import sys; sys.modules['flax'] = None; import jax_sdpa\ntry: import jax_sdpa.nn\nexcept ImportError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'jax-sdpa[flax]'" in out
