"""EFFICIENT's promise: memory O(L) for every kind of call, forward and backward, and no work for blocks that a mask empties."""

import time

import jax
import jax.numpy as jnp
import pytest

from jax_sdpa import dot_product_attention, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, Packed, SegmentIds, causal, sliding_window

shape = jax.ShapeDtypeStruct


def temporaries(call, *args, grad):
    """Bytes that the compiled program holds beside its arguments and results."""
    if grad:
        wrt = tuple(i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating))

        def loss(*args):
            return call(*args).astype(jnp.float32).sum()

        program = jax.jit(jax.grad(loss, wrt))
    else:
        program = jax.jit(call)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return program.lower(*args).compile().memory_analysis().temp_size_in_bytes


def calls(L, dtype=jnp.float32):
    q, key = shape((1, 2, L, 64), dtype), jax.random.key(0)
    ids, stops, bias = shape((1, L), jnp.int32), shape((1,), jnp.int32), shape((2, 1, L), jnp.float32)
    swapped, sinks = shape((1, L, 2, 64), dtype), shape((2,), jnp.float32)
    sdpa = scaled_dot_product_attention
    return {
        "plain": (lambda q, k, v: sdpa(q, k, v), q, q, q),
        "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), q, q, q),
        "window": (lambda q, k, v: sdpa(q, k, v, sliding_window(500, 0)), q, q, q),
        "lengths": (lambda q, k, v, n: sdpa(q, k, v, causal() & KeyLengths(n)), q, q, q, stops),
        "offsets": (lambda q, k, v, n: sdpa(q, k, v, causal(n)), q, q, q, stops),
        "segments": (lambda q, k, v, ids: sdpa(q, k, v, SegmentIds(ids) & causal()), q, q, q, ids),
        "bias per key": (lambda q, k, v, b: sdpa(q, k, v, b), q, q, q, bias),
        "bool per key": (lambda q, k, v, b: sdpa(q, k, v, b > 0), q, q, q, bias),
        "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1, dropout_rng=key), q, q, q),
        "grouped": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, shape((1, 1, L, 64), dtype), shape((1, 1, L, 64), dtype)),
        "JAX's face, softcap and sinks": (lambda q, k, v, s: dot_product_attention(q, k, v, sinks=s, softcap=3.0, is_causal=True), swapped, swapped, swapped, sinks),
    }  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", calls(16))
def test_temporaries_at_16k_are_under_eight_times_the_query(name, grad):
    length = 16384
    assert temporaries(*calls(length)[name], grad=grad) < 8 * 2 * length * 64 * 4


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["causal", "lengths"])
def test_half_precision_too_in_float32s_bytes(name, grad):
    """Accumulators are float32: the bound is 8 times the query as float32 would hold it."""
    length = 16384
    assert temporaries(*calls(length, jnp.bfloat16)[name], grad=grad) < 8 * 2 * length * 64 * 4


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["plain", "causal", "segments"])
def test_memory_grows_linearly(name, grad):
    small, large = (temporaries(*calls(length)[name], grad=grad) for length in (8192, 65536))
    assert large < 8 * 1.3 * small + 2**20


def steps(L, layout, dtype):
    """Calls of L queries a sequence on a cache of 8 sequences of 4099 slots (which no block divides) and 4 heads; 16 query heads."""
    slots, n = 4099, shape((8,), jnp.int32)
    q, k = (
        shape((8, heads, length, 128) if layout == "BHLE" else (8, length, heads, 128), dtype)
        for heads, length in ((16, L), (4, slots))
    )

    def call(mask):
        if layout == "BHLE":
            return lambda q, k, v, *n: scaled_dot_product_attention(q, k, v, mask(*n), enable_gqa=True)
        return lambda q, k, v, *n: dot_product_attention(q, k, v, mask=mask(*n))

    return {
        "plain": (call(lambda n: causal(n - L) & KeyLengths(n)), q, k, k, n),
        "window": (call(lambda n: sliding_window(1023, 0, n - L) & KeyLengths(n)), q, k, k, n),
        "ring": (call(lambda n: KeyLengths(jnp.minimum(n, slots))), q, k, k, n),
        "left-padded": (call(lambda n, starts: causal(n - L) & KeyLengths(n, starts)), q, k, k, n, n),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("L", "dtype", "layout"),
    [(1, "float32", "BHLE"), (1, "float32", "BLHE"), (1, "bfloat16", "BLHE"), (4, "float16", "BHLE"), (64, "float32", "BLHE")],
    ids=str,
)
def test_a_step_on_a_cache_holds_nothing_of_the_caches_size(L, dtype, layout):
    """Decode, a few tokens, a chunk: no copy of keys or values, padded, cleared or transposed."""
    for name, (call, *args) in steps(L, layout, jnp.dtype(dtype)).items():
        cache = 2 * 8 * 4099 * 4 * 128 * jnp.dtype(dtype).itemsize
        assert temporaries(call, *args, grad=False) < cache / 10, name


def test_a_dense_float_mask_costs_its_own_gradient_and_no_more():
    """(L, S) is what the caller brought; beside it nothing of that size is held."""
    length = 4096
    q, bias = shape((1, 4, length, 64), jnp.float32), shape((length, length), jnp.float32)

    def call(q, k, v, b):
        return scaled_dot_product_attention(q, k, v, b)

    assert temporaries(call, q, q, q, bias, grad=False) < 8 * 4 * length * 64 * 4
    assert temporaries(call, q, q, q, bias, grad=True) < 8 * 4 * length * 64 * 4 + 1.5 * length * length * 4


def test_the_default_on_a_cpu_never_lets_memory_grow_with_the_product_of_the_lengths():
    """Whatever L and S: MATH's float32 scores of a default call stay under 64 MB, else EFFICIENT runs."""
    for batch, heads, L, S in (
        (1, 1, 2**14, 2**14),
        (64, 16, 2**7, 2**7),
        (1, 1, 2**20, 64),
        (1, 1, 64, 2**20),
        (2**14, 16, 8, 8),
        (1, 1, 2, 2**24),
    ):
        q, k = shape((batch, heads, L, 8), jnp.float32), shape((batch, heads, S, 8), jnp.float32)
        if explain(q, k, k, device="cpu").backend is SDPBackend.MATH:
            assert batch * heads * L * S * 4 <= 2**26


def test_empty_blocks_are_skipped_not_computed_and_thrown_away():
    """Processor time of causal, of a window, and of short traced lengths, beside full attention: the least of several runs of each."""
    length = 4096
    q = jax.random.normal(jax.random.key(0), (1, 1, length, 64))
    kinds = {
        "full": None, "causal": causal(), "window": sliding_window(256, 0), "short": KeyLengths(jnp.array([500])),
        "segments": SegmentIds(jnp.arange(length) // 512), "packed": Packed(jnp.arange(9) * 512),
    }  # fmt: skip
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        programs = {
            name: jax.jit(lambda q, mask: scaled_dot_product_attention(q, q, q, mask)).lower(q, mask).compile()
            for name, mask in kinds.items()
        }
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(7):
        for name, program in programs.items():
            start = time.process_time()  # wall-clock time would be that of a machine that others use too
            program(q, kinds[name]).block_until_ready()
            best[name] = min(best[name], time.process_time() - start)
    share = {name: seconds / best["full"] for name, seconds in best.items()}
    assert share["causal"] < 0.8, share
    assert max(share["window"], share["short"], share["segments"], share["packed"]) < 0.5, share
