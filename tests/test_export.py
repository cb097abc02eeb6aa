"""`jax.export`: one artefact for CPU and CUDA, symbolic batch and lengths, and a round trip through its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_sdpa import dot_product_attention, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, QueryLengths, SegmentIds, causal, sliding_window
from jax_sdpa.device import assume_device

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


sdpa = scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """jax.export's own warnings about its calling convention are none of ours; ours would be UserWarnings with torch's headings."""
    yield
    assert not [w for w in recwarn if "not used because" in str(w.message)]


def train(q, k, v, stops):
    def loss(q, k, v):
        return jnp.sin(sdpa(q, k, v, KeyLengths(stops) & causal())).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


def test_one_artefact_for_cpu_and_cuda(backend):
    args = (*(normal(2, 2, 9, 8) for _ in range(3)), jnp.array([9, 4]))
    with sdpa_kernel(backend):
        exported = export.export(jax.jit(train), platforms=("cpu", "cuda"))(*args)
        wanted = jax.jit(train)(*args)
    got = export.deserialize(exported.serialize(vjp_order=1)).call(*args)  # outside of the context
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, wanted)


def test_the_default_choice_exports_for_cuda_with_an_assumed_device():
    q = jax.ShapeDtypeStruct((2, 4, 128, 64), jnp.bfloat16)
    for name in ("cuda:sm80", "cuda:sm90"):
        with assume_device(name):
            exported = export.export(jax.jit(lambda q: sdpa(q, q, q, is_causal=True)), platforms=("cpu", "cuda"))(q)
        assert exported.platforms == ("cpu", "cuda")


def symbolic(text, dtype=jnp.float32, scope=None):
    return jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), dtype)


def test_symbolic_batch_and_lengths(backend):
    """Forward and gradients at several sizes out of one artefact, structured masks and a dense one included."""
    scope = export.SymbolicScope()

    def shape(text, dtype=jnp.float32):
        return symbolic(text, dtype, scope)

    args = (shape("b, 2, l, 8"), shape("b, 2, s, 8"), shape("b, 2, s, 8"), shape("b", jnp.int32), shape("1, s"))

    def call(q, k, v, stops, bias):
        def loss(q, k, v):
            return jnp.sin(sdpa(q, k, v, KeyLengths(stops) & sliding_window(200, 3) & bias)).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    with sdpa_kernel(backend):
        exported = export.export(jax.jit(call))(*args)
        again = export.deserialize(exported.serialize())
        for b, l, s in ((1, 1, 1), (2, 7, 300), (3, 600, 5)):
            given = (
                normal(b, 2, l, 8),
                normal(b, 2, s, 8),
                normal(b, 2, s, 8),
                jnp.arange(b, dtype=jnp.int32) + s // 2,
                normal(1, s),
            )
            got, wanted = again.call(*given), jax.jit(call)(*given)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), got, wanted)


KINDS = ["causal", "query lengths", "dropout", "JAX's face", "grouped heads"]


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "segments"))])
def test_symbolic_length_of_every_kind(kind, backend):
    scope = export.SymbolicScope()
    q, k = symbolic("2, 4, n, 8", scope=scope), symbolic("2, 2, n, 8", scope=scope)
    ids = symbolic("2, n", jnp.int32, scope)

    def call(q, k, ids):
        if kind == "JAX's face":
            q, k = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
            out, lse = dot_product_attention(q, k, k, softcap=2.0, sinks=jnp.arange(4.0), is_causal=True, return_residual=True)
            return jnp.sin(out).sum() + jnp.sin(lse).sum()
        options = {"dropout_p": 0.5, "dropout_rng": jax.random.key(0)} if kind == "dropout" else {}
        mask = {"causal": causal(1), "segments": SegmentIds(ids), "query lengths": QueryLengths(ids[:, 0])}.get(kind)
        return jnp.sin(sdpa(q, k, k, mask, enable_gqa=True, **options)).sum()

    call = jax.value_and_grad(call, (0, 1))
    with sdpa_kernel(backend):
        exported = export.export(jax.jit(call))(q, k, ids)
        for n in (1, 150):
            given = normal(2, 4, n, 8), normal(2, 2, n, 8), jnp.asarray(np.sort(rng.integers(0, 3, (2, n))), jnp.int32)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), exported.call(*given), jax.jit(call)(*given)
            )


def test_a_symbolic_length_counts_as_long_and_is_refused_with_a_reason():
    q = symbolic("2, 2, n, 64", jnp.bfloat16)
    assert explain(q, q, q, device="cpu").backend is SDPBackend.EFFICIENT_ATTENTION
    choice = explain(q, q, q, device="cuda:sm90:cudnn91600")
    assert choice.backend is SDPBackend.EFFICIENT_ATTENTION
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        assert any("symbolic" in reason for reason in choice.rejected[backend])
