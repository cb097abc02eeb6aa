"""`varlen_attn`: packed sequences against each of them alone, pages against contiguous keys, one program for all values, every error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Problem, band, check, packed, solve

from jax_sdpa import check_varlen, compat, explain
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import Packed
from jax_sdpa.attention.varlen import AuxRequest, varlen_attn
from jax_sdpa.device import assume_device
from jax_sdpa.errors import NoViableBackendError
from jax_sdpa.implementations.flash import Flash
from pallas_kernels import decode_tuning, visits

needs_mosaic = pytest.mark.skipif(compat.JAX_VERSION < (0, 11, 2), reason="Mosaic's interpreter and the kernels need jax 0.11.2")
LSE = AuxRequest(lse=True)
shape = jax.ShapeDtypeStruct


def boundaries(sizes):
    return jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32)


def tokens(problem):
    """query, key, value of a Problem with one batch entry, packed: (T, H, D) float32."""
    return tuple(jnp.asarray(x[0].swapaxes(0, 1), jnp.float32) for x in (problem.query, problem.key, problem.value))


def as_problem(out, lse, **cotangents):
    """Results of packed tokens in the oracle's layout."""
    turned = {name: np.asarray(x).swapaxes(0, 1)[None] for name, x in {"out": out, **cotangents}.items()}
    return {**turned, "lse": np.asarray(lse)[None]}


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (20, 0), (3, 7)])
def test_values_and_gradients_are_the_oracles(left, right, backend):
    """Grouped heads, values of another head dim, sequences of 0 and 1 tokens, more queries than keys, padding behind, lse's cotangent."""
    sizes_q, sizes_k = [70, 0, 1, 33, 5], [90, 8, 64, 20, 0]
    cu_q, cu_k = boundaries(sizes_q), boundaries(sizes_k)
    T, S = 115, 190
    keep = packed(T, S, np.asarray(cu_q), np.asarray(cu_k), left, right)
    problem = make(T, S, B=1, Hq=4, Hk=2, E=8, Ev=5, dlse=True, keep=keep).rounded(np.float32)

    @jax.jit
    def run(q, k, v, dout, dlse):
        def call(q, k, v):
            return varlen_attn(q, k, v, cu_q, cu_k, 70, 90, window_size=(left, right), enable_gqa=True, return_aux=LSE)

        (out, lse), pullback = jax.vjp(call, q, k, v)
        return out, lse, *pullback((dout, dlse))

    with sdpa_kernel(backend):
        dout, dlse = jnp.asarray(problem.dout[0].swapaxes(0, 1), jnp.float32), jnp.asarray(problem.dlse[0], jnp.float32)
        out, lse, *cotangents = run(*tokens(problem), dout, dlse)
    check(problem, as_problem(out, lse, **dict(zip(("query", "key", "value"), cotangents, strict=True))))
    assert not np.asarray(out)[109:].any()
    assert np.isneginf(np.asarray(lse)[:, 109:]).all()


N, T, PAGE, MOST = 3, 40, 8, 4  # one shape for all drawn calls: a program a window and a backend


@st.composite
def batches(draw):
    """Sizes of N sequences of queries and of keys in a pool of T tokens, how many keys are used, and a window."""
    pieces = [np.diff(np.sort(draw(st.lists(st.integers(0, T - 2), min_size=N, max_size=N))), prepend=0) for _ in range(2)]
    keys = np.minimum(pieces[1], PAGE * MOST)
    used = [draw(st.integers(0, int(size))) for size in keys]
    return pieces[0], keys, np.array(used), draw(st.sampled_from([(-1, -1), (-1, 0), (5, 2)])), draw(st.integers(0, 2**32 - 1))


def _alone(q, k, v, window):
    """One sequence by the oracle: (out (L, H, D), lse (H, L)); arrays (length, H, D)."""
    L, S = len(q), len(k)
    if L == 0 or S == 0:
        return np.zeros((L, q.shape[1], v.shape[2])), np.full((q.shape[1], L), -np.inf)
    q, k, v = (np.asarray(x, np.float64).swapaxes(0, 1)[None] for x in (q, k, v))
    answer = solve(Problem(q, k, v, np.zeros((1, q.shape[1], L, v.shape[3])), keep=band(L, S, *window, S - L)))
    return answer["out"][0].swapaxes(0, 1), answer["lse"][0]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], ids=lambda backend: backend.name)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(batch=batches())
