"""Programs that outlive their process: `jax.export`, compiled ahead of time, in the persistent cache; and a donated operand."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_sdpa import compat, dot_product_attention, explain, scaled_dot_product_attention
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


RUN_ARTEFACT = """
import sys, jax, numpy as np
from jax import export
exported = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = np.load(sys.argv[2])
out = exported.call(*(jax.numpy.asarray(given[name]) for name in sorted(given)))
np.save(sys.argv[3], np.asarray(out, np.float32))
print(exported.platforms, "jax_sdpa" in sys.modules)
"""


def in_a_fresh_process(code, *arguments, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_flash_for_cuda_and_the_cpus_backend_in_one_artefact_run_by_a_process_without_us(tmp_path):
    """The default choice: the kernel's machine code for CUDA lies beside the CPU's program, and needs nothing of ours to run."""
    q, k = normal(1, 4, 64, 64), normal(1, 2, 64, 64)

    def call(k, q):
        q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
        return sdpa(q, k, k, causal() & KeyLengths(jnp.array([50])), enable_gqa=True).astype(jnp.float32)

    with assume_device("cuda:sm90"):
        both = export.export(jax.jit(call), platforms=("cpu", "cuda"))(k, q)
        cuda = export.export(jax.jit(call), platforms=("cuda",))(k, q)
    has_kernels = compat.JAX_VERSION >= (0, 11, 2)
    assert ("mosaic_gpu" in both.mlir_module()) == has_kernels
    assert ("mosaic_gpu" in cuda.mlir_module()) == has_kernels
    assert export.deserialize(cuda.serialize()).platforms == ("cuda",)
    (tmp_path / "artefact").write_bytes(both.serialize())
    np.savez(tmp_path / "given.npz", k=k, q=q)
    told = in_a_fresh_process(RUN_ARTEFACT, tmp_path / "artefact", tmp_path / "given.npz", tmp_path / "out.npy")
    assert told.split() == ["('cpu',", "'cuda')", "False"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), call(k, q), atol=2e-2)


def test_compiled_ahead_of_time_and_with_a_donated_operand(backend):
    """A residual block whose input's memory becomes its output's: donated without a warning, and gone."""
    x, w = normal(2, 4, 64, 16), normal(16, 16)

    def block(x, w):
        return x + sdpa(x @ w, x, x, is_causal=True)

    with sdpa_kernel(backend):
        wanted = jax.jit(block)(x, w)
        like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, w)]
        compiled = jax.jit(block, donate_argnums=0).lower(*like).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == x.nbytes
    np.testing.assert_allclose(compiled(x, w), wanted, rtol=1e-5, atol=1e-5)
    assert x.is_deleted()
    assert not w.is_deleted()


CACHED = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jax_sdpa import scaled_dot_product_attention as sdpa
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import causal
from jax_sdpa.sharding import context_parallel_attention

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rsplit("/", 1)[-1]))
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
q = jax.device_put(np.ones((4, 2, 64, 8), np.float32), NamedSharding(mesh, P("a", "b")))
ring = lambda q: context_parallel_attention(q, q, q, causal(), mesh=mesh, axis_name="a", method="ring")
with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
    calls = {"one": (lambda q: sdpa(q, q, q, causal()), np.ones((4, 2, 64, 8), np.float32)), "mesh": (lambda q: sdpa(q, q, q, causal()), q), "ring": (ring, q), "scale": (lambda q: sdpa(q, q, q, causal(), scale=float(sys.argv[2])), q)}
    for name, (call, x) in calls.items():
        program = jax.jit(jax.grad(lambda q: call(q).sum())).lower(x)
        seen.clear()
        program.compile()
        print(name, seen.count("cache_hits"), seen.count("cache_misses"))
"""


def test_the_persistent_compilation_cache_hits(tmp_path):
    """On one device, on a mesh and around a ring: a second process compiles nothing. On a mesh JAX wants to be told that the
    partitioning rule is the same (a flag); what is another program all the same, by its scale alone, is no hit."""
    first, second = (in_a_fresh_process(CACHED, tmp_path / "cache", scale, XLA_FLAGS="").splitlines() for scale in (1.0, 2.0))
    assert first == ["one 0 1", "mesh 0 1", "ring 0 1", "scale 0 1"]
    assert second == ["one 1 0", "mesh 1 0", "ring 1 0", "scale 0 1"]
