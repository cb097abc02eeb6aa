"""EFFICIENT's block loops at block sizes of our choosing, so that small calls have many blocks, partial and empty ones included.

The plan decides which walk a call takes; these tests replace it, and use nothing else that is private.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from harness import _program, dropped, make, on_jax
from oracle import band, check

from jax_sdpa.attention import SDPBackend
from jax_sdpa.attention.bias import KeyLengths, causal, causal_lower_right, sliding_window
from jax_sdpa.implementations import plans
from jax_sdpa.implementations.chunks import spread_scale
from jax_sdpa.implementations.efficient import Efficient

EFFICIENT = SDPBackend.EFFICIENT_ATTENTION


@pytest.fixture
def blocks(monkeypatch):
    """`blocks(bq, bk, whole)`: from now on every plan has these block sizes. The plan is no part of jit's key: caches go."""

    def use(block_q, block_k, whole=False, nb=1, nh=1):
        def plan(self, request, *rest):
            return plans.Plan(nb, nh, min(block_q, request.query_len), min(block_k, request.key_len), whole=whole)

        monkeypatch.setattr(Efficient, "_plan", plan)
        _program.cache_clear()
        jax.clear_caches()

    yield use
    _program.cache_clear()
    jax.clear_caches()


IN_BLOCKS = [
    "plain 129x127", "causal 257x129", "lower right 300x129, a whole block of rows empty",
    "offset per batch element, also negative and beyond S", "window 17,4 with offsets", "key lengths 0, 1, 255, 256, 257, 300",
    "query lengths", "segments out of order, L != S", "boundaries, window, L != S, some used", "everything, torch's face", "everything, JAX's face", "bias (L, S), -inf rows",
    "bias (B, H, L, S) and bool (B, 1, 1, S)", "grouped, bias per query head", "sinks with empty rows",
    "bias that drifts, so that the maximum moves in every block",
]  # fmt: skip
OTHERS = [name for name in CASES if name not in IN_BLOCKS]


@pytest.mark.parametrize("name", [*IN_BLOCKS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_case_in_blocks_of_48_by_64(name, blocks):
    blocks(48, 64)
    problem, mask, options = CASES[name]()
    problem = problem.rounded(np.float32)
    check(problem, on_jax(problem, EFFICIENT, mask=mask, **options))


STATIC = [
    "plain 257x513", "lower right 300x129, a whole block of rows empty", "window 0,0, L > S", "window 40,0 with a static offset",
    "bias (L, S), -inf rows", "grouped 6/2, Ev > E", "sinks with empty rows",
]  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_static_masks_by_whole_rows_of_32(name, blocks):
    blocks(32, 1 << 30, whole=True)
    problem, mask, options = CASES[name]()
    problem = problem.rounded(np.float32)
    check(problem, on_jax(problem, EFFICIENT, mask=mask, **options))


SIZES = [
    (1, 1),
    (7, 16),
    (17, 15),
    (31, 33),
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((16, 7), (33, 31), (32, 32))),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lengths_around_blocks_of_16(sizes, blocks):
    """One less and more than one and two blocks, with lengths, a bias, dropout: padding is visible nowhere."""
    blocks(16, 16)
    L, S = sizes
    key = jax.random.key(1)
    keep = band(L, S, -1, 0, S - L) & (np.arange(S) < np.array([S, S - 1])[:, None])[:, None, None, :]
    problem = make(L, S, Hq=4, Hk=2, keep=keep, bias=np.ones((L, 1)), survivors=dropped(key, 2, 4, L, S, 0.25)).rounded(np.float32)
    mask = causal_lower_right(L, S) & KeyLengths(jnp.array([S, S - 1]))
    check(problem, on_jax(problem, EFFICIENT, mask=mask, dropout_p=0.25, dropout_rng=key))


@pytest.mark.parametrize(("nb", "nh"), [(1, 2), (2, 4), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((4, 4), (1, 1)))])
def test_chunks_of_batch_and_heads(nb, nh, blocks):
    blocks(16, 32, nb=nb, nh=nh)
    rng = np.random.default_rng(0)
    offsets = np.array([40, 3, -9, 60])
    problem = make(
        40,
        70,
        B=4,
        Hq=8,
        Hk=4,
        keep=band(40, 70, 20, 0, offsets),
        bias=rng.standard_normal((4, 8, 1, 70)),
        sinks=rng.standard_normal(8),
        dlse=True,
    )
    problem = problem.rounded(np.float32)
    check(problem, on_jax(problem, EFFICIENT, mask=sliding_window(20, 0, jnp.asarray(offsets)), face="jax"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_blocks_in_other_dtypes(dtype, blocks):
    blocks(16, 32)
    problem = make(40, 70, Hq=4, Hk=2, keep=band(40, 70, -1, 0, 20), dlse=True).rounded(dtype)
    with jax.enable_x64(dtype == "float64"):
        check(problem, on_jax(problem, EFFICIENT, mask=causal(20), face="jax"))


LONG = {
    "plain, online": (make(521, 1031, B=1, Hq=1, E=4, dlse=True), None),
    "causal, online, padded blocks": (make(1031, 1031, B=1, Hq=1, E=4, keep=band(1031, 1031, -1, 0), dlse=True), causal()),
    "window": (make(1030, 1100, B=1, Hq=1, E=4, keep=band(1030, 1100, 130, 0, 70), dlse=True), sliding_window(130, 0, 70)),
    "traced offsets": (make(600, 1100, Hq=1, E=4, keep=band(600, 1100, 300, 5, np.array([-100, 590])), dlse=True), sliding_window(300, 5, jnp.array([-100, 590]))),
    "traced lengths, grouped": (
        make(3, 1300, B=3, Hq=4, Hk=1, E=4, keep=(np.arange(1300) < np.array([[1024], [1025], [0]]))[:, None, None], dlse=True),
        KeyLengths(jnp.array([1024, 1025, 0])),
    ),
    "bias": (make(600, 1100, B=1, Hq=1, E=4, bias=np.random.default_rng(0).standard_normal((600, 1100)), dlse=True), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_calls_under_the_real_plan(name):
    problem, mask = LONG[name]
    problem = problem.rounded(np.float32)
    check(problem, on_jax(problem, EFFICIENT, mask=mask, face="jax"))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 0.125, 12**-0.5, -3.7, 1e-40, 1e30, -1e-30])
def test_the_scale_is_spread_so_that_bfloat16_is_not_rounded(scale):
    """scores * rows * keys is the scale; what multiplies a bfloat16 operand is a power of two unless the scale is extreme."""
    for bfloat16 in (False, True):
        rows, keys, rest = spread_scale(scale, bfloat16)
        assert rows * keys * rest == pytest.approx(scale, rel=1e-15)
        if bfloat16 and keys == 1.0 and scale:
            assert np.frexp(abs(rows))[0] == 0.5


@pytest.mark.parametrize("E", [8, 16])
@pytest.mark.parametrize("factor", [1.0, 1e9, 1e17])
def test_bfloat16_at_every_size_of_scale(E, factor):
    """Scores of ordinary size from a scale that is a power of two (E = 16) or not, small, and extreme."""
    problem = make(40, 70, E=E, dlse=True, keep=band(40, 70, -1, 0, 20), scale=factor**-2 * E**-0.5)
    problem = problem.but(query=problem.query * factor, key=problem.key * factor).rounded("bfloat16")
    with np.errstate(over="ignore"):  # in the oracle's cotangent of the scale, which nobody asks for here
        check(problem, on_jax(problem, EFFICIENT, mask=causal(20), face="jax"))