def test_packed_is_each_sequence_alone_and_pages_are_contiguous_keys(backend, batch):
    """With unused keys, pages in any order, and NaN in everything that nobody may see."""
    sizes_q, sizes_k, used, window, seed = batch
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((T, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    cu_q, cu_k = boundaries(sizes_q), boundaries(sizes_k)
    pools = [np.full((N * MOST + 1, PAGE, 2, 8), np.nan, np.float32) for _ in range(2)]
    table = rng.permutation(N * MOST + 1)[: N * MOST].reshape(N, MOST)
    wanted, wanted_lse = np.zeros((T, 4, 8)), np.full((4, T), -np.inf)
    hidden = np.ones(T, bool)
    for n in range(N):
        of_q = slice(int(cu_q[n]), int(cu_q[n + 1]))
        of_k = slice(int(cu_k[n]), int(cu_k[n]) + used[n])
        wanted[of_q], wanted_lse[:, of_q] = _alone(q[of_q], np.repeat(k[of_k], 2, 1), np.repeat(v[of_k], 2, 1), window)
        hidden[of_k] = False
        for j in range(used[n]):
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[n, j // PAGE], j % PAGE] = x[of_k.start + j]
        table[n, -(-int(used[n]) // PAGE) :] = rng.integers(-9, 99)  # behind the pages that are used: anything
    k[hidden], v[hidden] = np.nan, np.nan
    calls = {"packed": (k, v, cu_k, None), "paged": (*pools, None, jnp.asarray(table, jnp.int32))}
    with sdpa_kernel(backend):
        for name, (keys, values, cu, pages) in calls.items():
            out, lse = _inference(q, keys, values, cu_q, cu, jnp.asarray(used, jnp.int32), pages, window)
            np.testing.assert_allclose(out, wanted, atol=3e-6, err_msg=name)
            np.testing.assert_allclose(lse, wanted_lse, atol=3e-6, err_msg=name)


@jax.jit(static_argnames="window")
def _inference(q, k, v, cu_q, cu_k, used, pages, window):
    return varlen_attn(
        q, k, v, cu_q, cu_k, T, T, window_size=window, enable_gqa=True, seqused_k=used, block_table=pages, return_aux=LSE
    )


@pytest.mark.parametrize("longest", [1, 3, 16])
def test_decode_steps_side_by_side(longest, backend):
    """The block of rows is as short as the sequences: each step visits its own keys. Lengths from 0 to the whole slot."""
    slots, used = 70, np.array([70, 0, 1, 64, 33])
    sizes = np.array([longest, 1, longest, longest - 1, longest])
    cu_q, cu_k = boundaries(sizes), boundaries([slots] * 5)
    total = int(cu_q[-1])
    keep = packed(total, 350, np.asarray(cu_q), np.asarray(cu_k), -1, 0, None, used)
    problem = make(total, 350, B=1, Hq=6, Hk=2, E=16, keep=keep).rounded(np.float32)

    @jax.jit
    def run(q, k, v, used):
        return varlen_attn(
            q, k, v, cu_q, cu_k, longest, slots, window_size=(-1, 0), enable_gqa=True, seqused_k=used, return_aux=LSE
        )

    with sdpa_kernel(backend):
        check(problem, as_problem(*run(*tokens(problem), jnp.asarray(used))), names=("out", "lse"))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (6, 0), (0, 3)])
@pytest.mark.parametrize("longest", [1, 4])
def test_decode_steps_on_pages(longest, window, backend):
    """A single query and a few, sequences without a query and without keys, pages that a window leaves behind."""
    used, sizes = np.array([9, 0, 16, 5, 1]), np.array([longest, longest, 0, 1, longest])
    cu_q, total = boundaries(sizes), int(sizes.sum())
    keep = packed(total, 80, np.asarray(cu_q), np.arange(6) * 16, *window, None, used)
    problem = make(total, 80, B=1, Hq=4, Hk=2, E=8, keep=keep).rounded(np.float32)
    q, k, v = tokens(problem)
    order = np.random.default_rng(0).permutation(20)
    table = np.argsort(order).reshape(5, 4)
    with sdpa_kernel(backend):
        got = varlen_attn(
            q, *(x.reshape(20, 4, 2, 8)[order] for x in (k, v)), cu_q, None, longest, 16, window_size=window, enable_gqa=True,
            seqused_k=jnp.asarray(used), block_table=jnp.asarray(table), return_aux=LSE,
        )  # fmt: skip
    check(problem, as_problem(*got), names=("out", "lse"))


def test_what_does_not_fit_max_q_is_nan_with_pages_and_right_without(backend):
    q, pool = jnp.ones((6, 1, 8)), jnp.ones((2, 4, 1, 8))
    cu, used = jnp.array([0, 4, 5]), jnp.array([4, 4])
    with sdpa_kernel(backend):
        paged = varlen_attn(q, pool, pool, cu, None, 2, 4, seqused_k=used, block_table=jnp.array([[0], [1]]))
        flat = varlen_attn(q, pool.reshape(8, 1, 8), pool.reshape(8, 1, 8), cu, jnp.array([0, 4, 8]), 2, 4)
    np.testing.assert_array_equal(np.isnan(np.asarray(paged)).all((1, 2)), [1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(np.asarray(paged)[4:, 0, 0], [1, 0], atol=1e-6)
    np.testing.assert_allclose(np.asarray(flat)[:, 0, 0], [1, 1, 1, 1, 1, 0], atol=1e-6)


def test_other_boundaries_lengths_and_pages_are_the_same_program(backend):
    """One trace, one compiled program; and the results do change."""
    traces = []

    @jax.jit
    def packed_call(q, k, cu_q, cu_k, used, scale):
        traces.append("packed")
        return varlen_attn(q, k, k, cu_q, cu_k, 16, 16, window_size=(-1, 0), seqused_k=used, scale=scale)

    @jax.jit
    def gradient(q, k, cu_q, cu_k):
        traces.append("gradient")
        return jax.grad(lambda q: varlen_attn(q, k, k, cu_q, cu_k, 16, 16, window_size=(4, 0)).sum())(q)

    @jax.jit
    def paged_call(q, pool, cu_q, used, table):
        traces.append("paged")
        return varlen_attn(q, pool, pool, cu_q, None, 16, 16, seqused_k=used, block_table=table)

    q, k = (jax.random.normal(key, (16, 2, 8)) for key in jax.random.split(jax.random.key(0)))
    pool, results = k.reshape(4, 4, 2, 8), []
    with sdpa_kernel(backend):
        for cut, used, table in ((5, [5, 3], [[0, 1], [2, 3]]), (9, [2, 7], [[3, 0], [1, 2]]), (0, [0, 8], [[1, 1], [0, 2]])):
            cu, used = jnp.array([0, cut, 14]), jnp.array(used)
            results.append(
                (
                    packed_call(q, k, cu, cu, used, jnp.asarray(0.1 * (cut + 1))), gradient(q, k, cu, cu),
                    paged_call(q, pool, cu, used, jnp.array(table)),
                )
            )  # fmt: skip
    assert sorted(traces) == ["gradient", "packed", "paged"]
    assert [f._cache_size() for f in (packed_call, gradient, paged_call)] == [1, 1, 1]
    for a, b in ((0, 1), (1, 2)):
        assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(results[a], results[b], strict=True))


@pytest.mark.parametrize("name", ["seqused_k", "block_table"])
def test_inference_only_parameters_have_no_derivative(name):
    q, pool, cu = jnp.ones((4, 1, 8)), jnp.ones((2, 4, 1, 8)), jnp.array([0, 2, 4])
    used, table = jnp.array([2, 2]), jnp.array([[0], [1]])

    def call(q, k, scale):
        if name == "block_table":
            return varlen_attn(q, k, pool, cu, None, 2, 2, scale=scale, seqused_k=used, block_table=table).sum()
        return varlen_attn(
            q, k.reshape(8, 1, 8), np.ones((8, 1, 8), np.float32), cu, 2 * cu, 2, 4, scale=scale, seqused_k=used
        ).sum()

    args = q, pool, jnp.asarray(0.3)
    assert jax.jit(call)(*args) == pytest.approx(32, rel=1e-5)
    for i in range(3):
        with pytest.raises(ValueError, match=f"{name} is an inference-only parameter|seqused_k is an inference-only"):
            jax.grad(call, i)(*args)
    with pytest.raises(ValueError, match="inference-only"):
        jax.jvp(call, args, args)


def test_under_vmap_and_x64(x64):
    """A mapped axis of packed batches with boundaries of their own, float64 where there is one; and no tokens at all."""
    dtype = jnp.float64 if x64 else jnp.float32
    q, k = (jax.random.normal(key, (3, 12, 2, 8), dtype) for key in jax.random.split(jax.random.key(0)))
    cu = jnp.array([[0, 5, 12], [0, 0, 3], [2, 6, 11]])

    @jax.jit
    def call(q, k, cu):
        return varlen_attn(q, k, k, cu, cu, 12, 12, window_size=(-1, 0), return_aux=LSE)

    out, lse = jax.vmap(call)(q, k, cu)
    assert (out.dtype, lse.dtype) == (dtype, dtype)
    for i in range(3):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=3e-6), (out, lse), call(q[i], k[i], cu[i]))
    none = varlen_attn(q[0, :0], k[0], k[0], jnp.array([0]), jnp.array([0]), 0, 0, return_aux=LSE)
    assert [x.shape for x in none] == [(0, 2, 8), (2, 0)]
    nobody = varlen_attn(q[0], k[0, :0], k[0, :0], jnp.array([0, 12]), jnp.array([0, 0]), 12, 0, return_aux=LSE)
    assert not np.asarray(nobody[0]).any()
    assert np.isneginf(np.asarray(nobody[1])).all()


def test_memory_is_linear_in_the_tokens_and_pages_cost_their_copy():
    q = shape((16384, 2, 64), jnp.float32)
    cu = shape((65,), jnp.int32)

    def temporaries(call, *args):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return jax.jit(call).lower(*args).compile().memory_analysis().temp_size_in_bytes

    def loss(q, k, v, cu):
        return varlen_attn(q, k, v, cu, cu, 8000, 8000, window_size=(-1, 0)).sum()

    array = 16384 * 2 * 64 * 4
    assert temporaries(loss, q, q, q, cu) < 8 * array
    assert temporaries(jax.grad(loss, (0, 1, 2)), q, q, q, cu) < 8 * array
    step, pool = shape((64, 2, 64), jnp.float32), shape((4096, 16, 2, 64), jnp.float32)

    def paged(q, k, v, cu, used, table):
        return varlen_attn(q, k, v, cu, None, 1, 256, seqused_k=used, block_table=table)

    own = 64 * 16 * 16 * 2 * 64 * 4  # 64 sequences of 16 pages of 16, of a pool of 4096 pages
    assert temporaries(paged, step, pool, pool, cu, shape((64,), jnp.int32), shape((64, 16), jnp.int32)) < 2.5 * own


def test_the_tables_of_a_long_packed_batch_are_read_off_its_ends():
    """300 000 tokens: nothing in what a kernel's row tiles visit grows with tokens times tiles."""
    L = 300_000

    def table(cu):
        mask = Packed(cu, right=0).parts(L, L)[0].with_batch((1,))
        return visits.table(mask, 128, L, L, 128), visits.table(mask.transposed(), 128, L, L, 128)

    compiled = jax.jit(table).lower(shape((65,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 4 * L
    assert " while(" not in compiled.as_text()  # whose steps a GPU launches one by one
    cu = boundaries(np.random.default_rng(0).integers(100, 8000, 64))
    rows, _ = (np.asarray(x)[0] for x in compiled(cu))
    ends = np.asarray(cu)
    for tile in (0, 100, 1000, int(ends[-1]) // 128 - 1):
        sequence = np.searchsorted(ends, [128 * tile, 128 * tile + 127], side="right") - 1
        first, full_first, full_last, last = rows[tile]
        assert (first, last) == (ends[sequence[0]] // 128, tile + 1)  # causal: from the sequence's first key to the tile itself
        if sequence[0] == sequence[1]:
            assert (full_first, full_last) == (min(-(-ends[sequence[0]] // 128), tile + 1), max(tile, full_first))
    assert (rows[-1][3] - rows[-1][0]) == 1  # nobody's tokens: the one step that every walk has


def test_explain():
    q, k, cu = shape((256, 4, 64), jnp.bfloat16), shape((256, 2, 64), jnp.bfloat16), shape((3,), jnp.int32)
    choice = explain(q, k, k, cu, cu, 64, 64, enable_gqa=True, call=varlen_attn, device="cpu")
    assert choice.backend is SDPBackend.EFFICIENT_ATTENTION
    assert "cuDNN attention does not support KeyRanges masks." in choice.rejected[SDPBackend.CUDNN_ATTENTION]
    choice = explain(q, k, k, cu, cu, 64, 64, enable_gqa=True, call=varlen_attn, device="cuda:sm90")
    assert (choice.backend is SDPBackend.FLASH_ATTENTION) == (compat.JAX_VERSION >= (0, 11, 2))
    pool, used, table = shape((8, 16, 2, 64), jnp.bfloat16), shape((2,), jnp.int32), shape((2, 3), jnp.int32)
    for device, pages in (("cpu", 30), ("cuda:sm90", 30), ("cuda:sm90", 3)):
        table = shape((2, pages), jnp.int32)
        choice = explain(
            q, pool, pool, cu, None, 1, 48, enable_gqa=True, seqused_k=used, block_table=table, call=varlen_attn, device=device
        )  # fmt: skip
        reads = choice.backend is SDPBackend.FLASH_ATTENTION and pages == 30
        assert ("Pages are gathered by XLA" in str(choice)) != reads
        assert ("Pages are read where they lie" in str(choice)) == reads
        assert "Gradients" not in str(choice.notes)
        assert "Inference only" in str(choice)


@needs_mosaic
def test_calls_lower_for_a_hopper_that_is_not_here(x64):
    """Packed: one kernel forward, two more for the gradients; pages: gathered, and the forward's kernel."""
    q, k, cu = shape((200, 4, 72), jnp.bfloat16), shape((200, 2, 72), jnp.bfloat16), shape((4,), jnp.int32)
    pool, used, table = shape((8, 16, 2, 72), jnp.bfloat16), shape((3,), jnp.int32), shape((3, 5), jnp.int32)

    def packed_call(q, k, v, cu):
        return varlen_attn(q, k, v, cu, cu, 100, 100, window_size=(-1, 0), enable_gqa=True)

    def gradients(*args):
        return jax.grad(lambda q, k, v: packed_call(q, k, v, args[3]).astype(jnp.float32).sum(), (0, 1, 2))(*args[:3])

    def paged_call(q, k, v, cu, used, table):
        return varlen_attn(q, k, v, cu, None, 2, 80, window_size=(30, 0), enable_gqa=True, seqused_k=used, block_table=table)

    with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for kernels, f, args in (
            (1, packed_call, (q, k, k, cu)), (3, gradients, (q, k, k, cu)), (1, paged_call, (q, pool, pool, cu, used, table))
        ):  # fmt: skip
            text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("mosaic_gpu_v2") == kernels, f.__name__


QUERY, POOL, CU = jnp.ones((6, 4, 8)), jnp.ones((3, 4, 4, 8)), jnp.array([0, 4, 6])


def call(**changes):
    given = {"query": QUERY, "key": QUERY, "value": QUERY, "cu_seq_q": CU, "cu_seq_k": CU, "max_q": 4, "max_k": 4, **changes}
    positional = [given.pop(name) for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")]
    return varlen_attn(*positional, **given)


PAGED = {"key": POOL, "value": POOL, "cu_seq_k": None, "seqused_k": jnp.array([1, 2]), "block_table": jnp.zeros((2, 2), int)}
ERRORS = {
    "heads": ({"key": QUERY[:, :2], "value": QUERY[:, :2]}, ValueError, "the same number of heads but got Hq=4 and Hkv=2. Try setting enable_gqa=True for GQA"),
    "grouped heads": ({"key": QUERY[:, :3], "value": QUERY[:, :3], "enable_gqa": True}, ValueError, "a multiple of kv heads for GQA but got Hq=4 and Hkv=3"),
    "heads of values": ({"value": QUERY[:, :2]}, ValueError, "key and value to have the same number of heads but got 4 and 2"),
    "heads of pages": ({**PAGED, "key": POOL[:, :, :2], "value": POOL[:, :, :2]}, ValueError, "got Hq=4 and Hkv=2"),
    "tokens of values": ({"value": QUERY[:5]}, ValueError, r"the same tokens, got \(6,\) and \(5,\)"),
    "head dims": ({"key": QUERY[..., :4]}, ValueError, "the same head dim E, got 8 and 4"),
    "dtypes": ({"key": QUERY.astype(jnp.bfloat16)}, TypeError, "the same dtype"),
    "a batch dim": ({"query": QUERY[None]}, ValueError, r"query must be packed, \(T_q, Hq, D\)"),
    "pages without a table": ({"key": POOL, "value": POOL}, ValueError, r"key and value \(T_k, H, D\)"),
    "a table without pages": ({**PAGED, "key": QUERY, "value": QUERY}, ValueError, r"\(pages, page, H, D\) with a block_table"),
    "a table without seqused_k": ({**PAGED, "seqused_k": None}, ValueError, "block_table needs seqused_k"),
    "a table of other sequences": ({**PAGED, "block_table": jnp.zeros((3, 2), int)}, ValueError, r"block_table must be an integer array of shape \(N, max_pages\) = \(2, max_pages\), got int32\[3, 2\]"),
    "a float table": ({**PAGED, "block_table": jnp.zeros((2, 2))}, TypeError, "block_table must be an integer array"),
    "cu_seq_k is None": ({"cu_seq_k": None}, ValueError, "cu_seq_k may be None only where a block_table"),
    "cu_seq_k of other sequences": ({"cu_seq_k": jnp.arange(4)}, ValueError, r"cu_seq_k must be an integer array of shape \(N \+ 1,\) = \(3,\), got int32\[4\]"),
    "cu_seq_q float": ({"cu_seq_q": jnp.ones(3)}, TypeError, r"cu_seq_q must be an integer array of shape \(N \+ 1,\), got float32\[3\]"),
    "cu_seq_q of rank 2": ({"cu_seq_q": CU[None]}, ValueError, "cu_seq_q must be an integer array"),
    "cu_seq_q empty": ({"cu_seq_q": CU[:0]}, ValueError, "got an empty one"),
    "cu_seq_q a list": ({"cu_seq_q": [0, 4, 6]}, TypeError, "cu_seq_q must be a JAX or NumPy array, got list"),
    "seqused_k of other sequences": ({"seqused_k": jnp.arange(3)}, ValueError, r"seqused_k must be an integer array of shape \(N,\) = \(2,\)"),
    "max_q an array": ({"max_q": jnp.asarray(4)}, TypeError, r"'max_q' must be a \(static\) int, not"),
    "max_k negative": ({"max_k": -1}, ValueError, "max_k must be at least 0, got -1"),
    "window of three": ({"window_size": (1, 2, 3)}, ValueError, "window_size must have length 2, got 3"),
    "window an int": ({"window_size": 3}, TypeError, r"'window_size' must be \(left, right\), not int"),
    "window too small": ({"window_size": (-2, 0)}, ValueError, "left must be an int >= -1"),
    "enable_gqa": ({"enable_gqa": 1}, TypeError, "'enable_gqa' must be"),
    "scale": ({"scale": "a"}, TypeError, "'scale' must be a number"),
    "return_aux": ({"return_aux": True}, TypeError, "'return_aux' must be an AuxRequest or None, not bool"),
    "num_splits 0": ({"num_splits": 0}, ValueError, "num_splits must be at least 1, got 0"),
    "num_splits float": ({"num_splits": 2.0}, TypeError, "'num_splits' must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(**changes)


# --- the kernels: pages where they lie, and the same bits in any batch


def paged(sizes, used, page, most, window, dtype=jnp.bfloat16, **heads):
    """(problem, the arguments and the keywords of its call on pages in a random order), with NaN in rows that nobody may see, and any
    number behind the pages that are used."""
    rng, N, cache = np.random.default_rng(1), len(used), page * most
    cu_q, total = boundaries(sizes), int(np.sum(sizes))
    keep = packed(total, N * cache, np.asarray(cu_q), np.arange(N + 1) * cache, *window, None, np.asarray(used))
    problem = make(total, N * cache, B=1, keep=keep, **heads).rounded(dtype)
    q, *pools = (x.astype(dtype) for x in tokens(problem))
    order, hidden = rng.permutation(N * most), np.concatenate([np.arange(cache) >= n for n in used])
    pools = [jnp.where(hidden[:, None, None], jnp.nan, x).reshape(N * most, page, *x.shape[1:])[order] for x in pools]
    table = np.argsort(order).reshape(N, most)
    for n, row in zip(used, table, strict=True):
        row[-(-n // page) :] = rng.integers(-9, 9999, most - -(-n // page))
    args = q, *pools, cu_q, None, int(max(sizes)), cache
    return problem, args, {
        "window_size": window, "enable_gqa": True, "seqused_k": jnp.asarray(used), "block_table": jnp.asarray(table), "return_aux": LSE,
    }  # fmt: skip


def alone(n, args, options):
    """The call of sequence n by itself: with its own longest queries, and no more pages than it has."""
    q, k, v, cu_q, _, _, _ = args
    start, stop, used, page = int(cu_q[n]), int(cu_q[n + 1]), options["seqused_k"][n : n + 1], k.shape[1]
    table = options["block_table"][n : n + 1, : -(-int(used[0]) // page)]
    own = q[start:stop], k, v, jnp.array([0, stop - start]), None, stop - start, int(used[0])
    return own, {**options, "seqused_k": used, "block_table": table}


def interpreted(*args, **options):
    """`varlen_attn` by `Flash` in Mosaic's interpreter, and whether it read the pages where they lie."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    flash = Flash(interpret=plgpu.InterpretGPUParams(detect_races=True))
    request, restore = check_varlen.varlen_request(*args, **options)
    assert not (options.get("num_splits") and flash.against_batch_invariance(request))
    takes = flash.takes_pages(request)
    return restore(*jax.jit(flash.run)(request if takes else request.gathered())), takes


@pytest.fixture
def few_programs(monkeypatch):
    """The interpreter's time is that of all programs, idle or not."""
    monkeypatch.setattr(decode_tuning, "SMS", 5)


PAGES = {
    "one query, pages of 16": lambda: paged([1, 1, 0, 1], [257, 0, 64, 1], 16, 17, (-1, 0), Hq=4, Hk=2, E=16),
    "three queries, a window, pages of 8": lambda: paged([3, 1, 2], [270, 33, 1], 8, 35, (40, 0), Hq=2, Hk=1, E=16),
    "pages of 12 are gathered": lambda: paged([1, 1], [250, 13], 12, 22, (20, 0), Hq=2, Hk=1, E=16),
}


@needs_mosaic
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("name", [*list(PAGES)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(PAGES)[2:])])
def test_decode_steps_on_pages_interpreted(name):
    problem, args, options = PAGES[name]()
    got, takes = interpreted(*args, **options)
    assert takes == ("gathered" not in name)
    check(problem, as_problem(*got), names=("out", "lse"))


INVARIANT = {
    "pages of 16": lambda: paged([1, 2], [70, 130], 16, 20, (-1, 0), Hq=2, Hk=1, E=16),
    "a window": lambda: paged([2, 1, 3], [200, 65, 3], 8, 26, (30, 0), Hq=2, Hk=1, E=16),
}


@needs_mosaic
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("name", "ns"), [("pages of 16", [1]), pytest.param("a window", [0, 1, 2], marks=pytest.mark.slow)])
def test_the_same_bits_alone_and_in_a_batch_interpreted(name, ns):
    """Of whatever other lengths: alone, a sequence has fewer pages and a smaller max_q, and keys that fill a single tile."""
    problem, args, options = INVARIANT[name]()
    options["num_splits"] = 1
    (out, lse), _ = interpreted(*args, **options)
    check(problem, as_problem(out, lse), names=("out", "lse"))
    for n in ns:
        own_args, own_options = alone(n, args, options)
        (own, own_lse), _ = interpreted(*own_args, **own_options)
        tokens_of = slice(int(args[3][n]), int(args[3][n + 1]))
        np.testing.assert_array_equal(np.asarray(own, np.float32), np.asarray(out[tokens_of], np.float32))
        np.testing.assert_array_equal(own_lse, lse[:, tokens_of])


LONG = {
    "24 sequences, pages of 16": lambda: paged([1] * 24, np.random.default_rng(0).integers(0, 280, 24), 16, 18, (-1, 0), Hq=8, Hk=2, E=64),
    "four queries, a window, pages of 128": lambda: paged([4, 1, 0, 3], [2048, 1000, 7, 129], 128, 16, (500, 0), Hq=8, Hk=2, E=64),
    "pages of 8, odd head dims": lambda: paged([1, 2, 1], [999, 0, 1], 8, 125, (-1, -1), Hq=4, Hk=4, E=40),
}  # fmt: skip


@needs_mosaic
@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [None, 1])
@pytest.mark.parametrize("name", LONG)
def test_decode_steps_on_pages_and_the_same_bits_in_any_batch(name, num_splits):
    """Through the public function; with num_splits=1 the sequences alone too."""
    problem, args, options = LONG[name]()
    run = jax.jit(varlen_attn, static_argnames=("max_q", "max_k", "window_size", "enable_gqa", "return_aux", "num_splits"))
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")

    def given(args, options):
        return run(**dict(zip(names, args, strict=True)), **options, num_splits=num_splits)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out, lse = given(args, options)
        check(problem, as_problem(out, lse), names=("out", "lse"))
        for n in range(min(5, len(args[3]) - 1)) if num_splits else ():
            if args[3][n] == args[3][n + 1] or options["seqused_k"][n] == 0:
                continue
            own_args, own_options = alone(n, args, options)
            own, own_lse = given(own_args, own_options)
            tokens_of = slice(int(args[3][n]), int(args[3][n + 1]))
            np.testing.assert_array_equal(np.asarray(own, np.float32), np.asarray(out[tokens_of], np.float32))
            np.testing.assert_array_equal(own_lse, lse[:, tokens_of])


@needs_mosaic
def test_pages_lower_for_a_hopper_that_is_not_here_without_a_gather_of_them(x64):
    """Read where they lie by the decode kernels; mapped over as they are, with a pool for each entry gathered; vmap or not."""
    q, pool, cu = shape((3, 4, 64), jnp.bfloat16), shape((50, 16, 2, 64), jnp.bfloat16), shape((4,), jnp.int32)
    used, table = shape((3,), jnp.int32), shape((3, 20), jnp.int32)

    def call(q, pool, cu, used, table):
        return varlen_attn(q, pool, pool, cu, None, 1, 320, window_size=(30, 0), enable_gqa=True, seqused_k=used, block_table=table)

    def twice(x):
        return shape((2, *x.shape), x.dtype)

    def lowered(f, *args):
        with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered(call, q, pool, cu, used, table)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
    assert "tensor<3x320x2x64xbf16>" not in text
    text = lowered(jax.vmap(call, (0, None, 0, 0, None)), twice(q), pool, twice(cu), twice(used), table)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
    assert "320x2x64xbf16>" not in text
    text = lowered(jax.vmap(call), *map(twice, (q, pool, cu, used, table)))
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
    assert "320x2x64xbf16>" in text


@pytest.mark.parametrize(
    "mapped", [(0, None, 0, 0, None), (None, None, None, None, 0), (0, 0, None, 0, 0), (None, 0, None, None, None)]
)
def test_pages_under_vmap(mapped, backend):
    """Whatever is mapped: queries and tables share a pool, or each has its own."""
    q, pool = jax.random.normal(jax.random.key(0), (2, 3, 4, 8)), jax.random.normal(jax.random.key(1), (2, 5, 8, 2, 8))
    args = (
        q, pool, jnp.array([[0, 1, 3], [0, 2, 3]]), jnp.array([[9, 16], [1, 0]]), jnp.array([[[4, 0], [1, 3]], [[2, 2], [77, -5]]])
    )  # fmt: skip
    args = tuple(x if dim == 0 else x[0] for x, dim in zip(args, mapped, strict=True))

    def call(q, pool, cu, used, table):
        return varlen_attn(q, pool, 2 * pool, cu, None, 2, 16, enable_gqa=True, seqused_k=used, block_table=table, return_aux=LSE)

    with sdpa_kernel(backend):
        got = jax.jit(jax.vmap(call, mapped))(*args)
        for i in range(2):
            alone = call(*(x[i] if dim == 0 else x for x, dim in zip(args, mapped, strict=True)))
            jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=3e-6), got, alone)


def test_the_promise_of_the_same_bits_in_any_batch_is_refused_where_nobody_keeps_it():
    with pytest.warns(UserWarning, match="num_splits=1"), pytest.raises(NoViableBackendError, match="is not supported yet"):
        call(num_splits=1)
    choice = explain(*[QUERY] * 3, CU, CU, 4, 4, num_splits=1, call=varlen_attn, device="cpu")
    assert choice.backend is None
    sentence = "num_splits=1, the same bits for a sequence in any batch, is not supported yet."
    flash = choice.rejected.pop(SDPBackend.FLASH_ATTENTION)
    assert any("tiles of packed keys begin where the batch does" in reason for reason in flash)
    assert all(sentence in reasons for reasons in choice.rejected.values())


@needs_mosaic
@pytest.mark.parametrize(
    ("max_q", "dtype", "why_not"), [(8, "bfloat16", None), (9, "bfloat16", "at most 64 queries"), (9, "float16", None)]
)
def test_it_does_not_hang_on_the_others_queries_whether_a_cache_of_8_bits_is_widened_first(max_q, dtype, why_not):
    """With 72 rows it would be; float16 queries have it widened with any number of rows."""
    q, pool, scale = shape((18, 8, 128), dtype), shape((8, 32, 1, 128), jnp.int8), shape((8, 1, 32), jnp.float32)
    cu, used, table = shape((3,), jnp.int32), shape((2,), jnp.int32), shape((2, 3), jnp.int32)
    choice = explain(
        q, pool, pool, cu, None, max_q, 96, enable_gqa=True, seqused_k=used, block_table=table, num_splits=1, key_scale=scale,
        value_scale=scale, call=varlen_attn, device="cuda:sm90",
    )  # fmt: skip
    assert choice.backend is (None if why_not else SDPBackend.FLASH_ATTENTION)
    assert not why_not or why_not in " ".join(choice.rejected[SDPBackend.FLASH_ATTENTION])


@needs_mosaic
@pytest.mark.parametrize(
    ("max_q", "heads", "why_not"),
    [(1, 4, None), (16, 4, None), (17, 4, "Got 17 and 34"), (4, 80, "128 with the heads of a group. Got 4 and 160"), (1, 40, None)],
)
def test_the_decode_kernels_keep_that_promise_on_pages(max_q, heads, why_not):
    """However few keys there are, for that is what others in the batch have."""
    q, pool = shape((34, heads, 64), jnp.bfloat16), shape((8, 4, 2, 64), jnp.bfloat16)
    cu, used, table = shape((3,), jnp.int32), shape((2,), jnp.int32), shape((2, 3), jnp.int32)
    choice = explain(
        q, pool, pool, cu, None, max_q, 12, enable_gqa=True, seqused_k=used, block_table=table, num_splits=1, call=varlen_attn,
        device="cuda:sm90",
    )  # fmt: skip
    assert choice.backend is (None if why_not else SDPBackend.FLASH_ATTENTION)
    assert (why_not or "one sequence after another") in " ".join(
        choice.rejected[SDPBackend.FLASH_ATTENTION] if why_not else choice.notes
    )


def test_a_number_of_splits_is_a_hint_and_numpy_will_do():
    given = {"cu_seq_q": np.array([0, 4, 6]), "cu_seq_k": np.array([0, 4, 6], np.uint8), "max_q": np.int64(4), "window_size": None}
    np.testing.assert_allclose(call(num_splits=4, **given, query=np.ones((6, 4, 8), np.float32)), np.ones((6, 4, 8)), atol=1e-6)


def test_every_parameter_reaches_the_request():
    import inspect

    assert list(inspect.signature(varlen_attn).parameters) == list(inspect.signature(check_varlen.varlen_request).parameters)
