"""The dropout mask: one definition with the same bits from NumPy, XLA and a Hopper kernel, and the statistics of fair coins."""

import doctest
import hashlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from jax_sdpa import dropout

KEY = jax.random.key(2026)


def numpy_block(seeds, q_start, q_len, k_start, k_len, p):
    """`keep` head by head in NumPy: the reference for every other way."""
    q, k = np.arange(q_start, q_start + q_len)[:, None], np.arange(k_start, k_start + k_len)[None, :]
    seeds = np.asarray(seeds)
    blocks = [dropout.keep(s0, s1, q, k, p) for s0, s1 in seeds.reshape(-1, 2)]
    return np.stack(blocks).reshape(*seeds.shape[:-1], q_len, k_len)


def picture(mask):
    return ["".join(".#"[int(bit)] for bit in row) for row in np.asarray(mask)]


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# ---- the bits


@pytest.mark.parametrize(
    ("words", "want"),
    [  # Random123, kat_vectors: threefry2x32 20
        ((0, 0, 0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 4, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_is_the_published_one(words, want):
    got = dropout.threefry2x32(*(np.array([w], np.uint32) for w in words))
    assert tuple(int(w[0]) for w in got) == want
    theirs = threefry_2x32(jnp.array(words[:2], jnp.uint32), jnp.array(words[2:], jnp.uint32))
    assert tuple(theirs.tolist()) == want


# If one of these fails, masks of checkpoints and of other backends no longer agree: count DROPOUT_VERSION up, or undo the change.
GOLDEN_PICTURE = [
    ".##.###..#....#......#..#..#...#",
    ".####..###....#..##..#..##..####",
    "#...##..##.#.#.#..####.##..##..#",
    ".##.#.##.#.....###.#....#.....##",
    "..#.#...###.......###.##..#.####",
    "##....##.######....#..#..#.#.###",
    "..####..###.#...######..#....#.#",
    "####..#....###.#.......#..######",
]


def test_golden_bits():
    assert dropout.DROPOUT_VERSION == 1
    seeds = dropout.seeds(jax.random.key(0, impl="threefry2x32"), 2, 3)
    assert seeds[0, :2].tolist() == [[3258769290, 3769757759], [4131996398, 589852147]]
    assert (
        picture(dropout.keep(seeds[1, 2, 0], seeds[1, 2, 1], jnp.arange(8)[:, None], jnp.arange(32)[None, :], 0.5))
        == GOLDEN_PICTURE
    )
    assert digest(numpy_block(seeds, 1000, 64, 5000, 256, 0.1)) == "b855d00ba198bce2"
    legacy = jnp.array([0, 0], jnp.uint32)
    np.testing.assert_array_equal(dropout.seeds(legacy, 2, 3), seeds)
    rbg = dropout.seeds(jax.random.key(7, impl="rbg"), 1, 1)
    assert rbg[0, 0].tolist() == [335919742, 1587455261]
    np.testing.assert_array_equal(dropout.seeds(jnp.array([0, 7, 0, 7], jnp.uint32), 1, 1), rbg)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_numpy_eager_and_jit_agree(p):
    seeds = dropout.seeds(KEY, 2, 3)
    want = numpy_block(seeds, 70, 37, 3, 133, p)
    traced = jax.jit(lambda seeds, q, k: dropout.keep_block(seeds, q, 37, k, 133, p))
    np.testing.assert_array_equal(traced(seeds, jnp.int32(70), np.uint32(3)), want)
    q, k = jnp.arange(70, 107)[:, None], jnp.arange(3, 136)[None, :]
    np.testing.assert_array_equal(jax.jit(dropout.keep, static_argnums=4)(seeds[1, 2, 0], seeds[1, 2, 1], q, k, p), want[1, 2])
    if p == 0.1:
        np.testing.assert_array_equal(dropout.keep_block(seeds, 70, 37, 3, 133, p), want)  # op by op
    one_by_one = jax.jit(jax.vmap(jax.vmap(lambda s: dropout.keep_block(s, 70, 37, 3, 133, p))))(seeds)
    np.testing.assert_array_equal(one_by_one, want)


def test_a_keys_own_bits_may_come_beside_its_others():
    k, own = np.arange(1000, 1300), dropout.KEY_BITS
    found = dropout.key_words(np.uint32(5), k & ~own, k & own)
    np.testing.assert_array_equal(found, dropout.key_words(np.uint32(5), k))


def test_any_tiling_and_alignment_gives_the_same_bits():
    seeds = dropout.seeds(KEY, 1, 2)
    whole = numpy_block(seeds, 0, 96, 0, 192, 0.3)
    block = jax.jit(dropout.keep_block, static_argnums=(2, 4, 5))
    for bq, bk in ((1, 192), (96, 1), (32, 64), (24, 7), (5, 16)):
        for q, k in itertools.product(range(0, 96 - bq + 1, 19), range(0, 192 - bk + 1, 41)):
            np.testing.assert_array_equal(block(seeds, q, bq, k, bk, 0.3), whole[..., q : q + bq, k : k + bk])


def test_offsets_are_global_coordinates():
    whole = dropout.seeds(KEY, 4, 6)
    np.testing.assert_array_equal(dropout.seeds(KEY, 2, 3, batch_offset=2, head_offset=3), whole[2:, 3:])
    traced = jax.jit(lambda key, b: dropout.seeds(key, 2, 6, batch_offset=b))
    np.testing.assert_array_equal(traced(KEY, jnp.int32(1)), whole[1:3])
    assert np.unique(np.asarray(whole).reshape(-1, 2), axis=0).shape == (24, 2)


def test_a_part_of_a_call_drops_what_the_call_drops_there():
    """Four words: two seeds, and where the part's queries and keys begin; by `at` for those who cut a call themselves."""
    whole = dropout.seeds(KEY, 4, 6)
    block = jax.jit(dropout.keep_block, static_argnums=(2, 4, 5))
    bits = block(whole, 0, 64, 0, 96, 0.4)
    np.testing.assert_array_equal(block(dropout.seeds_at(whole, 24, jnp.int32(40)), 3, 20, 5, 30, 0.4), bits[..., 27:47, 45:75])
    placed = dropout.at(KEY, batch=2, head=jnp.int32(3), query_position=24, key_position=40)
    np.testing.assert_array_equal(block(placed.seeds(2, 3), 0, 40, 0, 56, 0.4), bits[2:, 3:, 24:, 40:])
    assert dropout.at(KEY, batch=2).seeds(2, 3).shape == (2, 3, 2)  # nothing moved: the kernels' two words
    with pytest.raises(TypeError, match="add up the offsets"):
        dropout.at(placed, batch=1)


def test_x64_changes_nothing():
    def everything():
        seeds = dropout.seeds(jax.random.key(2026), 2, 2)
        block = jax.jit(dropout.keep_block, static_argnums=(2, 4, 5))(seeds, jnp.arange(3)[1] * 50, 20, 7, 40, 0.2)
        return seeds, block, jax.jit(dropout.key_words)(seeds[0, 0, 0], jnp.arange(9))

    with jax.enable_x64(False):
        narrow = everything()
    with jax.enable_x64(True):
        wide = everything()
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_partitionable_flag_changes_nothing():
    masks = []
    for flag in (True, False):
        with jax.threefry_partitionable(flag):
            masks.append(numpy_block(dropout.seeds(KEY, 1, 2), 0, 16, 0, 16, 0.5))
    np.testing.assert_array_equal(*masks)


def test_the_ends_of_p():
    seeds = dropout.seeds(KEY, 1, 1)
    assert numpy_block(seeds, 0, 64, 0, 64, 0.0).all()
    assert not numpy_block(seeds, 0, 64, 0, 64, 1.0).any()
    assert dropout.rounded(1e-12) == 0.0  # below 2**-33 nothing is dropped, and survivors are scaled by 1
    assert dropout.threshold(2.0**-32) == 1
    below_one = dropout.rounded(1 - 1e-12)
    assert below_one < 1  # so the scale is finite
    for p in (0.0, 2.0**-32, 0.1, 1 / 3, below_one, 1.0):
        assert dropout.rounded(dropout.rounded(p)) == dropout.rounded(p)
    q, k = np.arange(2048)[:, None], np.arange(2048)[None, :]
    tiny = ~dropout.keep(*np.asarray(seeds)[0, 0], q, k, 1e-5)
    assert 15 <= tiny.sum() <= 75  # 42 expected


@pytest.mark.parametrize(
    "bad", [jnp.zeros((3, 2), jnp.uint32), jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.uint32), jnp.zeros((), jnp.uint32)]
)
def test_only_one_key_is_taken(bad):
    with pytest.raises(ValueError, match="expected one JAX PRNG key"):
        dropout.seeds(bad, 1, 1)
    with pytest.raises(ValueError, match="expected one JAX PRNG key"):
        dropout.seeds(jax.random.split(KEY, 2), 1, 1)


def test_doctests():
    assert doctest.testmod(dropout).failed == 0


# ---- inside a Mosaic GPU kernel


def mask_kernel(p, **kwargs):
    """A kernel that writes a (64, 64) tile of the mask as float32, in a WGMMA accumulator's layout. jax 0.11.2 and newer."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(seeds, out):
        iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (64, 64), axis, layout=plgpu.Layout.WGMMA)  # noqa: E731
        keep = dropout.keep(seeds[0], seeds[1], iota(0) + 1000, iota(1) + 5000, p)
        out[...] = jnp.where(keep, 1.0, 0.0)

    return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32), grid=(1,), grid_names=("x",), **kwargs)


mosaic = pytest.mark.skipif(sys.version_info < (3, 12) or jax.__version_info__ < (0, 11, 2), reason="FLASH needs jax 0.11.2")


@mosaic
@pytest.mark.parametrize("p", [0.1, 1.0])
def test_a_kernel_interpreted_gives_the_bits(p):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    seeds = dropout.seeds(KEY, 1, 1)
    got = mask_kernel(p, interpret=plgpu.InterpretGPUParams())(seeds[0, 0])
    np.testing.assert_array_equal(np.asarray(got) > 0, numpy_block(seeds, 1000, 64, 5000, 64, p)[0, 0])


@mosaic
def test_a_kernel_lowers_for_hopper():
    lowered = jax.jit(mask_kernel(0.1)).trace(jax.ShapeDtypeStruct((2,), jnp.uint32)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


# ---- the statistics


def same_word(drop):
    """Pairs of keys that share a mix (`key_words`): k against k ^ 8, k ^ 1 and k ^ 9."""
    octets = drop.reshape(*drop.shape[:-1], -1, 2, 8)
    pairs = drop.reshape(*drop.shape[:-1], -1, 2)
    return {
        "keys k, k^8": (octets[..., 0, :], octets[..., 1, :]),
        "keys k, k^1": (pairs[..., 0], pairs[..., 1]),
        "keys k, k^9": (octets[..., 0, ::2], octets[..., 1, 1::2]),
    }


def neighbours(drop):
    """Pairs of elements of a mask (keys of JAX, B, H, L, S) that stand beside one another along some axis."""
    along = dict(zip(("JAX keys", "batches", "heads", "rows", "columns"), range(5), strict=True))
    axis_pairs = {f"adjacent {name}": (np.moveaxis(drop, a, 0)[:-1], np.moveaxis(drop, a, 0)[1:]) for name, a in along.items()}
    diagonals = {"diagonal": (drop[..., :-1, :-1], drop[..., 1:, 1:]), "antidiagonal": (drop[..., :-1, 1:], drop[..., 1:, :-1])}
    return {**axis_pairs, **diagonals, **same_word(drop)}


def assert_fair(p, keys, batch=2, heads=4, q_len=512, k_len=2048):
    """The masks of several keys are independent coins of probability p, as far as rates and pairs can tell.

    Rates: chi-square of the count in each row, each column of a head, and overall, two-sided: a mixer that is too regular
    (a Weyl sequence) fails as one that is too uneven does. Pairs: the correlation of neighbours, below 4 sigma. Blocks: the
    256 patterns of eight keys that share two words, by chi-square. `p` here is what `rounded` gives, so no slack is needed.
    """
    p = dropout.rounded(p)
    block = jax.jit(lambda seeds: ~dropout.keep_block(seeds, 0, q_len, 0, k_len, p))
    drop = np.stack([np.asarray(block(dropout.seeds(key, batch, heads))) for key in keys])
    faults = []

    def chi_square(name, x, freedom):
        low, high = stats.chi2.cdf(x, freedom), stats.chi2.sf(x, freedom)
        if min(low, high) < 1e-4:
            faults.append(f"{name}: chi-square {x:.1f} at {freedom} degrees of freedom")

    for name, counts, n in (
        ("rate per row", drop.sum(-1), k_len),
        ("rate per column", drop.sum(-2), q_len),
        ("rate overall", drop.sum(), drop.size),
    ):
        chi_square(name, (np.square(counts - n * p) / (n * p * (1 - p))).sum(), np.size(counts))

    for name, (one, other) in neighbours(drop).items():
        n = one.size
        z = ((one & other).sum() - p * one.sum() - p * other.sum() + n * p * p) / (np.sqrt(n) * p * (1 - p))
        if abs(z) > 4:
            faults.append(f"{name}: correlated, {z:.1f} sigma")

    octets = drop.reshape(-1, 2, 2, 4, 2) if k_len % 32 == 0 else None  # (…, half, pair of 4, pair, bit): keys 2j, 2j+1, +8, +9
    patterns = np.packbits(octets.transpose(0, 1, 3, 2, 4).reshape(-1, 8))
    ones = np.array([int(i).bit_count() for i in range(256)])
    expected = patterns.size * p**ones * (1 - p) ** (8 - ones)
    often = expected > 20
    seen = np.bincount(patterns, minlength=256)
    chi_square("patterns of eight", (np.square(seen - expected)[often] / expected[often]).sum(), int(often.sum()) - 1)

    assert not faults, f"p={p:.4g}, {drop.size:.3g} draws: " + "; ".join(faults)


def many_keys(n):
    """Half of them neighbours by seed, half split from one key, as programs make them."""
    return [jax.random.key(i) for i in range(n // 2)] + list(jax.random.split(jax.random.key(n), n - n // 2))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_fair_coins(p):
    assert_fair(p, many_keys(2))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_masks_are_fair_coins_in_a_hundred_million_draws(p):
    assert_fair(p, many_keys(6), q_len=1024)


def no_key_mix(seed1, k_idx):
    return k_idx.astype(np.uint32) * np.uint32(0x9E3779B9) + seed1


def no_query_mix(seed0, seed1, q_idx):
    q = q_idx.astype(np.uint32)
    return (seed0 ^ q) | np.uint32(1), seed1 + q * np.uint32(0x9E3779B9)


def neighbours_share_a_key_word(seed1, k_idx):
    return STRONG_KEY_WORDS(seed1, k_idx >> 1)


STRONG_KEY_WORDS = dropout.key_words


@pytest.mark.parametrize(
    ("name", "weak", "fault"),
    [
        ("key_words", no_key_mix, "rate per row"),
        ("query_words", no_query_mix, "adjacent rows"),
        ("key_words", neighbours_share_a_key_word, "keys k, k\\^1"),
    ],
)
def test_a_weak_mixer_fails_the_same_test(monkeypatch, name, weak, fault):
    monkeypatch.setattr(dropout, name, weak)
    with pytest.raises(AssertionError, match=fault):
        assert_fair(0.1, many_keys(2))
